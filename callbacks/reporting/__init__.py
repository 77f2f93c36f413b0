"""Callbacks that report on a run: progress, throughput, summary."""
