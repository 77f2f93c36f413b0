"""Pack images into WebDataset shards: ``python -m datamodules.pack``.

The names below are imported on first use: packing needs libraries that training does not.
"""

from importlib import import_module
from typing import Any

HOMES = {
    "PackOptions": "datamodules.pack.split",
    "digit_images": "datamodules.pack.digits",
    "digit_sources": "datamodules.pack.digits",
    "folder_source": "datamodules.pack.sources",
    "main": "datamodules.pack.__main__",
    "pack_digits": "datamodules.pack.digits",
    "pack_split": "datamodules.pack.split",
    "tar_source": "datamodules.pack.sources",
}
"""Module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
