"""Callbacks that keep a run alive: checkpoints, bad steps, signals, lost processes."""
