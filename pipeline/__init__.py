"""Tars in, multi-crop batches out: the crop plan, the epoch order, the decoding backends, the loader."""
