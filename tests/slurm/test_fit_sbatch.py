"""slurm/fit.sbatch and ``make submit`` with stand-ins for the programs of Slurm."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.helpers import ROOT

SRUN = """#!/bin/bash
printf '%s\\n' "$@" > srun.arguments
echo "$MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS" > srun.environment
[ -z "${ASKS:-}" ] || { mkdir -p "$ASKS"; touch "$ASKS/requeue"; }
exit "${CODE:-0}"
"""
SCONTROL = """#!/bin/bash
case "$*" in
  "show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
  "show node n1 --oneliner") echo "NodeName=n1 Arch=x86_64 ${ADDRESS-NodeAddr=10.0.0.5} NodeHostName=vm Port=17001" ;;
  requeue*) echo "$2" > requeued ;;
  *) exit 9 ;;
esac
"""
SBATCH = '#!/bin/bash\nprintf "%s\\n" "$@" > sbatch.arguments\n'


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("sbatch", SBATCH)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def submit(folder: Path, *arguments: str, **variables: str) -> int:
    """Run the batch script as Slurm would run job 20001, and return its exit code."""
    environment = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "20001",
        "SLURM_JOB_NAME": "mine",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "3",
    }
    command = ["bash", str(ROOT / "slurm" / "fit.sbatch"), *arguments]
    return subprocess.run(command, env=environment | variables, capture_output=True, check=False).returncode


def words(folder: Path, name: str) -> list[str]:
    return (folder / name).read_text().split()


def test_processes_get_address_run_directory_and_world_size(folder: Path) -> None:
    assert submit(folder, "--config", "a.yaml", "--trainer.num_nodes", "1") == 0
    assert words(folder, "srun.environment") == ["10.0.0.5", "20001", "3"]
    arguments = words(folder, "srun.arguments")
    program = arguments.index("env")
    assert arguments[:program] == ["--kill-on-bad-exit=1", "--wait=60", "--label"]
    assert arguments[program + 1 : program + 5] == ["--block-signal=USR1", ".venv/bin/python", "main.py", "fit"]
    given = "--config a.yaml --trainer.num_nodes 1"
    own = "--ckpt_path last --trainer.default_root_dir runs/mine --trainer.num_nodes 2 --trainer.devices 4"
    assert arguments[program + 5 :] == f"{given} {own}".split()  # the script's own come last, so they win
    assert not (folder / "requeued").exists()


def test_the_name_of_the_first_node_stands_in_for_a_missing_address(folder: Path) -> None:
    submit(folder, ADDRESS="")
    assert words(folder, "srun.environment")[0] == "n1"
    submit(folder, MASTER_ADDR="192.168.0.1", MASTER_PORT="99")
    assert words(folder, "srun.environment")[:2] == ["192.168.0.1", "99"]


@pytest.mark.parametrize("code", ["0", "143"])
def test_a_job_that_asks_for_it_is_queued_again(folder: Path, code: str) -> None:
    assert submit(folder, ASKS="runs/mine", CODE=code) == 0
    assert words(folder, "requeued") == ["20001"]
    assert not (folder / "runs" / "mine" / "requeue").exists()


def test_a_failed_job_keeps_its_exit_code_and_is_not_queued_again(folder: Path) -> None:
    (folder / "runs" / "mine").mkdir(parents=True)
    (folder / "runs" / "mine" / "requeue").touch()  # left by a job that was killed
    assert submit(folder, CODE="137") == 137
    assert not (folder / "requeued").exists()


def test_tasks_of_an_array_have_their_own_run_seed_and_name(folder: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "20000", "SLURM_ARRAY_TASK_ID": "1"}
    assert submit(folder, ASKS="runs/mine_1", **array) == 0
    assert words(folder, "requeued") == ["20000_1"]
    arguments = words(folder, "srun.arguments")
    assert arguments[arguments.index("--trainer.default_root_dir") + 1] == "runs/mine_1"
    assert arguments[arguments.index("--seed_everything") + 1] == "1"
    submit(folder, ARRAY_FLAG="--model.init_args.seed", RUN="elsewhere/r", **array)
    arguments = words(folder, "srun.arguments")
    assert arguments[arguments.index("--model.init_args.seed") + 1] == "1"
    assert arguments[arguments.index("--trainer.default_root_dir") + 1] == "elsewhere/r_1"


def make_submit(folder: Path, *variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["make", "--no-print-directory", "-f", str(ROOT / "Makefile"), "submit", *variables]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_make_submit_sets_nodes_processes_and_time(folder: Path) -> None:
    config = "configs/experiment/digits_sit.yaml"
    assert make_submit(folder, f"CONFIG={config}", "NODES=2", "GPUS=8", "TIME=8:00:00").returncode == 0
    assert (
        words(folder, "sbatch.arguments")
        == (
            "--job-name=digits_sit --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --time=8:00:00 "
            f"slurm/fit.sbatch --config {config}"
        ).split()
    )
    assert (folder / "runs" / "slurm").is_dir()  # Slurm does not make folders for its output
    make_submit(folder, f"CONFIG={config}", "NAME=x", "TASKS=2", "SBATCH=--array=0-1 --partition=p", "ARGS=--config b")
    assert (
        words(folder, "sbatch.arguments")
        == (
            "--job-name=x --nodes=1 --ntasks-per-node=2 --time=24:00:00 --array=0-1 --partition=p "
            f"slurm/fit.sbatch --config {config} --config b"
        ).split()
    )


def test_make_submit_needs_a_config(folder: Path) -> None:
    result = make_submit(folder, "NODES=2")
    assert result.returncode != 0
    assert "CONFIG=configs/experiment/" in result.stderr
