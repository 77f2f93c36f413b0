"""MAETok as a plain PyTorch library: no Lightning, no work at import time.

import torch
from maetok import SiT, Tokenizer, published_latent_moments, sample

tokenizer, sit = Tokenizer.from_pretrained("exported/tokenizer"), SiT.from_pretrained("exported/sit")
mean, std = published_latent_moments("exported/sit")  # of a released SiT: the folder of its tokenizer
labels, noise = torch.tensor([3, 7]), torch.randn(2, sit.latent_tokens, sit.latent_channels)
normalized = sample(sit, labels, noise, steps=50, guidance_scale=1.9, guidance_interval=(0.0, 0.75))
images = tokenizer.decode(normalized * std + mean)  # (2, 3, H, W), about [-1, 1]

Folders are local, or hub ids (owner/name); ``python -m maetok.hub export`` makes them of checkpoints. The way back is
``(tokenizer.encode(images) - mean) / std``; shapes and ranges of everything are in maetok/README.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from maetok.runtime.renamed import MovedCommands, renamed

if TYPE_CHECKING:
    from maetok.flow.sampling import sample
    from maetok.networks.denoiser.lightning_dit import LightningDiT
    from maetok.networks.denoiser.sit import SiT
    from maetok.networks.folder import published_latent_moments
    from maetok.networks.tokenizer.tokenizer import Tokenizer

__all__ = ["LightningDiT", "SiT", "Tokenizer", "published_latent_moments", "sample"]

HOMES = {"published_latent_moments": "maetok.networks.folder", "sample": "maetok.flow.sampling"}
"""Modules of the public names that are not networks."""

MovedCommands({"maetok.consolidate": "maetok.checkpoints.consolidate"}).register()

OLD_NAMES = {"latent_statistics": "maetok.networks.folder.published_latent_moments"}


def __getattr__(name: str) -> Any:
    """Import torch and timm on first use only, so that the help of the command line stays fast."""
    if name in __all__:
        return getattr(import_module(HOMES.get(name, "maetok.networks")), name)
    return renamed("maetok", OLD_NAMES)(name)
