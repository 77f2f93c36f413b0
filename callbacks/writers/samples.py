"""Stores sampled images as an npz file that the ADM evaluation suite reads, as PNG files, or both."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from callbacks.writers.base import ShardWriter
from maetok.formats.files import atomic_write, partial_path, write_text


class SampleWriter(ShardWriter):
    """Writes a block of images at a time while ``predict`` runs, and joins the blocks when all are complete.

    Processes take whole blocks. A block gets its name when it is complete, so a killed run resumes with the missing
    blocks. At most one block is in memory.

    Args:
        output: folder of the samples; ``samples.npz`` holds ``arr_0`` (N, H, W, 3) uint8 and ``labels`` (N,) int64.
        npz: write ``samples.npz``.
        png: write ``images/000000.png`` and so on.
    """

    kind = "samples"

    def __init__(self, output: str, npz: bool = True, png: bool = False) -> None:
        if not (npz or png):
            raise ValueError("SampleWriter writes nothing with npz=False and png=False: set one of them to true")
        super().__init__(output)
        self.npz, self.png = npz, png

    @property
    def blocks(self) -> Path:
        """Folder of the blocks until all are complete."""
        return self.output / "blocks"

    @property
    def results(self) -> list[Path]:
        """The files and folders that the blocks are joined into."""
        return [self.output / "samples.npz"] * self.npz + [self.output / "images"] * self.png

    def complete(self) -> bool:
        """Return whether all results exist."""
        return all(path.exists() for path in self.results)

    def block(self, number: int) -> Path:
        """Return the path of a block."""
        return self.blocks / f"{number:06d}.npy"

    def describe(self, trainer: Trainer, pl_module: Any, data: Any) -> dict[str, Any]:
        """Return the identity of the samples."""
        return {
            "samples": data.index("train").fingerprint(),
            "labels": hashlib.sha256(np.asarray(data.labels, dtype=np.int64).tobytes()).hexdigest()[:16],
            **pl_module.sampling_identity(),
        }

    def begin(self, data: Any) -> dict[str, list[int]]:
        """Find the complete blocks."""
        self.blocks.mkdir(parents=True, exist_ok=True)
        present = sorted(self.blocks.glob("[0-9]*.npy"))
        self.check_identity(self.results + present)
        everything = range(len(data.index("train").shard_samples))
        return {"train": list(everything) if self.complete() else [int(path.stem) for path in present]}

    def check_identity(self, images: list[Path]) -> None:
        """Raise FileExistsError if ``sampling.json`` beside existing images states another identity."""
        note = self.output / "sampling.json"
        known = json.loads(note.read_text()) if note.is_file() else {}
        if known != self.identity and any(path.exists() for path in [note, *images]):
            raise FileExistsError(
                f"SampleWriter.output={self.output} holds samples of another checkpoint or other settings "
                "(sampling.json): give another folder, or remove it"
            )

    def on_predict_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Record the identity of the samples."""
        if trainer.is_global_zero:
            write_text(self.output / "sampling.json", json.dumps(self.identity, indent=1))

    def part(self, outputs: Tensor, batch: Any) -> np.ndarray:
        """Return the images of one batch."""
        return outputs.cpu().numpy()

    def write(self, data: Any, split: str, number: int) -> None:
        """Write the collected images of one block."""
        with atomic_write(self.block(number)) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate(self.parts))

    def finish(self, data: Any) -> None:
        """Join the blocks of all processes.

        Raises:
            FileNotFoundError: if blocks are missing.
        """
        if not self.complete():
            paths = [self.block(number) for number in range(len(data.index("train").shard_samples))]
            missing = sum(not path.is_file() for path in paths)
            if missing:
                raise FileNotFoundError(f"{missing} blocks are missing in {self.blocks}: run the same command again")
            if self.png:
                write_pngs(paths, self.output / "images")
            if self.npz:
                write_npz(paths, np.asarray(data.labels, dtype=np.int64), self.output / "samples.npz")
            shutil.rmtree(self.blocks)
        rank_zero_info(f"{len(data.labels)} samples in {self.output}")


def write_npz(paths: list[Path], labels: np.ndarray, output: Path) -> None:
    """Join blocks (n, H, W, 3) uint8 into one uncompressed npz file, with at most one block in memory."""
    first = np.load(paths[0], mmap_mode="r")
    shape = (len(labels), *first.shape[1:])
    with atomic_write(output) as partial, zipfile.ZipFile(partial, "w", allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for path in paths:
                member.write(np.load(path).tobytes())
        with archive.open("labels.npy", "w") as member:
            np.lib.format.write_array(member, labels)


def write_pngs(paths: list[Path], folder: Path) -> None:
    """Write each image of the blocks as a PNG file named by its number."""
    from PIL import Image

    for stale in (partial_path(folder), folder):
        shutil.rmtree(stale, ignore_errors=True)
    with atomic_write(folder) as partial:
        partial.mkdir()
        images = (image for path in paths for image in np.load(path))
        for number, image in enumerate(images):
            Image.fromarray(image).save(partial / f"{number:06d}.png")
