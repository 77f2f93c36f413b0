"""Hashes of weights, and the check for networks without values."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def on_meta_device(network: nn.Module) -> bool:
    """Return whether the parameters of a network have shapes but no values."""
    return any(parameter.is_meta for parameter in network.parameters())


def weights_hash(description: str, parts: Iterable[Mapping[str, Tensor]]) -> str:
    """Return SHA-256 (hexadecimal) of a description and of names, types, shapes and values of several state dicts."""
    digest = hashlib.sha256(description.encode())
    for state in parts:
        for name, value in sorted(state.items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
