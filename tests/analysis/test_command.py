"""The command on small caches gives the results of its parts, and reads caches correctly."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules import LatentShards, Loading
from maetok.analysis.command import compare_modes, load, main, short_names
from maetok.analysis.modes import analyse_modes, read_json
from maetok.analysis.projection import PrincipalComponents
from maetok.analysis.subsets import class_balanced
from maetok.formats.latent_cache import LatentCache
from tests.support.latents import MeanColours, write_cache
from tests.support.shards import write_shards


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Encode 60 training and 30 validation images of 3 classes with two tokenizers that differ by a factor."""
    root = tmp_path_factory.mktemp("analysis")
    write_shards(root / "shards", [25, 20, 15], classes=3)
    write_shards(root / "shards", [30], split="validation", classes=3)
    paths = [root / "first" / "latents", root / "second" / "latents"]
    for path, factor in zip(paths, (1.0, 8.0), strict=True):
        write_cache(root / "shards", path, MeanColours(factor=factor), dtype="float16")
    return paths


def test_reader_gives_the_latents_that_training_reads(caches: list[Path]) -> None:
    data = LatentShards(str(caches[0]), num_classes=3, batch_size=60, loading=Loading(num_workers=0))
    batch = next(iter(data.evaluation_dataloader("train")))
    positions = np.array([0, 3, 24, 25, 44, 59])
    cache = LatentCache(caches[0])
    latents = cache.latents("train", positions)
    assert latents.dtype == np.float32
    np.testing.assert_array_equal(latents, batch["latents"].float().numpy()[positions])
    assert cache.labels("train").tolist() == batch["labels"].tolist()
    assert np.bincount(cache.labels("train")).tolist() == [20, 20, 20]


def test_command_writes_what_analysis_by_hand_gives(
    caches: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--dimensions=3", "--per-class=15", "--restarts=2", "--seed=5", "--covariance=diag"]
    main([*map(str, caches), f"--output={tmp_path}", "--components", "1", "2", "4", *options])
    analyses = read_json(tmp_path / "modes.json")
    assert [analysis.name for analysis in analyses] == ["first", "second"]
    cache = LatentCache(caches[0])
    chosen = {split: class_balanced(cache.labels(split), 15, 5) for split in ("train", "validation")}
    latents = [cache.latents(split, positions) for split, positions in chosen.items()]
    by_hand = analyse_modes("first", *latents, [1, 2, 4], 3, covariance_type="diag", restarts=2, seed=5)
    assert analyses[0] == by_hand
    assert (analyses[0].samples, analyses[0].held_out_samples) == (45, 30)
    for one, other in zip(analyses[0].fits, analyses[1].fits, strict=True):
        assert other.nll_held_out == pytest.approx(one.nll_held_out, rel=1e-4)  # standardising removes the factor
    assert analyses[1].log_scale - analyses[0].log_scale == pytest.approx(3 * np.log(8), rel=1e-4)
    printed = capsys.readouterr().out
    assert "second: 45 latents in 3 dimensions" in printed
    with (tmp_path / "modes.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    assert Image.open(tmp_path / "modes.png").size == (768, 504)


def test_dimensions_are_those_of_the_tokenizer_that_needs_most(caches: list[Path]) -> None:
    latents = {str(path): load(LatentCache(path), 20, 0) for path in caches}
    first, second = latents.values()
    second.train[..., 1:] *= 0.01  # almost only one channel varies
    second.held_out[..., 1:] *= 0.01
    needed = [PrincipalComponents.fit(found.train).dimensions(0.9) for found in (first, second)]
    assert needed[0] > needed[1]
    analyses = compare_modes(latents, [2], None, 0.9, restarts=1)
    assert [analysis.dimensions for analysis in analyses] == [needed[0]] * 2
    assert all(analysis.explained_variance > 0.9 for analysis in analyses)


def test_a_part_of_the_training_latents_is_held_out_where_there_are_no_others(
    caches: list[Path], tmp_path: Path
) -> None:
    manifest = json.loads((caches[0] / "manifest.json").read_text())
    del manifest["splits"]["validation"]
    for path in caches[0].glob("train-*"):
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    found, whole = load(LatentCache(tmp_path), 10, 0), load(LatentCache(caches[0]), 10, 0)
    assert (len(found.train), len(found.held_out)) == (24, 6)
    assert np.bincount(np.concatenate([found.train_labels, found.held_out_labels])).tolist() == [10, 10, 10]
    both = np.concatenate([found.train, found.held_out]).reshape(30, -1)
    assert len(np.unique(both, axis=0)) == 30
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(whole.train.reshape(30, -1), axis=0))


def test_what_is_no_cache_is_refused(caches: list[Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json: encode the data first"):
        LatentCache(tmp_path)
    (tmp_path / "manifest.json").write_text((caches[0] / "manifest.json").read_text())
    with pytest.raises(ValueError, match=r"train-000000\.safetensors cannot be read .*: remove it and encode again"):
        LatentCache(tmp_path).labels("train")
    with pytest.raises(ValueError, match="has no samples of the split 'test'"):
        LatentCache(caches[0]).labels("test")
    (tmp_path / "manifest.json").write_text('{"schema_version": 9}')
    with pytest.raises(ValueError, match="is not a manifest of version 1"):
        LatentCache(tmp_path)
    with pytest.raises(SystemExit):
        main([*map(str, caches), "--names", "one", "one", "--output", str(tmp_path)])


@pytest.mark.parametrize(("paths", "names"), [
    (["runs/a/latents", "runs/b/latents"], ["a", "b"]),
    (["runs/a/0/latents", "runs/a/1/latents"], ["0", "1"]),
    (["runs/a/0/latents", "runs/b/1/latents"], ["a/0", "b/1"]),
    (["data/a_latents", "data/b_latents"], ["a_latents", "b_latents"]),
    (["runs/a/latents"], ["a/latents"]),
])  # fmt: skip
def test_names_are_what_tells_folders_apart(paths: list[str], names: list[str]) -> None:
    assert short_names([Path(path) for path in paths]) == names
