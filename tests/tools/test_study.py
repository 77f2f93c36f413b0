"""The study's toy has the true velocity, answers need every seed, and complete runs are not repeated."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from maetok.analysis.gmm import MixtureFit
from maetok.analysis.modes import ModeAnalysis
from tests.support.helpers import colours_of
from tools.study import report as study_report
from tools.study.measures import COMPONENT_COUNTS, Measures, gaussian_loss
from tools.study.mixtures import GaussianMixture, true_error
from tools.study.runs import VARIANTS, Cell, Run


def test_velocity_of_one_gaussian_and_at_the_ends() -> None:
    mixture = GaussianMixture.random(5, 3.0, torch.Generator().manual_seed(0))
    assert torch.allclose(mixture.means.norm(dim=1), torch.tensor(3.0, dtype=torch.float64))
    x = torch.randn(7, 8, dtype=torch.float64)
    at_noise = mixture.velocity(x, torch.ones(7, dtype=torch.float64))  # x is the noise, and data is the mean of all
    torch.testing.assert_close(at_noise, x - mixture.means.mean(0))
    at_data = mixture.velocity(x, torch.zeros(7, dtype=torch.float64))  # x is the data, and noise has mean 0
    torch.testing.assert_close(at_data, -x)


def test_velocity_is_the_conditional_expectation() -> None:
    """The residual of noise - data is uncorrelated with every function of x_t."""
    rng = torch.Generator().manual_seed(0)
    mixture = GaussianMixture.random(3, 2.0, rng)
    count = 100_000
    data = mixture.sample(count, rng)
    noise = torch.randn(data.shape, generator=rng, dtype=torch.float64)
    for time in (0.2, 0.5, 0.8):
        t = torch.full((count,), time, dtype=torch.float64)
        x = (1 - time) * data + time * noise
        residual = noise - data - mixture.velocity(x, t)
        for test in (torch.ones_like(x), x, x.roll(1, dims=1), x.tanh(), x.square()):
            products = residual * test
            standard_error = products.std(0) / count**0.5
            assert (products.mean(0).abs() < 5 * standard_error).all()


def test_error_of_the_true_velocity_is_zero() -> None:
    rng = torch.Generator().manual_seed(0)
    mixture = GaussianMixture.random(4, 3.0, rng)

    def exact(x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return mixture.velocity(x.flatten(1).double(), t.double()).float().unflatten(1, x.shape[1:])

    assert true_error(exact, mixture, rng) < 1e-10
    shifted = true_error(lambda x, t, labels: exact(x, t, labels) + 0.5, mixture, rng)
    assert shifted == pytest.approx(0.25, rel=1e-4)


def test_loss_of_normal_latents() -> None:
    """With equal variances the loss is the mean of 1 / ((1 - t)^2 + t^2); with unequal ones it is less."""
    rng = np.random.default_rng(0)
    times = (np.arange(10) + 0.5) / 10
    white = rng.standard_normal((200_000, 2, 2))
    assert gaussian_loss(white) == pytest.approx(np.mean(1 / ((1 - times) ** 2 + times**2)), rel=1e-3)
    one = np.repeat(rng.standard_normal((1000, 1, 1)), 4, axis=1)  # variances 4, 0, 0, 0
    assert gaussian_loss(one) == pytest.approx(np.mean(4 / ((1 - times) ** 2 * 4 + times**2)) / 4, rel=1e-3)


def measures(variant: str, seed: int, probe: float, distance: float = 100.0) -> Measures:
    fits = tuple(MixtureFit(k, 10.0 + seed, 11.0 + seed, 100.0 * k, 2.0, 0.1, True, 5) for k in COMPONENT_COUNTS)
    modes = ModeAnalysis("x", 100, 10, 4, 0.9, 0.0, "full", fits).to_dict()
    return Measures(
        variant, seed, 20.0, 21.0, 5.0, 4.0, probe, probe, probe, modes,
        [250, 500], [0.9, 0.5 + seed], 0.4, distance, distance,
    )  # fmt: skip


def test_an_answer_needs_every_seed() -> None:
    probe = study_report.QUESTIONS["Is the linear probe higher?"]
    loss = study_report.QUESTIONS["Is the diffusion loss lower?"]
    masked = [measures("mask_hog", seed, 0.9 + seed / 100) for seed in (0, 1)]
    assert study_report.verdict(probe, masked, [measures("ae", 0, 0.89)]) == "yes"
    assert study_report.verdict(probe, masked, [measures("ae", 0, 0.905)]) == "within the spread"
    assert study_report.verdict(probe, masked, [measures("ae", 0, 0.92)]) == "no"
    assert study_report.verdict(loss, masked[:1], [measures("ae", 1, 0.9)]) == "yes"
    assert study_report.verdict(loss, masked[1:], [measures("ae", 0, 0.9)]) == "no"


def test_results_replace_what_stood_between_the_marks(tmp_path: Path) -> None:
    document = tmp_path / "study.md"
    document.write_text(f"before\n{study_report.BEGIN}\nold\n{study_report.END}\nafter\n")
    found = [measures(name, seed, 0.8 + 0.01 * place, 100 - place)
             for place, name in enumerate(VARIANTS) for seed in (0, 1)]  # fmt: skip
    study_report.write(found, document)
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| linear probe | 80.0% (80.0% ... 80.0%) | 81.0% (81.0% ... 81.0%) |" in text
    assert "| linear probe | -1.00 | 0.000 |" in text  # rank correlation with the FD of samples
    colours = colours_of(tmp_path / "study.png")
    for number in range(len(VARIANTS)):
        assert tuple(round(255 * part) for part in to_rgb(f"C{number}")) in colours  # a curve of each variant
    document.write_text("no marks")
    with pytest.raises(ValueError, match="lacks the lines"):
        study_report.write(found, document)


def test_a_cell_is_six_commands_on_its_own_folders(tmp_path: Path) -> None:
    runs = list(Cell(tmp_path, "kl_vae", 2).runs())
    assert [run.folder.name for run in runs] == ["tokenizer", "decoder", "latents", "sit", "samples", "samples_tuned"]
    assert [run.arguments[0] for run in runs] == ["fit", "fit", "predict", "fit", "predict", "predict"]
    for run in runs:
        assert run.folder.parent == tmp_path / "kl_vae" / "seed2"
        assert "--seed_everything=2" in run.arguments
        assert "--config=configs/study/variational.yaml" in run.arguments
    masked = list(Cell(tmp_path, "mask_hog", 2).runs())
    unmasked = "--model.init_args.mask_ratio=0.0"  # an encoder without masks gets a decoder without masks
    assert [unmasked in each[1].arguments for each in (runs, masked)] == [True, False]
    dropped = list(Cell(tmp_path, "mask_hog_drop", 2).runs())
    assert all("--config=configs/study/plain_drop.yaml" in run.arguments for run in dropped)
    assert not any("variational" in argument for run in Cell(tmp_path, "ae", 2).runs() for argument in run.arguments)


def test_a_run_is_done_once_and_its_failure_is_shown(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", ("no_such_subcommand",))
    with pytest.raises(RuntimeError, match="no_such_subcommand"):
        run.execute(threads=1)
    assert not run.done.exists()
    run.done.write_text("")
    replace(run).execute(threads=1)  # would fail if it ran
