"""The latent cache holds the latents of every sample exactly once, also after interruptions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from datamodules.faults import TooManyFaultsError
from datamodules.shards import file_sha256
from tests.support.helpers import run_subprocess
from tests.support.latents import MeanColours, write_cache
from tests.support.shards import encoded, image_shards, write_shards, write_tar


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", [5, 3, 4])
    write_shards(tmp_path / "shards", [3], split="validation")
    return tmp_path / "shards"


def contents(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no iterator
    return found | {"keys": json.loads(bytes(found["keys"].tolist()))}


def expected(shards: Path, split: str) -> tuple[torch.Tensor, list[int]]:
    data = image_shards(shards, batch_size=20)
    batch = data.on_after_batch_transfer(next(iter(data.evaluation_dataloader(split))), 0)
    return MeanColours().predict_step(batch, 0), batch["labels"][batch["valid"]].tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_cache_holds_every_sample_with_label_key_and_both_variants(shards: Path, tmp_path: Path, dtype: str) -> None:
    write_cache(shards, tmp_path / "cache", dtype=dtype)
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert (manifest["dtype"], manifest["latent_shape"]) == (dtype, [4, 3])
    assert manifest["tokenizer_hash"] == "a" * 64
    assert manifest["transform"]["image_size"] == [8, 8]
    for split, files in (("train", 3), ("validation", 1)):
        parts = [contents(tmp_path / "cache" / shard["file"]) for shard in manifest["splits"][split]["shards"]]
        assert len(parts) == files
        latents = torch.cat([part["latents"] for part in parts])
        images, labels = expected(shards, split)
        assert torch.equal(latents, images.to(getattr(torch, dtype)))
        assert torch.cat([part["labels"] for part in parts]).tolist() == labels
        assert torch.cat([part["indices"] for part in parts]).tolist() == list(range(len(labels)))
        keys = [key for part in parts for key in part["keys"]]
        assert keys == [f"{number:04d}" for number in range(len(labels))]
        values = latents.double().numpy().reshape(-1, 3)
        np.testing.assert_allclose(manifest["splits"][split]["mean"], values.mean(0), rtol=1e-13)
        np.testing.assert_allclose(manifest["splits"][split]["std"], values.std(0), rtol=1e-13)
        assert manifest["splits"][split]["samples"] == len(labels)


def test_an_interrupted_run_writes_only_what_is_missing_and_ends_up_the_same(shards: Path, tmp_path: Path) -> None:
    write_cache(shards, tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match=r"train-000002\.safetensors is missing: run the same predict command"):
        write_cache(shards, tmp_path / "cache", trainer={"limit_predict_batches": 6})  # ends in the third shard
    names = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert names == ["train-000000.safetensors", "train-000001.safetensors", "validation-000000.safetensors"]
    (tmp_path / "cache" / ".train-000002.safetensors.partial").write_bytes(b"torn")
    times = {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in names}
    write_cache(shards, tmp_path / "cache")
    assert {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in names} == times
    for path in (tmp_path / "whole").iterdir():
        assert file_sha256(tmp_path / "cache" / path.name) == file_sha256(path), path.name
    (tmp_path / "cache" / "manifest.json").unlink()
    write_cache(shards, tmp_path / "cache")  # nothing to encode
    assert file_sha256(tmp_path / "cache" / "manifest.json") == file_sha256(tmp_path / "whole" / "manifest.json")


def test_another_tokenizer_is_refused_or_replaces_everything(shards: Path, tmp_path: Path) -> None:
    write_cache(shards, tmp_path / "cache")
    other = MeanColours(tokenizer_hash="b" * 64, factor=2.0)
    with pytest.raises(FileExistsError, match="holds latents of another tokenizer, data set, transform or dtype"):
        write_cache(shards, tmp_path / "cache", other)
    with pytest.raises(FileExistsError, match="another"):
        write_cache(shards, tmp_path / "cache", dtype="float32")
    write_cache(shards, tmp_path / "cache", other, overwrite=True)
    latents = contents(tmp_path / "cache" / "train-000000.safetensors")["latents"]
    assert torch.equal(latents, (2 * expected(shards, "train")[0][:5]).half())


def test_an_interrupted_replacement_cannot_be_taken_for_a_cache(shards: Path, tmp_path: Path) -> None:
    write_cache(shards, tmp_path / "cache")
    other = MeanColours(tokenizer_hash="b" * 64, factor=2.0)
    with pytest.raises(FileNotFoundError, match=r"train-000001\.safetensors is missing"):
        write_cache(shards, tmp_path / "cache", other, {"limit_predict_batches": 3}, overwrite=True)
    assert not (tmp_path / "cache" / "manifest.json").exists()  # the old one would tell the other tokenizer
    write_cache(shards, tmp_path / "cache", other, overwrite=True)
    latents = [contents(tmp_path / "cache" / f"train-{shard:06d}.safetensors")["latents"] for shard in range(3)]
    assert torch.equal(torch.cat(latents), (2 * expected(shards, "train")[0]).half())


def test_latents_that_do_not_fit_are_an_error(shards: Path, tmp_path: Path) -> None:
    with pytest.raises(OverflowError, match=r"cannot be stored as LatentWriter\.dtype=float16: use bfloat16"):
        write_cache(shards, tmp_path / "cache", MeanColours(factor=1e6))
    assert not list((tmp_path / "cache").iterdir())


def test_broken_images_are_left_out(shards: Path, tmp_path: Path) -> None:
    members = []
    for number in range(4):
        image = b"broken" if number in (0, 1, 3) else encoded((10, 12), seed=number)  # a whole batch among them
        members += [(f"x{number}.png", image), (f"x{number}.cls", b"%d" % number)]
    write_tar(shards / "validation-000009.tar", members)
    write_shards(shards, [20], split="train")  # so that three broken ones are not too many
    for path in shards.glob("train-00000[12].tar"):
        path.unlink()
    write_cache(shards, tmp_path / "cache")
    found = contents(tmp_path / "cache" / "validation-000001.safetensors")
    assert (found["labels"].tolist(), found["keys"], found["indices"].tolist()) == ([2], ["x2"], [5])
    assert found["latents"].shape == (1, 2, 4, 3)
    assert (tmp_path / "data_faults.jsonl").read_text().count("corrupt_image") == 3


def test_a_shard_of_broken_images_only_adds_nothing(shards: Path, tmp_path: Path) -> None:
    write_cache(shards, tmp_path / "without")
    write_tar(shards / "train-000009.tar", [("x.png", b"broken"), ("x.cls", b"1")])
    write_cache(shards, tmp_path / "cache")
    splits, expected_splits = (
        json.loads((tmp_path / name / "manifest.json").read_text())["splits"]["train"] for name in ("cache", "without")
    )
    assert [shard["samples"] for shard in splits["shards"]] == [5, 3, 4, 0]
    assert {name: splits[name] for name in ("mean", "std")} == {name: expected_splits[name] for name in ("mean", "std")}


def test_too_many_broken_images_are_too_many_in_the_next_run_as_well(shards: Path, tmp_path: Path) -> None:
    members = [(f"x{number}{end}", data) for number in range(6) for end, data in ((".png", b"broken"), (".cls", b"1"))]
    write_tar(shards / "train-000009.tar", members)
    with pytest.raises(TooManyFaultsError, match="6 broken samples"):
        write_cache(shards, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"6 of 21 samples are broken and left out, more than .*max_fault_rate=0\.2"):
        write_cache(shards, tmp_path / "cache")  # which has nothing to encode any more
    assert not (tmp_path / "cache" / "manifest.json").exists()


PROGRAM = """
import sys
from pathlib import Path
from tests.support.latents import write_cache
write_cache(Path(sys.argv[1]), Path(sys.argv[2]), trainer={"devices": 2, "strategy": "ddp"})
"""


def test_two_processes_write_the_files_of_one(shards: Path, tmp_path: Path) -> None:
    """The second process has no shard of the validation split."""
    write_cache(shards, tmp_path / "one")
    run_subprocess(PROGRAM, tmp_path, str(shards), str(tmp_path / "two"))
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        assert file_sha256(tmp_path / "two" / name) == file_sha256(tmp_path / "one" / name)
