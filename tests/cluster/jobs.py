"""Submit runs of the suite as jobs of a test cluster, and compare them."""

import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from tests.cluster.cluster import Cluster, wait_for
from tests.support.helpers import ROOT, curves, weights

OVERLAY = "fsdp"
"""Overlay with the strategy of every run of two processes."""
CONFIG = "configs/experiment/imagenet256_maetok_b128.yaml"
STEPS = 40
PATIENCE = 600
"""Longest time in seconds that a step of a test may take on a busy machine."""


class Pause(Callback):
    """Slows a new run down, so that a test can disturb it, and writes its step to a file; continued runs stay fast."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if not trainer.ckpt_path:
            if trainer.is_global_zero:
                (Path(trainer.default_root_dir) / "step").write_text(str(trainer.global_step))
            time.sleep(self.seconds)


class Job:
    """A run submitted by ``make submit``.

    Args:
        cluster: runs the job.
        name: name of the job and of its run directory.
        digits_root: folder of the packed digits.
        nodes: number of nodes.
        tasks: processes on each node; several share its processor.
        overlay: overlay with the strategy, used for several nodes.
        sbatch: more flags for sbatch.
        flags: more flags for main.py.
    """

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        digits_root: Path,
        nodes: int = 2,
        tasks: int = 1,
        overlay: str = OVERLAY,
        sbatch: str = "",
        flags: str = "",
    ) -> None:
        self.cluster, self.run = cluster, cluster.folder / "runs" / name
        self.output = cluster.folder / f"{name}-%j.out"
        arguments = f"{run_flags(digits_root, overlay if nodes > 1 else 'tiny')} {flags}"
        command = ["make", "--no-print-directory", "submit", f"CONFIG={CONFIG}", f"NODES={nodes}", f"TASKS={tasks}"]
        command += [f"NAME={name}", f"SBATCH=--parsable --output={self.output} {sbatch}", f"ARGS={arguments}"]
        variables = {"RUN": str(self.run), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        output = cluster.call("env", *(f"{name}={value}" for name, value in variables.items()), *command)
        self.id = output.split()[-1]

    def facts(self, task: int | None = None) -> dict[str, str]:
        """Return what Slurm knows about the job, or about one task of an array."""
        name = self.id if task is None else f"{self.id}_{task}"
        words = self.cluster.call("scontrol", "show", "job", name, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self) -> str:
        """Return the output of all starts of the job."""
        pattern = self.output.name.replace("%j", "*")
        return "".join(path.read_text(errors="replace") for path in sorted(self.cluster.folder.glob(pattern)))

    def continued_from(self) -> list[int]:
        """Return the steps of the checkpoints from which the job was continued."""
        return [int(step) for step in re.findall(r"0: continuing from .*step=(\d+)\.ckpt", self.log())]

    def wait_for_state(self, *states: str, task: int | None = None) -> dict[str, str]:
        """Wait until the job is in one of these states, and return its facts."""
        wait_for(
            lambda: self.facts(task)["JobState"] in states,
            PATIENCE,
            lambda: f"job {self.id} is {self.facts(task)['JobState']}, not {states}: {self.log()[-4000:]}",
        )
        return self.facts(task)

    def wait_for_step(self, step: int, run: Path | None = None) -> None:
        """Wait until a new run with :class:`Pause` has reached a step."""
        path = (run or self.run) / "step"
        wait_for(
            lambda: path.exists() and int(path.read_text() or 0) >= step,
            PATIENCE,
            lambda: f"job {self.id} has not made step {step}: {self.log()[-4000:]}",
        )

    def process(self, rank: int) -> int:
        """Return the process id of a rank."""
        ids = self.cluster.processes(SLURM_JOB_ID=self.id, SLURM_PROCID=str(rank))
        trainers = [pid for pid in ids if b"main.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(trainers) == 1, trainers
        return trainers[0]


def run_flags(digits_root: Path, overlay: str) -> str:
    """Return the flags of a tiny run of ``STEPS`` steps that saves a checkpoint every ten steps."""
    return (
        f"--config configs/overlay/tiny.yaml --config configs/overlay/{overlay}.yaml "
        f"--data.init_args.root {digits_root} --trainer.max_steps {STEPS} --trainer.val_check_interval {STEPS} "
        "--trainer.callbacks.every_n_steps 10 --trainer.enable_model_summary false"
    )


def pause(seconds: float) -> str:
    """Return the flags that add :class:`Pause` to a run."""
    return f"--trainer.callbacks+=tests.cluster.jobs.Pause --trainer.callbacks.seconds {seconds}"


def assert_same(run: Path, reference: Path) -> None:
    """Compare final weights and every training scalar bit for bit; each step is logged once."""
    found, expected = (
        {tag: points for tag, points in curves(folder).items() if not tag.startswith("throughput/")}
        for folder in (run, reference)
    )
    assert [step for step, _ in found["train/loss"]] == list(range(1, STEPS + 1))
    assert found == expected
    first, second = weights(run, STEPS), weights(reference, STEPS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
