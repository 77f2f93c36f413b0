"""The recipe that docs/scaling.md gives for machines without Slurm."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.jobs import CONFIG, OVERLAY, assert_same, run_flags
from tests.support.helpers import ROOT

pytestmark = pytest.mark.cluster


def test_torchrun_starts_again_after_a_kill(tmp_path: Path, digits_root: Path, uninterrupted: Path) -> None:
    """Kill one of two processes in step 15: torchrun restarts both from step 10, and the result is that under Slurm."""
    kill = "--trainer.callbacks+=tests.support.helpers.SignalAt --trainer.callbacks.batch=14"
    kill += " --trainer.callbacks.name=SIGKILL"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command += ["main.py", "fit", f"--config={CONFIG}", *run_flags(digits_root, OVERLAY).split(), *kill.split()]
    command += ["--trainer.callbacks.rank=1", "--trainer.devices=2", "--ckpt_path=last"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    log = tmp_path / "log"
    with log.open("w") as output:
        command.append(f"--trainer.default_root_dir={tmp_path / 'run'}")
        code = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False).returncode
    assert code == 0, log.read_text()[-4000:]
    assert "continuing from" in log.read_text()
    assert_same(tmp_path / "run", uninterrupted)
