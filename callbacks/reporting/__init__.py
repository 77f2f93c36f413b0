"""Callbacks that tell how a run is doing: progress, throughput, summary."""
