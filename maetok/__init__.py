"""MAETok as a plain PyTorch library: no Lightning, no work at import time."""

from maetok.networks.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
