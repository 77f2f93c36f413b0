"""Denoisers over latents: SiT and LightningDiT."""
