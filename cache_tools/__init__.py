"""Teacher outputs in Zarr v3: built once, checked at every read."""
