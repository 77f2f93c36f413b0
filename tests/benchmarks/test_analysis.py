"""The benchmark of the analysis writes a cache that the command reads, and reports its numbers."""

from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb

from benchmarks.analysis import (
    MIXTURES,
    WHOLE,
    case_name,
    draw,
    sample_counts,
    sections,
    synthetic_latents,
    write_cache,
)
from benchmarks.harness import Results
from maetok.analysis.command import load
from maetok.analysis.gmm import PAPER_COMPONENT_COUNTS
from maetok.formats.latent_cache import LatentCache
from tests.support.helpers import colours_of


def test_cache_holds_the_latents_as_many_of_each_class(tmp_path: Path) -> None:
    write_cache(tmp_path, 400)
    found = load(LatentCache(tmp_path), per_class=4, seed=0)
    assert found.train.shape == (400, 128, 32)
    assert found.held_out.shape == (40, 128, 32)
    latents, labels = synthetic_latents(400)
    assert np.bincount(labels).tolist() == [4] * 100
    np.testing.assert_array_equal(found.train_labels, labels)
    np.testing.assert_allclose(found.train, latents, rtol=1e-3, atol=1e-4)  # float16
    assert not np.isin(found.held_out[:, 0, 0], found.train[:40, 0, 0]).all()  # other samples of the same classes


def results(latents: int) -> Results:
    """Return numbers that reveal their source."""
    per_component = {str(count): count / 1000 for count in PAPER_COMPONENT_COUNTS}
    per_sample = {"projection": 5.0, **dict.fromkeys(MIXTURES, 0.5), "peak_mib": 1024.0}
    whole = {
        "seconds": 123.0, "cpu_seconds": 234.0, "peak_mib": 1536.0, "threads": 2, "samples": latents,
        "held_out_samples": latents // 10, "dimensions": 44, "explained_variance": 0.9042,
        **{f"iterations of {count}": count + 1 for count in PAPER_COMPONENT_COUNTS},
    }  # fmt: skip
    found = {case_name(count): [per_sample | {"projection": count / 100}] for count in sample_counts(latents)}
    return found | {name: [per_component] for name in MIXTURES} | {WHOLE: [whole]}


def test_report_and_plot_show_the_numbers(tmp_path: Path) -> None:
    text = "\n".join(sections(results(20_000), 20_000).values())
    assert "cache of 20,000 training latents of 4,096 values, 2,000 held out" in text
    assert "44 dimensions with 90.4% of the variance) and 2 threads took 123 seconds, 234 CPU-seconds" in text
    assert "and 1.50 GiB of memory at most. The best starts took 6, 11, 51, 101, 201, 301 iterations." in text
    assert "| 2,500 | 25 | 0.5 | 0.5 | 0.5 | 1024 |" in text
    assert "| full, 16 dimensions | 0.005 | 0.01 | 0.05 | 0.1 | 0.2 | 0.3 |" in text
    draw(results(20_000), 20_000, tmp_path / "plot.png")
    colours = colours_of(tmp_path / "plot.png")
    for number in range(len(MIXTURES) + 1):
        assert tuple(round(255 * part) for part in to_rgb(f"C{number}")) in colours  # mixtures and the projection
