"""Callbacks that write predictions to disk."""
