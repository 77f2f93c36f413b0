"""Images with labels from WebDataset shards, as a LightningDataModule."""

import math
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import ImageBatch, to_model_input
from datamodules.order import EvaluationOrder, SampleReference, TrainingOrder
from datamodules.shards import ShardError, ShardIndex, find_shards

Split = Literal["train", "validation"]


class ImageShardDataset(Dataset[ImageBatch]):
    """Reads a whole batch of samples at once; augmentation depends on (seed, epoch, sample) and nothing else.

    Args:
        index: where the samples lie.
        image_size: (height, width) of the images.
        seed: seed of the augmentation.
        horizontal_flip: mirror half of the images.
        random_crop_scale: share of the short side that a random crop covers; ``None`` for the centre crop.
    """

    def __init__(
        self,
        index: ShardIndex,
        image_size: tuple[int, int],
        seed: int = 0,
        horizontal_flip: bool = False,
        random_crop_scale: tuple[float, float] | None = None,
    ) -> None:
        self.index, self.image_size, self.seed = index, image_size, seed
        self.horizontal_flip, self.random_crop_scale = horizontal_flip, random_crop_scale

    def image(self, reference: SampleReference) -> Tensor:
        """(3, H, W) uint8 of one sample; zeros for padding."""
        from datamodules import transforms  # torchvision takes a second to import: only where images are read

        if reference.index < 0:
            return torch.zeros(3, *self.image_size, dtype=torch.uint8)
        try:
            image = transforms.decode(self.index.read(reference.index))
        except RuntimeError as error:
            raise ShardError(f"{self.index.describe(reference.index)} cannot be decoded: {error}") from error
        generator = np.random.Generator(np.random.PCG64([self.seed, reference.epoch, reference.index]))
        if self.random_crop_scale is None:
            image = transforms.center_crop(image, self.image_size)
        else:
            image = transforms.random_crop(image, self.image_size, self.random_crop_scale, generator)
        return image.flip(-1) if self.horizontal_flip and generator.random() < 0.5 else image

    def __getitems__(self, references: Sequence[SampleReference]) -> ImageBatch:
        """One batch, in the order of the references."""
        indices = torch.tensor([reference.index for reference in references])
        valid = indices >= 0
        labels = torch.from_numpy(self.index.label[indices.clamp_min(0).numpy()]) * valid
        return {
            "images": torch.stack([self.image(reference) for reference in references]),
            "labels": labels,
            "indices": indices,
            "valid": valid,
            "position": torch.tensor(references[0].position),
        }


def as_it_is(batch: ImageBatch) -> ImageBatch:
    """The dataset makes whole batches itself."""
    return batch


