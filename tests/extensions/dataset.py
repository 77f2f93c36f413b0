"""A dataset from outside the package: images in folders named by their labels, read without packing."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from datamodules import Fault, ImageData


class FolderIndex:
    """Images of ``folder/<label>/``, all in one shard."""

    faults = ()

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*/*"))
        self.label = np.array([int(path.parent.name) for path in self.paths])
        self.shard_samples = [len(self.paths)]

    def __len__(self) -> int:
        return len(self.paths)

    def fingerprint(self) -> str:
        names = [path.name for path in self.paths]
        return hashlib.sha256(str((names, self.label.tolist())).encode()).hexdigest()[:16]

    def read(self, index: int) -> bytes:
        return self.paths[index].read_bytes()

    def fault(self, index: int, reason: str, detail: object) -> Fault:
        return Fault(self.paths[index].parent.name, self.paths[index].name, reason, str(detail))


class ImageFolders(ImageData):
    """Reads ``root/train`` and ``root/validation``."""

    def __init__(self, root: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.root = Path(root)

    def load_index(self, split: str) -> FolderIndex:
        return FolderIndex(self.root / split)
