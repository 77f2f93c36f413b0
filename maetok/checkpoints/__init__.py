"""Checkpoints on disk: find, read, restore, consolidate."""
