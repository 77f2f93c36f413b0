"""Images in folders and npz files, read a batch at a time."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from maetok.formats.crops import center_crop
from maetok.metrics.gaussians import Gaussian

EXTENSIONS = (".png", ".jpg", ".jpeg")


class ImageFolder:
    """Reads PNG and JPEG files of a folder in the order of their names.

    Args:
        path: the folder.
        image_size: crop images to a square of this side; None to leave them as they are.

    Raises:
        FileNotFoundError: if the folder holds no images.
    """

    labels: np.ndarray | None = None
    reference_moments: dict[str, Gaussian] | None = None

    def __init__(self, path: Path, image_size: int | None = None) -> None:
        self.paths = sorted(file for file in path.iterdir() if file.suffix.lower() in EXTENSIONS)
        self.names, self.image_size = [file.stem for file in self.paths], image_size
        if not self.paths:
            raise FileNotFoundError(f"{path} holds no {', '.join(EXTENSIONS)} files")

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, path: Path) -> Tensor:
        """Read one file as (3, H, W) uint8, upright.

        Raises:
            ValueError: if it cannot be decoded.
        """
        from maetok.formats.pictures import UndecodableImageError, decode

        try:
            image = decode(path.read_bytes())
        except UndecodableImageError as error:
            raise ValueError(f"{path} cannot be decoded ({error}): repair or remove it") from error
        return image if self.image_size is None else center_crop(image, (self.image_size, self.image_size))

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield (n, 3, H, W) uint8.

        Raises:
            ValueError: if images have several sizes.
        """
        for start in range(0, len(self.paths), batch_size):
            images = [self.read(path) for path in self.paths[start : start + batch_size]]
            if len({image.shape for image in images}) > 1:
                raise ValueError(f"{self.paths[0].parent} holds images of several sizes: crop them with --image-size")
            yield torch.stack(images)


class ImageArchive:
    """Reads ``arr_0`` (N, H, W, 3) uint8 of an npz file, with labels and moments if the file holds any.

    ``callbacks.SampleWriter`` writes the labels (N,) as ``labels``, ADM's own sampler as ``arr_1``. Reference files of
    the ADM evaluation suite hold moments of pooled (``mu``, ``sigma``) and spatial (``mu_s``, ``sigma_s``) Inception
    features; such a file may lack images.

    Args:
        path: the file; it may be compressed.

    Raises:
        ValueError: if it holds neither images nor moments.
    """

    names: list[str] | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shape: tuple[int, ...] = (0, 0, 0, 3)
        with np.load(path) as arrays:
            there = set(arrays.files)
            self.labels = next((arrays[name] for name in ("labels", "arr_1") if name in there), None)
            self.reference_moments = {
                name: Gaussian(*as_float64(arrays[mean], arrays[covariance]))
                for name, mean, covariance in (("pool", "mu", "sigma"), ("spatial", "mu_s", "sigma_s"))
                if {mean, covariance} <= there
            }
        if "arr_0" in there:
            with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
                self.shape = self.read_header(member)
        elif not self.reference_moments:
            raise ValueError(f"{path} holds neither images (arr_0) nor moments (mu, sigma), but {sorted(there)}")

    def __len__(self) -> int:
        return self.shape[0]

    def read_header(self, member: IO[bytes]) -> tuple[int, ...]:
        """Read the header of an array and return its shape; raise ValueError if it does not hold uint8 images."""
        headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, fortran_order, dtype = headers[np.lib.format.read_magic(member)](member)
        if dtype != np.uint8 or fortran_order or len(shape) != 4 or shape[3] != 3:
            raise ValueError(f"arr_0 of {self.path} must be (N, H, W, 3) uint8, got {shape} {dtype}")
        return shape

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield (n, 3, H, W) uint8; only one batch at a time is in memory."""
        if not len(self):
            return
        count, height, width, channels = self.shape
        with zipfile.ZipFile(self.path) as archive, archive.open("arr_0.npy") as member:
            self.read_header(member)
            for start in range(0, count, batch_size):
                shape = (min(batch_size, count - start), height, width, channels)
                pixels = np.frombuffer(member.read(int(np.prod(shape))), dtype=np.uint8).reshape(shape)
                yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).contiguous()


def as_float64(mean: np.ndarray, covariance: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return both as float64 tensors."""
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64))


def open_images(path: Path, image_size: int | None = None) -> ImageFolder | ImageArchive:
    """Open the images of a folder or npz file.

    Args:
        path: the folder or file.
        image_size: crop images of a folder to a square of this side; None to leave them as they are.

    Raises:
        FileNotFoundError: if the path is neither.
        ValueError: if it holds no images.
    """
    if path.is_dir():
        return ImageFolder(path, image_size)
    if path.is_file() and path.suffix == ".npz":
        return ImageArchive(path)
    raise FileNotFoundError(f"{path} is neither a folder of images nor an npz file")


def reference_gaussians(references: ImageFolder | ImageArchive, is_inception: bool) -> dict[str, Gaussian] | None:
    """Return the moments that a reference file holds; they belong to Inception.

    For any other network, return None if there are images to measure instead.
    """
    return None if len(references) and not is_inception else references.reference_moments
