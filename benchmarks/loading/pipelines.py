"""Loaders of the same photos: usual ones, ours, and the limit. Each takes a path and yields batches."""

import glob
import math
import multiprocessing
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

IMAGE_SIZE = 256
CROP_SCALE = (0.8, 1.0)
BATCH_SIZE = 64
NUM_CLASSES = 1000
PREFETCH = 2
SHUFFLE_BUFFER = 1000


def adm_random_crop(image: Image.Image) -> Image.Image:
    """Cut out a random crop as ADM does (Dhariwal and Nichol, guided-diffusion, image_datasets.py)."""
    short_side = random.randint(math.ceil(IMAGE_SIZE / CROP_SCALE[1]), math.ceil(IMAGE_SIZE / CROP_SCALE[0]))
    while min(image.size) >= 2 * short_side:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    pixels = np.array(image.resize(size, resample=Image.Resampling.BICUBIC))
    top = random.randrange(pixels.shape[0] - IMAGE_SIZE + 1)
    left = random.randrange(pixels.shape[1] - IMAGE_SIZE + 1)
    return Image.fromarray(pixels[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE])


def pil_transform() -> Callable[[Image.Image], Tensor]:
    """Return a transform from a PIL image to (3, H, W) float32 in [-1, 1], the usual chain of torchvision's v1."""
    from torchvision import transforms

    return transforms.Compose(
        [
            adm_random_crop,
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
        ]
    )


class FastTransform:
    """Turns an encoded image into (3, H, W) uint8 with the suite's functions; each process has one rng."""

    def __init__(self) -> None:
        self.rng: np.random.Generator | None = None

    def __call__(self, data: bytes) -> Tensor:
        """Decode, crop, flip."""
        from maetok.formats import crops, pictures

        if self.rng is None:
            self.rng = np.random.default_rng(torch.initial_seed() % 2**63)
        *window, mirror = self.rng.random(4).tolist()
        image = crops.random_crop(pictures.decode(data), (IMAGE_SIZE, IMAGE_SIZE), CROP_SCALE, window)
        return image.flip(-1) if mirror < 0.5 else image


def image_folder(photos: str, num_workers: int, batches: int) -> DataLoader[Any]:
    """Return torchvision's ImageFolder in a DataLoader; the order continues over epochs without a pause."""
    from torch.utils.data import RandomSampler
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(photos, pil_transform())
    order = RandomSampler(dataset, num_samples=batches * BATCH_SIZE)
    return DataLoader(
        dataset, BATCH_SIZE, sampler=order, num_workers=num_workers, prefetch_factor=PREFETCH, drop_last=True
    )


def webdataset(shards: str, num_workers: int, fast: bool) -> Any:
    """Return WebDataset over resampled shards with a full shuffle buffer of encoded samples, batched in the workers."""
    import webdataset as wds

    urls = sorted(glob.glob(shards))
    dataset = wds.WebDataset(urls, resampled=True, shardshuffle=False).shuffle(SHUFFLE_BUFFER, initial=SHUFFLE_BUFFER)
    if fast:
        dataset = dataset.to_tuple("jpg", "cls").map_tuple(FastTransform(), int)
    else:
        dataset = dataset.decode("pil").to_tuple("jpg", "cls").map_tuple(pil_transform(), int)
    return wds.WebLoader(
        dataset.batched(BATCH_SIZE, partial=False),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=PREFETCH,
    )


def suite(shards: str, num_workers: int) -> DataLoader[Any]:
    """Return the endless training loader of ``datamodules.ImageShards``."""
    from datamodules import ImageShards, Loading

    data = ImageShards(
        train_shards=shards,
        validation_shards=shards,
        image_size=IMAGE_SIZE,
        num_classes=NUM_CLASSES,
        batch_size=BATCH_SIZE,
        random_crop_scale=CROP_SCALE,
        loading=Loading(num_workers=num_workers, prefetch_factor=PREFETCH),
        seed=0,
    )
    data.setup("fit")
    return data.train_dataloader()


def bare_loop(photos: str, companions: int) -> Iterator[Tensor]:
    """Decode and crop photos that are already in memory into one batch, in this process: the limit of any loader.

    Companions are processes that do the same and are not measured. Cores share caches and clock, so a loader with two
    busy workers must be compared with one of two busy loops.
    """
    encoded = [path.read_bytes() for path in sorted(Path(photos).rglob("*.jpg"))]
    for _ in range(companions):
        multiprocessing.get_context("fork").Process(target=crop_for_ever, args=(encoded,), daemon=True).start()
    yield from crop_batches(encoded)


def crop_for_ever(encoded: list[bytes]) -> None:
    """Crop without end, as a companion."""
    for _ in crop_batches(encoded):
        pass


def crop_batches(encoded: list[bytes]) -> Iterator[Tensor]:
    """Yield batches of random crops of random images, in the memory layout of decoding and cropping."""
    transform, order = FastTransform(), np.random.default_rng(0)
    batch = torch.empty(BATCH_SIZE, IMAGE_SIZE, IMAGE_SIZE, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    while True:
        for place, number in enumerate(order.integers(len(encoded), size=BATCH_SIZE)):
            batch[place] = transform(encoded[number])
        yield batch
