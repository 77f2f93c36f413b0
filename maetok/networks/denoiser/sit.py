"""SiT over 1D latent tokens (arXiv 2401.08740), the denoiser of the paper's main results."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from maetok.networks.denoiser.published_sit import REQUIRED_KEYS, published_config, sit_arguments, to_published_name
from maetok.networks.denoiser.transformer import SIZES, DiffusionTransformer
from maetok.networks.folder import load_strictly, locate, read_config, read_tensors, write_folder
from maetok.networks.layers.vit import TransformerSize


def sine_table(tokens: int, width: int, base: float = 10000.0) -> Tensor:
    """Return fixed 1D positions (1, tokens, width) float32, with sines in even and cosines in odd channels.

    The angle of channels 2i and 2i + 1 at position p is p * base ** (-2i / width).
    """
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[None].float()


class SiT(DiffusionTransformer):
    """SiT with patch size 1: sine positions added once, LayerNorm without parameters, GELU (tanh) MLP, adaLN-zero.

    The defaults are SiT-XL/1 (675 million parameters) for 128 latent tokens of 32 channels and ImageNet's classes.

    Args:
        latent_tokens: number L of latent tokens.
        latent_channels: channels C of each.
        num_classes: number of classes, which is also the null label; None or 0 for a denoiser without labels.
        size: any size; :data:`maetok.networks.denoiser.transformer.SIZES` and ``configs/size`` have the usual ones.
        qk_norm: normalise queries and keys of each head (LayerNorm with parameters, eps 1e-5).

    Raises:
        ValueError: if the width is odd or not divisible by the number of heads.
    """

    def __init__(
        self,
        latent_tokens: int = 128,
        latent_channels: int = 32,
        num_classes: int | None = 1000,
        size: TransformerSize = SIZES["XL"],
        qk_norm: bool = False,
    ) -> None:
        if size.width % 2:
            raise ValueError(f"sine and cosine positions need an even width, got {size.width}")
        super().__init__(
            latent_tokens,
            latent_channels,
            num_classes,
            size,
            norm=partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False),
            mlp=lambda size: Mlp(size.width, int(size.width * size.mlp_ratio), act_layer=partial(nn.GELU, "tanh")),
            query_key_norm=partial(nn.LayerNorm, eps=1e-5) if qk_norm else None,
        )
        self.qk_norm = qk_norm
        self.position_table = nn.Parameter(sine_table(latent_tokens, size.width), requires_grad=False)  # as published
        self.published_config: dict[str, Any] = {}  # from_pretrained sets it, save_pretrained writes it

    def embed(self, x: Tensor) -> Tensor:
        """Project latents and add positions: (B, L, C) -> (B, L, width)."""
        return super().embed(x) + self.position_table

    @classmethod
    def from_pretrained(cls, path_or_repo: str | Path) -> "SiT":
        """Load a published SiT (config.json + model.safetensors); see :func:`load_sit`."""
        return load_sit(path_or_repo)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors as published; see :func:`save_sit`."""
        save_sit(self, folder)


def load_sit(path_or_repo: str | Path) -> SiT:
    """Build a published SiT and load its weights strictly.

    With ``qk_norm``, the released code skips that normalisation in half precision with ``flash_attn``. Ours never
    skips it.

    Args:
        path_or_repo: local folder or hub id.

    Returns:
        The SiT in evaluation mode, float32, on CPU.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is truncated, the model is of another kind, or tensors are missing, unknown or misshapen.
    """
    folder = locate(path_or_repo)
    config = read_config(folder / "config.json", REQUIRED_KEYS, "SiT")
    sit = SiT(**sit_arguments(config))
    remedy = "The two files belong to different models."
    load_strictly(sit, read_tensors(folder / "model.safetensors"), to_published_name, str(folder), remedy)
    sit.published_config = config
    return sit.eval()


def save_sit(sit: SiT, folder: str | Path) -> None:
    """Write a SiT in the published format. A model that was loaded from this format is reproduced bit for bit.

    Args:
        sit: the model.
        folder: folder for config.json and model.safetensors; created if it does not exist.
    """
    tensors = {to_published_name(name): tensor for name, tensor in sit.state_dict().items()}
    write_folder(folder, tensors, sit.published_config or published_config(sit))
