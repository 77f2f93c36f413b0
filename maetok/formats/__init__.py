"""File formats and image operations that datamodules, callbacks and metrics share: pictures, crops, the latent cache.

The modules are imported one by one (``maetok.formats.crops``), so that a reader of latents does not load torchvision.
"""
