"""Images in, WebDataset tars out. No torch here: packing runs on any machine."""
