"""Measurements behind the figures in the documents; each module says how to run it."""
