"""Stores the latents of a data set as a latent cache (docs/data.md)."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Trainer

from callbacks.writers.base import ShardWriter
from maetok.formats.latent_cache import (
    MANIFEST,
    SPLITS,
    CacheIdentity,
    describe_split,
    read_metadata,
    shard_path,
    write_manifest,
    write_shard,
)


class LatentWriter(ShardWriter):
    """Writes one safetensors file per image shard while ``predict`` runs, and ``manifest.json`` when all are complete.

    Processes take whole shards. A file gets its name when it is complete, so a killed run resumes with the missing
    shards. The datamodule must read image shards.

    Args:
        output: folder of the cache.
        dtype: how latents are stored.
        overwrite: replace a cache of another tokenizer, transform or dtype instead of refusing.
    """

    splits, kind = SPLITS, "latents"

    def __init__(
        self, output: str, dtype: Literal["float16", "bfloat16", "float32"] = "float16", overwrite: bool = False
    ) -> None:
        super().__init__(output)
        self.dtype, self.overwrite = dtype, overwrite

    def describe(self, trainer: Trainer, pl_module: Any, data: Any) -> CacheIdentity:
        """Return the identity of the cache."""
        return {
            "tokenizer_hash": pl_module.tokenizer_hash,
            "transform": data.evaluation_transform,
            "variants": list(pl_module.variants),
            "dtype": self.dtype,
            "precision": str(trainer.precision),
            "sources": {split: data.index(split).fingerprint() for split in SPLITS},
        }

    def begin(self, data: Any) -> dict[str, set[int]]:
        """Find the complete shards; with ``overwrite``, remove shards of another cache."""
        self.output.mkdir(parents=True, exist_ok=True)
        finished = {split: self.finished(data, split) for split in SPLITS}
        (self.output / MANIFEST).unlink(missing_ok=True)  # the cache must not be read until all shards are complete
        return finished

    def paths(self, data: Any, split: str) -> dict[int, Path]:
        """Return the path of every shard of a split that has samples, by its number."""
        numbers = np.flatnonzero(data.index(split).shard_samples).tolist()
        return {number: shard_path(self.output, split, number) for number in numbers}

    def finished(self, data: Any, split: str) -> set[int]:
        """Return the numbers of the complete shards of a split; with ``overwrite``, remove shards of another cache."""
        found = set()
        for number, path in self.paths(data, split).items():
            if path.exists():
                if read_metadata(path).get("identity") == self.identity:
                    found.add(number)
                elif self.overwrite:
                    path.unlink()
                else:
                    raise FileExistsError(
                        f"LatentWriter.output={self.output} holds latents of another tokenizer, data set, transform or "
                        f"dtype ({path.name}): give another folder, or set overwrite: true"
                    )
        return found

    def part(self, outputs: Any, batch: Any) -> Any:
        """Return latents, labels and indices of the valid samples."""
        valid = batch["valid"]
        return outputs.cpu(), batch["labels"][valid].cpu(), batch["indices"][valid].cpu()

    def write(self, data: Any, split: str, number: int) -> None:
        """Write the collected latents.

        Raises:
            OverflowError: if a latent does not fit the dtype of the cache.
        """
        latents, labels, indices = (torch.cat(part) for part in zip(*self.parts, strict=True))
        stored = latents.to(getattr(torch, self.dtype))
        if not stored.isfinite().all():
            raise OverflowError(
                f"latents up to {latents.abs().max():.3g} cannot be stored as LatentWriter.dtype={self.dtype}: use "
                "bfloat16 or float32, or find out why they are so large"
            )
        index, path = data.index(split), shard_path(self.output, split, number)
        keys, source = index.keys(indices.numpy()), Path(index.paths[number]).name
        write_shard(path, stored, labels, indices, keys, self.identity, source)

    def finish(self, data: Any) -> None:
        """Check that not too many samples are missing, and write the manifest."""
        splits = {split: describe_split(list(self.paths(data, split).values())) for split in SPLITS}
        self.check_left_out(data, sum(split["samples"] for split in splits.values()))
        write_manifest(self.output, self.identity, data.index("train").class_names, splits)

    def check_left_out(self, data: Any, samples: int) -> None:
        """Raise ValueError if too many samples are broken, in whichever run the broken ones were found."""
        indices = [data.index(split) for split in SPLITS]
        total = sum(len(index) + len(index.faults) for index in indices)
        limit = data.faults.max_fault_rate
        if total - samples > limit * total:
            raise ValueError(
                f"LatentWriter.output={self.output}: {total - samples} of {total} samples are broken and left out, "
                f"more than data.init_args.max_fault_rate={limit} allows: repair or remove them and encode into "
                "another folder, or raise max_fault_rate"
            )
