"""The whole path on a small set of real scans, for a machine with no GPU and no data."""
