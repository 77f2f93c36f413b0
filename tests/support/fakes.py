"""What callbacks see of a task and a trainer, without either."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Task:
    """Latents are the images' corner, reconstructions are off by a constant."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.logged: dict[str, float] = {}

    def encode(self, images: Tensor) -> Tensor:
        return images[:, :, :2, :2].flatten(2)

    def reconstruct(self, images: Tensor) -> Tensor:
        return images * 0.5

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def log(self, name: str, value: Any, **_: Any) -> None:
        self.logged[name] = float(value)

    def log_dict(self, values: dict[str, Any], **_: Any) -> None:
        self.logged |= {name: float(value) for name, value in values.items()}


def validating(images: Tensor, labels: Tensor, folder: Path | None = None, padding: int = 0, **options: Any) -> Any:
    """A trainer in ``validate`` whose splits are both these images in one batch, the last ``padding`` not valid."""

    def loader(split: str, max_samples: int) -> list[dict[str, Tensor]]:
        indices = torch.arange(len(images))
        return [{"images": images, "labels": labels, "valid": indices < len(images) - padding, "indices": indices}]

    defaults = {
        "sanity_checking": False,
        "state": SimpleNamespace(fn="validate"),
        "global_step": 0,
        "max_steps": 10,
        "val_check_batch": 1,
        "lightning_module": None,
        "world_size": 1,
        "is_global_zero": True,
        "strategy": SimpleNamespace(batch_to_device=lambda batch: batch, broadcast=lambda value: value),
        "callback_metrics": {},
        "datamodule": SimpleNamespace(evaluation_dataloader=loader),
        "loggers": [],
        "default_root_dir": str(folder),
    }
    return SimpleNamespace(**(defaults | options))
