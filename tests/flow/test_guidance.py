"""Guidance: which rows the denoiser is asked for, and what comes of them."""

import pytest
import torch
from torch import Tensor, nn

from maetok.flow import Autoguidance, Euler, GuidedVelocity, Heun, sample

LABELS = torch.tensor([0, 1, 2])
NULL = 5


class Counting(nn.Module):
    """A denoiser that remembers how it was called; its velocity tells labels and times apart."""

    def __init__(self, factor: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor, dtype=dtype))
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls.append((x, t, labels))
        return (self.factor * torch.cos(x + labels[:, None, None]) + t[:, None, None]).to(x.dtype)

    def without_condition(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, NULL)

    @property
    def rows(self) -> list[int]:
        return [len(x) for x, _, _ in self.calls]


def state() -> Tensor:
    return torch.randn(3, 4, 2, dtype=torch.float64)


def test_formula_on_all_channels_in_one_call() -> None:
    x, denoiser = state(), Counting()
    times = torch.full((3,), 0.5)
    null = denoiser(x.float(), times, torch.full((3,), NULL)).double()
    labelled = denoiser(x.float(), times, LABELS).double()
    denoiser.calls.clear()
    guided = GuidedVelocity(denoiser, LABELS, 2.5, null_condition=NULL)(x, 0.5)
    torch.testing.assert_close(guided, null + 2.5 * (labelled - null), atol=1e-6, rtol=0)
    assert guided.dtype == torch.float64
    (seen, t, labels), *others = denoiser.calls
    assert not others
    assert seen.shape == (6, 4, 2)
    assert torch.equal(t, torch.full((6,), 0.5))
    assert labels.tolist() == [0, 1, 2, NULL, NULL, NULL]


def test_conditions_of_any_structure_are_passed_on_unread() -> None:
    seen = []

    def denoiser(x: Tensor, t: Tensor, condition: dict) -> Tensor:
        seen.append(condition)
        return x

    text, length = torch.randn(3, 4, 2), torch.tensor([4, 2, 3])
    condition, null = {"text": text, "more": (length,)}, {"text": torch.zeros(3, 4, 2), "more": (0,)}
    GuidedVelocity(denoiser, condition, 2.0, null_condition=null)(state(), 0.5)
    assert torch.equal(seen[0]["text"], torch.cat((text, torch.zeros(3, 4, 2))))
    assert seen[0]["more"][0].tolist() == [4, 2, 3, 0, 0, 0]
    GuidedVelocity(denoiser, None)(state(), 0.5)
    assert seen[1] is None


def test_interval_includes_its_ends() -> None:
    denoiser = Counting()
    velocity = GuidedVelocity(denoiser, LABELS, 2.0, (0.25, 0.75), NULL)
    for t in (1.0, 0.7500001, 0.75, 0.5, 0.25, 0.2499999, 0.0):
        velocity(state(), t)
    assert denoiser.rows == [3, 3, 6, 6, 6, 3, 3]
    assert velocity.breaks == (0.75, 0.25)
    assert GuidedVelocity(denoiser, LABELS, 2.0, (0.0, 0.75), NULL).breaks == (0.75,)
    assert GuidedVelocity(denoiser, LABELS, 2.0, (0.25, 0.25), NULL).breaks == (0.25,)  # one moment: one jump
    assert GuidedVelocity(denoiser, LABELS, 1.0, (0.25, 0.75)).breaks == ()


def test_scale_one_is_the_plain_velocity_and_costs_one_row_per_sample() -> None:
    x, denoiser = state(), Counting()
    unguided = GuidedVelocity(denoiser, LABELS)(x, 0.4)
    assert denoiser.rows == [3]
    torch.testing.assert_close(unguided, denoiser(x.float(), torch.full((3,), 0.4), LABELS).double())
    both = GuidedVelocity(denoiser, LABELS, 1.0 + 1e-9, null_condition=NULL)(x, 0.4)
    torch.testing.assert_close(both, unguided, atol=1e-6, rtol=0)


def test_rows_of_whole_runs() -> None:
    """Published grids of 8 steps with guidance in [0.1, 0.8] (tests/data/README.md)."""
    noise = torch.randn(3, 4, 2)
    settings = {"guidance_scale": 2.5, "guidance_interval": (0.1, 0.8)}
    for solver, rows in ((Euler(8), [3, 3] + 6 * [6]), (Heun(8), 4 * [3] + 11 * [6])):
        denoiser = Counting()
        sample(denoiser, LABELS, noise, solver, **settings)
        assert denoiser.rows == rows
        denoiser = Counting()
        sample(denoiser, LABELS, noise, solver, guidance_interval=(0.1, 0.8))
        assert denoiser.rows == len(rows) * [3]


def test_autoguidance() -> None:
    x, denoiser, guide = state(), Counting(1.0), Counting(0.7, torch.bfloat16)
    velocity = Autoguidance(denoiser, guide, LABELS, 2.0, (0.0, 0.75))
    guided = velocity(x, 0.5)
    assert (denoiser.rows, guide.rows) == ([3], [3])
    assert guide.calls[0][0].dtype == torch.bfloat16
    assert guide.calls[0][1].dtype == torch.float32  # times keep their precision
    times = torch.full((3,), 0.5)
    good = denoiser(x.float(), times, LABELS).double()
    bad = guide(x.bfloat16(), times, LABELS).double()
    torch.testing.assert_close(guided, bad + 2.0 * (good - bad))
    velocity(x, 0.9)
    assert (len(denoiser.calls), len(guide.calls)) == (3, 2)  # each with the call of the test above


def test_denoiser_is_called_in_its_own_dtype() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        denoiser = Counting(dtype=dtype)
        assert GuidedVelocity(denoiser, LABELS)(state(), 0.5).dtype == torch.float64
        assert denoiser.calls[0][0].dtype == dtype
    seen = []

    def plain(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append(x.dtype)
        return x

    GuidedVelocity(plain, LABELS)(state(), 0.5)
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": 0.5}, "guidance_scale=0.5"),
        ({"scale": float("nan")}, "guidance_scale=nan"),
        ({"interval": (0.5, 0.2)}, "guidance_interval"),
        ({"interval": (0.0, 1.2)}, "guidance_interval"),
        ({"scale": 2.0, "null_condition": None}, "null condition"),
    ],
)
def test_wrong_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GuidedVelocity(**{"denoiser": Counting(), "condition": LABELS, "null_condition": NULL} | settings)
