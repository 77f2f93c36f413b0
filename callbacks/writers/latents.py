"""Stores the latents of a data set as memory-mappable shards with a manifest: the latent cache (docs/data.md)."""

import json
import os
import warnings
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from maetok.analysis.channel_moments import ChannelMoments

SCHEMA_VERSION = 1
SPLITS = ("train", "validation")


class LatentWriter(Callback):
    """Writes one safetensors file per image shard while ``predict`` runs, and ``manifest.json`` when all are there.

    Processes take whole shards. A file gets its name when it is complete, so a killed run goes on with the shards that
    are missing. The datamodule has to be one of image shards.

    Args:
        output: folder of the cache.
        dtype: how latents are stored.
        overwrite: replace a cache of another tokenizer, transform or dtype instead of refusing.
    """

    def __init__(
        self, output: str, dtype: Literal["float16", "bfloat16", "float32"] = "float16", overwrite: bool = False
    ) -> None:
        self.output, self.dtype, self.overwrite = Path(output), dtype, overwrite
        self.identity: dict[str, Any] = {}
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []  # of the shard that is being encoded
        self.current: tuple[str, int] | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Find out which shards are there already.

        Raises:
            FileExistsError: if the folder holds latents of another tokenizer, transform or dtype.
        """
        if stage != "predict":
            return
        # The order gives every sample once, which its tests show; and a process may have no shard left to encode.
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
        if trainer.is_global_zero:  # until all shards are there again, nobody shall read them
            (self.output / "manifest.json").unlink(missing_ok=True)
        data.finished_shards = trainer.strategy.broadcast(finished)  # the same on all, who share out the rest
        count = sum(map(len, data.finished_shards.values()))
        rank_zero_info(f"writing latents to {self.output}" + (f": {count} shards are there already" if count else ""))

    def finished(self, data: Any, split: str) -> set[int]:
        """Numbers of the complete shards of a split; with ``overwrite``, others are removed."""
        found = set()
        for shard in np.flatnonzero(data.index(split).shard_samples).tolist():
            path = self.output / shard_name(split, shard)
            if path.exists():
                if read_metadata(path).get("identity") == self.identity:
                    found.add(shard)
                elif self.overwrite:
                    path.unlink()
                else:
                    raise FileExistsError(
                        f"LatentWriter.output={self.output} holds latents of another tokenizer, data set, transform or "
                        f"dtype ({path.name}): give another folder, or overwrite: true"
                    )
        return found

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Collect the latents of one shard, and write it when its last sample has come."""
        split, after = SPLITS[dataloader_idx], int(batch["position"])
        ends = np.cumsum(trainer.datamodule.index(split).shard_samples)  # type: ignore[attr-defined]
        shard = int(np.searchsorted(ends, after))
        if self.current != (split, shard):  # one that limit_predict_batches cut short is not written
            self.current, self.parts = (split, shard), []
        valid = batch["valid"]
        self.parts.append((outputs.cpu(), batch["labels"][valid].cpu(), batch["indices"][valid].cpu()))
        if after == ends[shard]:
            self.write(trainer, split, shard)

    def write(self, trainer: Trainer, split: str, shard: int) -> None:
        """Write what has been collected under a temporary name, flush, rename.

        Raises:
            OverflowError: if a latent does not fit the type it is stored in.
        """
        latents, labels, indices = (torch.cat(part) for part in zip(*self.parts, strict=True))
        stored = latents.to(getattr(torch, self.dtype))
        if not stored.isfinite().all():
            raise OverflowError(
                f"latents up to {latents.abs().max():.3g} cannot be stored as LatentWriter.dtype={self.dtype}: use "
                "bfloat16 or float32, or find out why they are so large"
            )
        statistics = ChannelMoments.of(stored.float().numpy())
        index = trainer.datamodule.index(split)  # type: ignore[attr-defined]
        keys = json.dumps(index.keys(indices.numpy())).encode()
        tensors = {
            "latents": stored.contiguous(),
            "labels": labels,
            "indices": indices,
            "keys": torch.frombuffer(bytearray(keys), dtype=torch.uint8),
        }
        metadata = {
            "identity": self.identity,
            "source": Path(index.paths[shard]).name,
            "count": statistics.count,
            "mean": statistics.mean.tolist(),
            "squared_deviations": statistics.squared_deviations.tolist(),
        }
        path = self.output / shard_name(split, shard)
        partial = path.with_name(f".{path.name}.partial")
        save_file(tensors, partial, {"cache": json.dumps(metadata)})
        partial.chmod(0o644)  # safetensors lets only its owner read it, but nodes and people share caches
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the manifest once all shards of all processes are there."""
        if stage == "predict":
            trainer.strategy.barrier()
            if trainer.is_global_zero:
                self.write_manifest(trainer.datamodule)  # type: ignore[attr-defined]

    def write_manifest(self, data: Any) -> None:
        """Merge the statistics of the shards, always in the same order, and write ``manifest.json``."""
        splits = {split: self.describe_split(data, split) for split in SPLITS}
        self.check_left_out(data, sum(split["samples"] for split in splits.values()))
        names = [file["file"] for split in splits.values() for file in split["shards"]]
        with safe_open(self.output / names[0], "pt") as file:
            _, _, *latent_shape = file.get_slice("latents").get_shape()
        manifest = {
            "schema_version": SCHEMA_VERSION,
            **self.identity,
            "latent_shape": latent_shape,
            "class_names": data.index("train").class_names,
            "splits": splits,
        }
        partial = self.output / ".manifest.json.partial"
        partial.write_text(json.dumps(manifest, indent=1))
        os.replace(partial, self.output / "manifest.json")

    def check_left_out(self, data: Any, samples: int) -> None:
        """Raise ValueError if too many samples are broken, whichever of the runs that wrote the cache has met them."""
        indices = [data.index(split) for split in SPLITS]
        total = sum(len(index) + len(index.faults) for index in indices)
        limit = data.faults.max_fault_rate
        if total - samples > limit * total:
            raise ValueError(
                f"LatentWriter.output={self.output}: {total - samples} of {total} samples are broken and left out, "
                f"more than data.init_args.max_fault_rate={limit} allows: repair or remove them and encode into "
                "another folder, or raise max_fault_rate"
            )

    def describe_split(self, data: Any, split: str) -> dict[str, Any]:
        """Samples, files, and mean and standard deviation per channel of one split."""
        shards, statistics = [], []
        for shard in np.flatnonzero(data.index(split).shard_samples).tolist():
            path = self.output / shard_name(split, shard)
            metadata = read_metadata(path)
            mean, squared_deviations = (np.array(metadata[name]) for name in ("mean", "squared_deviations"))
            statistics.append(ChannelMoments(metadata["count"], mean, squared_deviations))
            with safe_open(path, "pt") as file:
                (samples,) = file.get_slice("labels").get_shape()
            shards.append({"file": path.name, "samples": samples, "bytes": path.stat().st_size})
        merged = reduce(ChannelMoments.merge, statistics)
        return {
            "samples": sum(shard["samples"] for shard in shards),
            "mean": merged.mean.tolist(),
            "std": merged.std.tolist(),
            "shards": shards,
        }


def shard_name(split: str, shard: int) -> str:
    """File name of one shard of the cache."""
    return f"{split}-{shard:06d}.safetensors"


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a shard; raises FileNotFoundError or ValueError, with a remedy, where there is none."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("cache", "{}"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} is missing: run the same predict command again to encode it") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it and run the same predict command again") from error
