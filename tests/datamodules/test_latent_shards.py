"""Latents are read as they were written, in an exact order, and only for the tokenizer that encoded them."""

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from datamodules import LatentShards, Loading
from datamodules.shards import ShardError
from tests.support.latents import MeanColours, write_cache
from tests.support.shards import write_shards


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_shards(folder / "shards", [7, 5, 8])
    write_shards(folder / "shards", [5], split="validation")
    for dtype in ("float16", "bfloat16", "float32"):
        write_cache(folder / "shards", folder / dtype, dtype=dtype)
    write_cache(folder / "shards", folder / "single", MeanColours(mirrored=False))
    return folder


def latent_shards(cache: Path, workers: int = 0, stage: str | None = "fit", rank: int = 0, world: int = 1, **options):
    defaults = {"num_classes": 10, "batch_size": 6, "loading": Loading(num_workers=workers)}
    data = LatentShards(str(cache), **(defaults | options))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world, lightning_module=None)
    if stage:
        data.setup(stage)
    return data


def stored(cache: Path, split: str = "train") -> torch.Tensor:
    parts = []
    for path in sorted(cache.glob(f"{split}-*.safetensors")):
        with safe_open(path, "pt") as file:
            parts.append(file.get_tensor("latents"))
    return torch.cat(parts)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_gives_every_latent_once_bit_for_bit(cache: Path, dtype: str, workers: int) -> None:
    batches = [
        batch
        for rank in range(2)
        for batch in latent_shards(cache / dtype, workers, rank=rank, world=2).val_dataloader()
    ]
    indices = torch.cat([batch["indices"] for batch in batches])
    latents = torch.cat([batch["latents"] for batch in batches])
    assert sorted(indices[indices >= 0].tolist()) == list(range(5))
    assert latents.dtype == getattr(torch, dtype)
    assert torch.equal(latents[indices >= 0], stored(cache / dtype, "validation")[indices[indices >= 0], 0])
    assert not latents[indices < 0].any()


@pytest.mark.parametrize("workers", [0, 1, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_order_is_exact_for_any_number_of_processes_and_workers(
    cache: Path, world_size: int, workers: int
) -> None:
    whole = list(islice(latent_shards(cache / "float16").train_dataloader(), 10))
    per_rank = []
    for rank in range(world_size):
        data = latent_shards(cache / "float16", workers, rank=rank, world=world_size)
        data.position = 18
        per_rank.append(list(islice(data.train_dataloader(), 7)))
    for expected, parts in zip(whole[3:], zip(*per_rank, strict=True), strict=True):
        for rank, part in enumerate(parts):
            for name in ("latents", "labels", "indices"):
                assert torch.equal(part[name], expected[name][rank::world_size])
    seen = torch.cat([batch["indices"] for batch in whole])
    assert sorted(seen[:20].tolist()) == list(range(20))
    assert sorted(seen[20:40].tolist()) == list(range(20))


def test_variants_are_drawn_anew_in_every_epoch(cache: Path) -> None:
    latents = stored(cache / "float16")
    drawn: dict[int, list[int]] = {index: [] for index in range(20)}
    for batch in islice(latent_shards(cache / "float16", batch_size=20).train_dataloader(), 100):
        for index, latent in zip(batch["indices"].tolist(), batch["latents"], strict=True):
            matches = [torch.equal(latent, latents[index, variant]) for variant in (0, 1)]
            assert sum(matches) == 1
            drawn[index].append(matches.index(True))
    shares = [sum(variants) / 100 for variants in drawn.values()]
    assert all(0.3 < share < 0.7 for share in shares)  # four standard deviations
    assert len({tuple(variants) for variants in drawn.values()}) == 20
    again = next(iter(latent_shards(cache / "float16", batch_size=20, seed=1).train_dataloader()))
    assert len(again["indices"]) == 20
    for batch in islice(latent_shards(cache / "single").train_dataloader(), 10):
        assert torch.equal(batch["latents"], stored(cache / "single")[batch["indices"], 0])


def test_state_refuses_another_cache(cache: Path) -> None:
    state = latent_shards(cache / "float16").state_dict() | {"position": 6}
    same = latent_shards(cache / "float16")
    same.trainer.state = SimpleNamespace(fn="fit")
    same.load_state_dict(state)
    assert same.position == 6
    other = latent_shards(cache / "float32")
    other.trainer.state = SimpleNamespace(fn="fit")
    with pytest.raises(ShardError, match="fingerprint was"):
        other.load_state_dict(state)


def test_device_batches_are_float32(cache: Path) -> None:
    data = latent_shards(cache / "bfloat16")
    batch = next(iter(data.val_dataloader()))
    converted = data.on_after_batch_transfer(batch, 0)["latents"]
    assert converted.dtype == torch.float32
    assert torch.equal(converted, batch["latents"].float())


class TestRefusals:
    """A cache that does not suit the task is an error before any training."""

    def test_other_tokenizer(self, cache: Path) -> None:
        data = latent_shards(cache / "float16", stage=None)
        data.trainer.lightning_module = SimpleNamespace(tokenizer_hash="b" * 64)
        with pytest.raises(
            ShardError, match="was encoded by tokenizer aaaaaaaaaaaaaaaa, but the task has tokenizer bbbb"
        ):
            data.setup("fit")
        data.trainer.lightning_module = SimpleNamespace(tokenizer_hash="a" * 64)
        data.setup("fit")

    def test_unfinished(self, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match=r"has no manifest\.json: encode the data first"):
            latent_shards(tmp_path)

    def test_missing_truncated_or_replaced_shard(self, cache: Path, tmp_path: Path) -> None:
        for path in (cache / "float16").iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        path = tmp_path / "train-000001.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[:-10])
        with pytest.raises(ShardError, match=r"train-000001\.safetensors cannot be read"):
            latent_shards(tmp_path)
        save_file({"latents": torch.zeros(5, 2, 4, 4), "labels": torch.zeros(5, dtype=torch.int64)}, path)
        with pytest.raises(ShardError, match=r"shape \[5, 2, 4, 4\], but manifest\.json says \[5, 2, 4, 3\]"):
            latent_shards(tmp_path)
        path.unlink()
        with pytest.raises(ShardError, match=r"train-000001\.safetensors cannot be read"):
            latent_shards(tmp_path)

    def test_labels_out_of_range_and_other_versions(self, cache: Path, tmp_path: Path) -> None:
        with pytest.raises(ShardError, match=r"train labels range from 0 to 9, outside 0 \.\.\. 4: wrong num_classes"):
            latent_shards(cache / "float16", num_classes=5)
        manifest = json.loads((cache / "float16" / "manifest.json").read_text())
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"schema_version": 2}))
        with pytest.raises(ShardError, match="not a manifest of version 1"):
            latent_shards(tmp_path)


def test_mean_and_std_are_at_hand(cache: Path) -> None:
    index = latent_shards(cache / "float32").index("train")
    values = stored(cache / "float32").double().reshape(-1, 3)
    torch.testing.assert_close(torch.from_numpy(index.mean), values.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.from_numpy(index.std), values.std(0, correction=0), rtol=1e-13, atol=0)
