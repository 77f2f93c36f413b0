"""The latent cache: caches written before the format had one owner are read, and the same bytes are written now."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import LatentShards, Loading
from maetok.formats.latent_cache import LatentCache, read_metadata, shard_path
from tests.conftest import STORED
from tests.support.latents import MeanColours, write_cache
from tests.support.shards import write_shards

BEFORE = STORED / "latent_cache_before"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caches in tests/data, written now."""
    folder = tmp_path_factory.mktemp("written")
    write_shards(folder / "shards", [3, 2])
    write_shards(folder / "shards", [2], split="validation")
    write_cache(folder / "shards", folder / "float16")
    write_cache(folder / "shards", folder / "bfloat16", MeanColours(mirrored=False), dtype="bfloat16")
    return folder


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_new_cache_has_the_bytes_of_an_old_one(written: Path, dtype: str) -> None:
    names = sorted(path.name for path in (BEFORE / dtype).iterdir())
    assert names == sorted(path.name for path in (written / dtype).iterdir())
    assert names == ["manifest.json", *(f"train-00000{shard}.safetensors" for shard in (0, 1)),
                     "validation-000000.safetensors"]  # fmt: skip
    for name in names:
        assert (written / dtype / name).read_bytes() == (BEFORE / dtype / name).read_bytes(), name


@pytest.mark.parametrize(
    ("dtype", "fingerprint", "first", "last"),
    [
        (
            "float16",
            "bdfc84572299bae9",
            [0.0887451171875, 0.007843017578125, 0.1568603515625],
            [-0.057342529296875, -0.00882720947265625, -0.065185546875],
        ),
        (
            "bfloat16",
            "29706a4f3ee5bb69",
            [0.0888671875, 0.00787353515625, 0.1572265625],
            [-0.057373046875, -0.00885009765625, -0.0654296875],
        ),
    ],
)
def test_an_old_cache_gives_the_values_that_the_old_reader_gave(
    dtype: str, fingerprint: str, first: list[float], last: list[float]
) -> None:
    cache = LatentCache(BEFORE / dtype)
    assert cache.labels("train").tolist() == [0, 2, 4, 6, 8]
    latents = cache.latents("train", np.array([4, 0]))
    assert latents.dtype == np.float32
    assert (latents[1, 0].tolist(), latents[0, 3].tolist()) == (first, last)
    assert cache.split("train").fingerprint() == fingerprint
    data = LatentShards(str(BEFORE / dtype), num_classes=10, batch_size=5, loading=Loading(num_workers=0))
    (batch,) = data.evaluation_dataloader("train")
    np.testing.assert_array_equal(batch["latents"].float().numpy()[[4, 0]], latents)


def test_samples_are_copied_by_split_index_and_variant() -> None:
    split = LatentCache(BEFORE / "float16").split("train")
    whole = np.concatenate([split.mapped(0), split.mapped(1)])
    assert whole.shape == (5, 2, 4, 3)
    latents = split.empty(4)
    split.copy(np.array([3, -1, 0, 3]), np.array([1, 1, 0, 0]), latents)
    raw = latents.view(torch.int16).numpy()
    np.testing.assert_array_equal(raw, np.stack([whole[3, 1], np.zeros((4, 3)), whole[0, 0], whole[3, 0]]))


def test_a_shard_records_identity_source_and_moments(written: Path) -> None:
    metadata = read_metadata(shard_path(written / "float16", "train", 1))
    assert metadata["source"] == "train-000001.tar"
    assert metadata["count"] == 2 * 2 * 4  # samples, variants, tokens
    assert metadata["identity"]["variants"] == ["original", "mirrored"]


def test_errors_name_the_file_and_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"train-000007\.safetensors is missing: run the same predict command"):
        read_metadata(shard_path(tmp_path, "train", 7))
    path = shard_path(tmp_path, "train", 0)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(ValueError, match=r"train-000000\.safetensors is damaged .*: remove it"):
        read_metadata(path)
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json: encode the data first"):
        LatentCache(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"schema_version": 2}))
    with pytest.raises(ValueError, match="is not a manifest of version 1"):
        LatentCache(tmp_path)
