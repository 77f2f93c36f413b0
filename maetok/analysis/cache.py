"""Reads the latent caches that ``callbacks.LatentWriter`` writes, for analyses of a part of them (docs/data.md)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

SCHEMA_VERSION = 1


class LatentCache:
    """Labels and unmirrored latents of a cache.

    Args:
        folder: with ``manifest.json``.

    Raises:
        FileNotFoundError: if there is no manifest, which means that encoding has not finished.
        ValueError: if the manifest is of another version.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "manifest.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no manifest.json: encode the data first, or again if that was interrupted "
                "(python main.py predict --config configs/experiment/..._latents.yaml)"
            )
        self.folder, self.manifest = folder, json.loads(path.read_text())
        if self.manifest.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"{path} is no manifest of version {SCHEMA_VERSION}: encode the data again")

    def has(self, split: str) -> bool:
        """Whether there are samples of a split."""
        return bool(self.manifest["splits"].get(split, {}).get("samples"))

    def shards(self, split: str) -> list[dict[str, Any]]:
        """``file`` and ``samples`` of each shard of a split; ValueError where there are none."""
        if not self.has(split):
            raise ValueError(f"{self.folder} has no samples of the split {split!r}")
        return self.manifest["splits"][split]["shards"]

    def labels(self, split: str) -> np.ndarray:
        """(n,) int64 labels of a split, in stored order."""
        return np.concatenate([self.tensor(shard["file"], "labels").numpy() for shard in self.shards(split)])

    def latents(self, split: str, positions: np.ndarray) -> np.ndarray:
        """(k, L, C) float32 latents at sorted positions of a split; only these are read."""
        parts, first = [], 0
        for shard in self.shards(split):
            here = positions[(positions >= first) & (positions < first + shard["samples"])] - first
            first += shard["samples"]
            if len(here):
                stored = self.tensor(shard["file"], "latents")  # (n, V, L, C), mapped from the file
                parts.append(stored[here, 0].float().numpy())
        return np.concatenate(parts)

    def tensor(self, file: str, name: str) -> Any:
        """One tensor of a shard; ValueError with a remedy where the file is missing or damaged."""
        path = self.folder / file
        try:
            with safe_open(path, "pt") as opened:
                return opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read ({error}): remove it and encode again") from error
