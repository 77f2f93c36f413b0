"""``clocks`` times functions, and ``shares`` turns the times into shares of a step."""

from types import SimpleNamespace

import pytest

from benchmarks.speed import overhead
from benchmarks.speed.overhead import Clocks, clocks, shares
from maetok.training.step_guard import StepGuard


def test_shares_leave_out_the_loader_and_add_up() -> None:
    seconds = {"whole": 13.0, "loader": 2.0, "preparation": 1.0, "training_step": 9.75}
    found = shares(seconds | {"moving_average": 0.1, "gradient_norm": 0.05, "logging_calls": 0.01})
    assert found["step_cpu_seconds"] == 10.0
    assert found["callbacks_and_loop_share"] == pytest.approx(0.025)
    assert found["moving_average_share"] == pytest.approx(0.01)
    assert found["overhead_share"] == pytest.approx(0.025 + 0.01 + 0.005 + 0.001)


def test_clocks_add_up_calls_and_are_taken_away_again(monkeypatch: pytest.MonkeyPatch) -> None:
    original, now = StepGuard.note_loss, [0.0]

    def slow(*_: object) -> None:
        now[0] += 1.5

    monkeypatch.setattr(StepGuard, "note_loss", slow)
    monkeypatch.setattr(overhead, "time", SimpleNamespace(process_time=lambda: now[0]))
    with clocks():
        StepGuard().note_loss(0, None)
        StepGuard().note_loss(1, None)
    assert Clocks.seconds == {"gradient_norm": 3.0}
    assert StepGuard.note_loss is slow
    monkeypatch.undo()
    assert StepGuard.note_loss is original
