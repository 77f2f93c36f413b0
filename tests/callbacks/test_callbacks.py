"""Callbacks against what they should have measured, drawn or written, computed here by hand."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from callbacks import LinearProbe, ReconstructionMetrics, ResumableCheckpoint, StepProgressBar
from maetok.metrics import reconstruction_metrics, to_unit_range
from tests.support.fakes import Task, validating
from tests.support.helpers import run_subprocess
from tools.compare_runs import main as compare_runs
from tools.compare_runs import table


def test_reconstruction_metrics_count_every_valid_sample_once() -> None:
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    task, callback = Task(), ReconstructionMetrics()
    callback.on_validation_epoch_start(None, task)
    for start in (0, 3):
        part = torch.zeros(3, 3, 16, 16)
        part[: len(images[start : start + 3])] = images[start : start + 3]
        valid = torch.arange(start, start + 3) < 5
        callback.on_validation_batch_end(None, task, None, {"images": part, "valid": valid}, 0)
    nothing = {"images": torch.zeros(3, 3, 16, 16), "valid": torch.zeros(3, dtype=torch.bool)}
    callback.on_validation_batch_end(None, task, None, nothing, 2)
    callback.on_validation_epoch_end(None, task)
    original, found = (images + 1) / 2, (images * 0.5 + 1) / 2
    psnr = (-10 * torch.log10((original - found).square().mean((1, 2, 3)))).mean()
    assert task.logged["validation/psnr"] == pytest.approx(psnr.item(), abs=1e-4)
    assert task.logged["validation/l1"] == pytest.approx((original - found).abs().mean().item(), abs=1e-6)
    callback.on_validation_epoch_start(None, task)  # starts from zero
    callback.on_validation_batch_end(None, task, None, {"images": images, "valid": torch.ones(5).bool()}, 0)
    callback.on_validation_epoch_end(None, task)
    assert task.logged["validation/psnr"] == pytest.approx(psnr.item(), abs=1e-4)


PROGRAM = """
import sys
import torch.multiprocessing
from tests.callbacks.test_callbacks import two_processes
if __name__ == "__main__":
    torch.multiprocessing.spawn(two_processes, (sys.argv[1],), nprocs=2)
