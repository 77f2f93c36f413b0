"""Callbacks that measure latents, reconstructions and samples."""
