"""MAETok as a plain PyTorch library: no Lightning, no work at import time.

from maetok import Tokenizer

tokenizer = Tokenizer.from_pretrained("folder or owner/name")
latents = tokenizer.encode(images)  # images (B, 3, H, W) in [-1, 1] -> latents (B, L, C)
reconstructions = tokenizer.decode(latents)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maetok.networks.tokenizer import Tokenizer

__all__ = ["Tokenizer"]


def __getattr__(name: str) -> Any:
    """Import networks, and timm with them, only when they are asked for: the command line's help is fast without."""
    if name == "Tokenizer":
        from maetok.networks.tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module 'maetok' has no attribute {name!r}")
