"""Callbacks that measure: probes, modes, metrics of reconstructions and samples."""
