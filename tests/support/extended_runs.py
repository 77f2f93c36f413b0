"""Tiny runs of stage 1 with a part from outside the package."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from main import MAETokCLI
from tests.support.helpers import run

NO_TARGETS = ("--model.init_args.targets=null", "--model.init_args.target_weights=null")
ADVERSARIAL = "--model.init_args.objective.init_args.weights"


def train(folder: Path, digits_root: Path, *flags: str) -> MAETokCLI:
    """Train the tokenizer of the digits for two steps."""
    return run("fit", "digits_tokenizer", folder, digits_root, *flags)


def moved(cli: MAETokCLI, folder: Path, prefix: str) -> set[str]:
    """Return the weights under a prefix that the last step changed."""
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"))
    before, after = (torch.load(path, weights_only=True)["state_dict"] for path in checkpoints[-2:])
    return {name for name, value in after.items() if name.startswith(prefix) and not torch.equal(value, before[name])}


def sample_images(size: int = 64) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(7)) * 2 - 1


def terms_of(cli: MAETokCLI, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
    """Return the weighted auxiliary losses of a training forward pass."""
    return cli.model.reconstruct_masked(images, mask)[1]
