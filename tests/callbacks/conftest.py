"""Data that several callbacks are tested on."""

from pathlib import Path

import pytest

from lightning_modules import LatentEncoding
from tests.support.diffusion import tokenizer
from tests.support.latents import write_cache
from tests.support.shards import write_shards


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of 24 training images."""
    folder = tmp_path_factory.mktemp("guard")
    write_shards(folder / "shards", [12, 12])
    write_shards(folder / "shards", [6], split="validation")
    write_cache(folder / "shards", folder / "cache", LatentEncoding(tokenizer()), dtype="float32")
    return folder / "cache"