"""


def two_processes(rank: int, folder: str) -> None:
    """Only the first one gets images."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    metrics = reconstruction_metrics()
    if rank == 0:
        images = torch.rand(3, 3, 16, 16)
        metrics.update(images / 2, images)
    found = {name: float(value) for name, value in metrics.compute().items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


def test_a_process_without_images_gets_the_numbers_of_the_others(tmp_path: Path) -> None:
    run_subprocess(PROGRAM, tmp_path, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert 10 < first["psnr"] < 12.5  # half of a uniform number is 0.29 off: 10.8 dB
    assert first["l1"] == pytest.approx(0.25, abs=0.02)


def test_perfect_and_out_of_range_reconstructions() -> None:
    metrics = reconstruction_metrics()
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    metrics.update(to_unit_range(images), to_unit_range(images))
    values = metrics.compute()
    assert values["ssim"] == pytest.approx(1.0, abs=1e-5)
    assert values["l1"] == 0
    torch.testing.assert_close(
        to_unit_range(torch.tensor([-3.0, -1.0, 0.0, 1.0, 9.0])), torch.tensor([0, 0, 0.5, 1, 1])
    )


@pytest.mark.parametrize(("function", "step", "every", "expected"), [
    ("validate", 0, 0, [1, 1]),
    ("fit", 5, 0, [0, 0]),
    ("fit", 10, 0, [1, 1]),
    ("fit", 5, 2, [0, 0]),
    ("fit", 4, 2, [1, 1]),
])  # fmt: skip
def test_linear_probe_runs_when_it_should(function: str, step: int, every: int, expected: list[int]) -> None:
    images = torch.randn(40, 3, 4, 4)
    labels = (images[:, 0, 0, 0] > 0).long()
    labels[30:] = 1 - labels[30:]  # padding, with labels that would mislead
    earlier = {"validation/linear_probe": 0.5, "validation/knn": 0.5, "validation/psnr": 20.0}
    trainer = validating(
        images, labels, padding=10, state=SimpleNamespace(fn=function), global_step=step, callback_metrics=earlier
    )
    callback, runs = LinearProbe(every_n_steps=every), []
    for _ in range(2):
        task = Task()
        callback.on_validation_epoch_end(trainer, task)
        runs.append(int(bool(task.logged)))
        if task.logged:
            linear_probe = task.logged["validation/linear_probe"]
            assert linear_probe > 0.9
            assert 0.65 < task.logged["validation/linear_probe_low"] < linear_probe
            assert task.logged["validation/linear_probe_high"] >= linear_probe
            assert 0.5 < task.logged["validation/linear_probe_pooled"] < linear_probe  # the corner is one token of four
            assert 0.5 < task.logged["validation/knn"] < linear_probe  # and one of twelve values
        else:
            assert list(trainer.callback_metrics) == ["validation/psnr"]  # no accuracy of an earlier validation
    assert runs == expected


def test_checkpoints_are_saved_at_multiples_and_at_the_end_and_old_ones_go(tmp_path: Path) -> None:
    trainer = SimpleNamespace(
        global_step=0, default_root_dir=tmp_path, is_global_zero=True, strategy=SimpleNamespace(barrier=lambda: None),
        save_checkpoint=lambda path: Path(path).write_bytes(b"state"),
    )  # fmt: skip
    (tmp_path / "checkpoints").mkdir()
    callback = ResumableCheckpoint(every_n_steps=2, keep_last=2)
    callback.on_train_start(trainer, None)
    history = []
    for micro_batch in range(14):  # two micro-batches per step
        trainer.global_step = (micro_batch + 1) // 2
        callback.on_train_batch_end(trainer, None)
        history.append([path.name[5:14] for path in sorted((tmp_path / "checkpoints").iterdir())])
    assert history[2] == []
    assert history[3] == ["000000002"]
    assert history[-1] == ["000000004", "000000006"]
    callback.on_train_end(trainer, None)
    with pytest.raises(ValueError, match="keep_best=1 and monitor=None need each other"):
        ResumableCheckpoint(keep_best=1)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "step=000000006.ckpt",
        "step=000000007.ckpt",
    ]


def test_progress_bar_knows_the_length_of_the_run() -> None:
    bar = StepProgressBar()
    bar._trainer = SimpleNamespace(max_steps=10, lightning_module=SimpleNamespace(accumulate_grad_batches=3))
    assert bar.total_train_batches == 30
    bar._trainer.max_steps = -1
    assert bar.total_train_batches == float("inf")


def test_progress_bar_shows_loss_and_speed_without_having_them_read_in_every_step() -> None:
    bar = StepProgressBar()
    known = {"train/loss": torch.tensor(0.25), "throughput/images_per_second": torch.tensor(80.0), "step": 3}
    trainer = SimpleNamespace(loggers=[], progress_bar_metrics={"validation/x": 2.0}, callback_metrics=known)
    assert bar.get_metrics(trainer, None) == {"validation/x": 2.0, "loss": 0.25, "images/s": 80.0}
    trainer.callback_metrics = {}
    assert bar.get_metrics(trainer, None) == {"validation/x": 2.0}


def test_table_and_paths_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, psnr in (("first", 20.0), ("second", 21.5)):
        (tmp_path / name / "pictures").mkdir(parents=True)
        (tmp_path / name / "pictures" / "step=000000700.png").touch()
        records = [
            {"step": 1, "minutes": 0.1, "validation/psnr": 1.0},
            {"step": 7, "minutes": 2.0, "validation/psnr": psnr},
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    lines = table([tmp_path / "first", tmp_path / "second"]).splitlines()
    assert lines[0].split() == ["first", "second"]
    assert lines[1].split() == ["PSNR", "(dB)", "20.00", "21.50"]
    assert lines[4].split() == ["FD", "-", "-"]
    assert lines[5].split() == ["linear", "probe", "-", "-"]
    compare_runs([str(tmp_path / "first"), str(tmp_path / "second")])
    output = capsys.readouterr().out
    assert f"tensorboard --logdir {tmp_path}" in output
    assert str(tmp_path / "second" / "pictures" / "step=000000700.png") in output
