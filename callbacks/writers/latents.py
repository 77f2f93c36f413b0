"""Stores the latents of a data set as a latent cache (docs/data.md)."""

import warnings
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

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


class LatentWriter(Callback):
    """Writes one safetensors file per image shard while ``predict`` runs, and ``manifest.json`` when all are complete.

    Processes take whole shards. A file gets its name when it is complete, so a killed run resumes with the missing
    shards. The datamodule must read image shards.

    Args:
        output: folder of the cache.
        dtype: how latents are stored.
        overwrite: replace a cache of another tokenizer, transform or dtype instead of refusing.
    """

    def __init__(
        self, output: str, dtype: Literal["float16", "bfloat16", "float32"] = "float16", overwrite: bool = False
    ) -> None:
        self.output, self.dtype, self.overwrite = Path(output), dtype, overwrite
        self.identity = cast(CacheIdentity, {})
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []  # of the shard that is being encoded
        self.current: tuple[str, int] | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Find the shards that are complete.

        Raises:
            FileExistsError: if the folder holds latents of another tokenizer, transform or dtype.
        """
        if stage != "predict":
            return
        # The order yields every sample once, as its tests show, and a process may have no shard left to encode.
        warnings.filterwarnings("ignore", "You are using a custom batch sampler|Total length of `.*`")
        data = trainer.datamodule  # type: ignore[attr-defined]
        self.identity = {
            "tokenizer_hash": pl_module.tokenizer_hash,
            "transform": data.evaluation_transform,
            "variants": list(pl_module.variants),
            "dtype": self.dtype,
            "precision": str(trainer.precision),
            "sources": {split: data.index(split).fingerprint() for split in SPLITS},
        }
        self.output.mkdir(parents=True, exist_ok=True)
        finished = {split: self.finished(data, split) for split in SPLITS} if trainer.is_global_zero else {}
        if trainer.is_global_zero:  # the cache must not be read until all shards are complete
            (self.output / MANIFEST).unlink(missing_ok=True)
        data.finished_shards = trainer.strategy.broadcast(finished)  # equal on all processes, which share the rest
        count = sum(map(len, data.finished_shards.values()))
        rank_zero_info(f"writing latents to {self.output}" + (f": {count} shards are complete" if count else ""))

    def paths(self, data: Any, split: str) -> dict[int, Path]:
        """Return the path of every shard of a split that has samples, by its number."""
        numbers = np.flatnonzero(data.index(split).shard_samples).tolist()
        return {number: shard_path(self.output, split, number) for number in numbers}

    def finished(self, data: Any, split: str) -> set[int]:
        """Return the numbers of the complete shards of a split; with ``overwrite``, remove those of another cache."""
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

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collect the latents of one shard, and write it after its last sample."""
        split, after = SPLITS[dataloader_idx], int(batch["position"])
        ends = np.cumsum(trainer.datamodule.index(split).shard_samples)  # type: ignore[attr-defined]
        number = int(np.searchsorted(ends, after))
        if self.current != (split, number):  # a shard that limit_predict_batches cut short is not written
            self.current, self.parts = (split, number), []
        valid = batch["valid"]
        self.parts.append((outputs.cpu(), batch["labels"][valid].cpu(), batch["indices"][valid].cpu()))
        if after == ends[number]:
            self.write(trainer.datamodule.index(split), split, number)  # type: ignore[attr-defined]

    def write(self, index: Any, split: str, number: int) -> None:
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
        path, keys = shard_path(self.output, split, number), index.keys(indices.numpy())
        write_shard(path, stored, labels, indices, keys, self.identity, Path(index.paths[number]).name)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the manifest when the shards of all processes are complete."""
        if stage == "predict":
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                self.finish(trainer.datamodule)  # type: ignore[attr-defined]

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