class ImageShards(LightningDataModule):
    """Training and validation images from tar shards that hold jpg, png or webp plus cls.

    The order of training samples is a function of ``seed`` and one position, which checkpoints hold, so a run continues
    with the very next sample, on any number of processes.

    Args:
        train_shards: glob pattern of the training shards.
        validation_shards: glob pattern of the validation shards.
        image_size: side or (height, width) of the images handed out.
        num_classes: labels must lie in 0 ... num_classes - 1.
        batch_size: samples per micro-batch over all processes.
        evaluation_batch_size: the same for evaluation; ``batch_size`` if not given.
        num_workers: loader processes per training process.
        prefetch_factor: batches that each loader process prepares ahead.
        horizontal_flip: mirror half of the training images.
        random_crop_scale: share of the short side that a random training crop covers, e.g. [0.8, 1.0]; null for the
            centre crop, which evaluation always uses.
        seed: seed of order and augmentation; ``seed_everything`` if not given.

    Raises:
        ValueError: if ``random_crop_scale`` is no range of shares.
    """

    def __init__(
        self,
        train_shards: str,
        validation_shards: str,
        image_size: int | tuple[int, int] = 256,
        num_classes: int = 1000,
        batch_size: int = 256,
        evaluation_batch_size: int | None = None,
        num_workers: int = 8,
        prefetch_factor: int = 2,
        horizontal_flip: bool = True,
        random_crop_scale: tuple[float, float] | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if random_crop_scale is not None and not 0 < random_crop_scale[0] <= random_crop_scale[1] <= 1:
            raise ValueError(f"data.init_args.random_crop_scale={random_crop_scale} needs 0 < low <= high <= 1")
        self.patterns: dict[Split, str] = {"train": train_shards, "validation": validation_shards}
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.num_classes, self.batch_size = num_classes, batch_size
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed
        self.evaluation_batch_size = evaluation_batch_size or batch_size
        self.num_workers, self.prefetch_factor = num_workers, prefetch_factor
        self.horizontal_flip, self.random_crop_scale = horizontal_flip, random_crop_scale
        self.position = 0
        self.indices: dict[Split, ShardIndex] = {}

    def setup(self, stage: str) -> None:
        """Index what the subcommand reads; a missing or damaged shard is an error here, before any training."""
        if stage in ("fit", "predict"):
            self.index("train")
        if stage != "predict":
            self.index("validation")

    def index(self, split: Split) -> ShardIndex:
        """The index of a split, built when it is first asked for."""
        if split not in self.indices:
            paths = find_shards(self.patterns[split], f"data.init_args.{split}_shards")
            self.indices[split] = ShardIndex.build(paths, self.num_classes)
        return self.indices[split]

    def train_dataloader(self) -> DataLoader[ImageBatch]:
        """Endless loader that starts at the saved position; read anew at every ``iter()``."""
        index = self.index("train")
        rank, world_size = self._process()
        order = TrainingOrder(len(index), self.batch_size, rank, world_size, self.seed, lambda: self.position)
        dataset = ImageShardDataset(index, self.image_size, self.seed, self.horizontal_flip, self.random_crop_scale)
        return self._loader(dataset, order)

    def val_dataloader(self) -> DataLoader[ImageBatch]:
        """Every validation image exactly once, over all processes."""
        return self.evaluation_dataloader("validation")

    def test_dataloader(self) -> DataLoader[ImageBatch]:
        """The validation split: there is no third one."""
        return self.evaluation_dataloader("validation")

    def predict_dataloader(self) -> DataLoader[ImageBatch]:
        """Every training image exactly once, without augmentation."""
        return self.evaluation_dataloader("train")

    def evaluation_dataloader(self, split: Split, max_samples: int | None = None) -> DataLoader[ImageBatch]:
        """Centre crops of a split in stored order, each exactly once over all processes; for metrics and probes.

        With ``max_samples``, every n-th sample is read so that there are no more than these.
        """
        index = self.index(split)
        stride = math.ceil(len(index) / max_samples) if max_samples else 1
        order = EvaluationOrder(len(index), self.evaluation_batch_size, *self._process(), stride=stride)
        return self._loader(ImageShardDataset(index, self.image_size), order)

    def _process(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, dataset: ImageShardDataset, order: Any) -> DataLoader[ImageBatch]:
        workers: dict[str, Any] = {}
        if self.num_workers:
            workers = {"persistent_workers": True, "prefetch_factor": self.prefetch_factor}
        return DataLoader(
            dataset,
            batch_sampler=order,
            collate_fn=as_it_is,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            **workers,
        )

    def on_before_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Note how far training has come.

        Lightning calls this for the batch that is trained next, not for those prefetched, so the position is that of
        samples really used.
        """
        if self.trainer is not None and self.trainer.training:
            self.position = int(batch["position"])
        return batch

    def on_after_batch_transfer(self, batch: ImageBatch, dataloader_idx: int) -> ImageBatch:
        """Make floats of the images, on the device."""
        return to_model_input(batch)

    def state_dict(self) -> dict[str, Any]:
        """Position in the order, and what the order depends on."""
        index = self.index("train")
        return {"position": self.position, "seed": self.seed, "samples": len(index), "fingerprint": index.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a saved position.

        Raises:
            ShardError: if seed or data differ from those of the checkpoint, for then the order would not continue.
        """
        if self.trainer is not None and self.trainer.state.fn != "fit":
            return  # other subcommands read in stored order
        for key, value in self.state_dict().items():
            if key != "position" and state_dict[key] != value:
                raise ShardError(
                    f"cannot continue the data order: {key} was {state_dict[key]} in the checkpoint and is {value} "
                    "now. Use the same shards and data.init_args.seed, or start a new run"
                )
        self.position = state_dict["position"]
