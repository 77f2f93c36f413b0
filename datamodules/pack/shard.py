"""Write one shard: the part of packing that runs in parallel."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from datamodules.index_file import columns_to_arrays, entry_of, record_of
from datamodules.pack.sources import SourceSample, sample_key
from datamodules.shards import Fault, ShardRecord, file_sha256
from maetok.formats.files import atomic_write, write_text
from maetok.formats.pictures import decode

JPEG_QUALITY = 95


class ShardJobs(Dataset[tuple[int, list[Fault]]]):
    """Item i writes shard i and returns its number and broken samples; the workers of a loader pack in parallel.

    Args:
        groups: samples of each shard.
        files: file name of each shard.
        folder: where the shards are written.
        resize: largest short side of an image; None copies every image unchanged.
        verify: decode every image once.
    """

    def __init__(
        self, groups: Sequence[list[SourceSample]], files: Sequence[str], folder: str, resize: int | None, verify: bool
    ) -> None:
        self.groups, self.files, self.folder, self.resize, self.verify = groups, files, folder, resize, verify

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> tuple[int, list[Fault]]:
        """Write one shard, and beside it a note of its samples."""
        from webdataset import TarWriter

        first = sum(map(len, self.groups[:number]))
        faults = []
        with atomic_write(Path(self.folder) / self.files[number]) as partial:
            with partial.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as writer:
                for place, sample in enumerate(self.groups[number], start=first):
                    key = sample_key(place, sample.name)
                    try:
                        data, extension = self.encoded(sample)
                    except (OSError, ValueError) as error:
                        reason = "unreadable" if isinstance(error, OSError) else "corrupt_image"
                        faults.append(Fault(sample.name, key, reason, str(error)[:200]))
                    else:
                        writer.write({"__key__": key, extension: data, "cls": str(sample.label).encode()})
            self.write_note(number, partial, faults)
        return number, faults

    def encoded(self, sample: SourceSample) -> tuple[bytes, str]:
        """Return bytes and extension of the image to store.

        Raises:
            ValueError: if it is not an image.
            OSError: if it cannot be read.
        """
        data = sample.read()
        if len(data) < sample.size:
            raise OSError(f"{sample.path} has become shorter")
        if not (self.verify or self.resize):
            return data, sample.extension
        image = decode(data)
        if self.resize is None or min(image.shape[-2:]) <= self.resize:
            return data, sample.extension
        return resized(image.permute(1, 2, 0).numpy(), self.resize, sample.extension)

    def write_note(self, number: int, partial: Path, faults: list[Fault]) -> None:
        """Record the samples of the shard."""
        with partial.open("rb", buffering=0) as file:
            record = ShardRecord.walk(file, self.files[number])
        record.sha256 = file_sha256(partial)
        note = {"record": entry_of(record), "faults": faults}
        write_text(Path(self.folder) / f"{self.files[number]}.json", json.dumps(note))


def resized(pixels: np.ndarray, short_side: int, extension: str) -> tuple[bytes, str]:
    """Shrink (H, W, 3) uint8 to a short side, antialiased, and encode it: JPEG stays JPEG, other formats become PNG."""
    from PIL import Image

    image = Image.fromarray(pixels)
    scale = short_side / min(image.size)
    size = tuple(max(short_side, round(side * scale)) for side in image.size)
    buffer = io.BytesIO()
    image = image.resize(size, Image.Resampling.BICUBIC)
    if extension in ("jpg", "jpeg"):
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
        return buffer.getvalue(), extension
    image.save(buffer, "PNG")
    return buffer.getvalue(), "png"


def finished_shards(folder: Path, files: Sequence[str]) -> dict[str, tuple[ShardRecord, list[Fault]]]:
    """Return records and broken samples of the complete shards in the hidden folder, by name."""
    finished = {}
    for name in files:
        note = folder / f"{name}.json"
        if (folder / name).is_file() and note.is_file():
            contents = json.loads(note.read_text(), object_hook=columns_to_arrays)
            finished[name] = (record_of(contents["record"]), [Fault(*fault) for fault in contents["faults"]])
    return finished
