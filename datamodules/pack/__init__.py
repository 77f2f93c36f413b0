"""Pack images into WebDataset shards: ``python -m datamodules.pack``."""
