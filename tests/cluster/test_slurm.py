"""Disturb runs on two nodes of a real Slurm, and compare them with an undisturbed run."""

import os
import re
import signal
from pathlib import Path

import pytest

from maetok.checkpoints.runs import complete_checkpoints
from tests.cluster.cluster import Cluster
from tests.cluster.jobs import STEPS, Job, assert_same, pause
from tests.support.helpers import curves, weights

pytestmark = pytest.mark.cluster


def test_two_nodes_train_to_completion(cluster: Cluster, uninterrupted: Path) -> None:
    assert [path.stem for path in complete_checkpoints(uninterrupted)] == ["step=000000030", "step=000000040"]
    assert [step for step, _ in curves(uninterrupted)["train/loss"]] == list(range(1, STEPS + 1))
    log = next(cluster.folder.glob("uninterrupted-*.out")).read_text(errors="replace")  # srun cuts bars anywhere
    assert "rank 0 at 127.0.0.1:" in log
    assert "All distributed processes registered. Starting with 2 processes" in log


def test_shards_within_a_node_and_replicas_on_both(cluster: Cluster, digits_root: Path, uninterrupted: Path) -> None:
    """Shard weights over two processes within each of two nodes (HSDP); they differ from FSDP by 9e-8 at most here."""
    job = Job(cluster, "hybrid", digits_root, tasks=2, overlay="hsdp")
    facts = job.wait_for_state("COMPLETED", "FAILED")
    assert facts["JobState"] == "COMPLETED", job.log()[-4000:]
    assert "Starting with 4 processes" in job.log()
    found, expected = (curves(run)["gradient_norm/autoencoder"] for run in (job.run, uninterrupted))
    assert [step for step, _ in found] == list(range(1, STEPS + 1))
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-5)
    first, second = weights(job.run, STEPS), weights(uninterrupted, STEPS)
    assert first.keys() == second.keys()
    assert all((first[name] - second[name]).abs().max() < 1e-6 for name in first)


def test_a_job_requeues_itself_at_the_time_limit(cluster: Cluster, digits_root: Path, uninterrupted: Path) -> None:
    """Set the limit during training, so that the test does not depend on the start-up time."""
    job = Job(cluster, "limit", digits_root, sbatch="--time=60 --signal=USR1@90", flags=pause(4))
    job.wait_for_step(2)
    hours, minutes, _ = map(int, job.facts()["RunTime"].split(":"))
    cluster.call("scontrol", "update", f"JobId={job.id}", f"TimeLimit={60 * hours + minutes + 2}")
    job.wait_for_state("PENDING")
    cluster.call("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    facts = job.wait_for_state("COMPLETED", "FAILED", "TIMEOUT")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.log()[-4000:]
    stopped = re.findall(r"stopped by a signal; step (\d+) is saved", job.log())
    assert [int(step) for step in stopped] == job.continued_from()
    assert 2 <= int(stopped[0]) < STEPS
    assert not (job.run / "requeue").exists()
    assert_same(job.run, uninterrupted)


@pytest.mark.parametrize("name", ["requeued", "preempted"])
def test_slurm_takes_the_nodes_away(cluster: Cluster, digits_root: Path, uninterrupted: Path, name: str) -> None:
    """Requeue by ``scontrol`` and by a job of higher priority; both save well before the next tenth step."""
    job = Job(cluster, name, digits_root, flags=pause(1))
    job.wait_for_step(2)
    if name == "requeued":
        cluster.call("scontrol", "requeue", job.id)
    else:
        cluster.call(
            "sbatch",
            "--partition=urgent",
            "--nodes=2",
            "--exclusive",
            f"--output={cluster.folder}/urgent",
            "--wrap=true",
        )
    facts = job.wait_for_state("COMPLETED", "FAILED", "PREEMPTED")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), job.log()[-4000:]
    assert len(job.continued_from()) == 1
    assert 2 <= job.continued_from()[0] < 10
    assert_same(job.run, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_job_and_is_named(
    cluster: Cluster, digits_root: Path, uninterrupted: Path, number: signal.Signals
) -> None:
    """Kill or stop one process; the next job continues from the last checkpoint."""
    name = f"lost-{number.name}"
    flags = f"{pause(1)} --heartbeat.timeout 20 --heartbeat.interval 2"
    job = Job(cluster, name, digits_root, flags=flags)
    job.wait_for_step(12)
    lost = job.process(rank=1)
    os.kill(lost, number)
    assert job.wait_for_state("COMPLETED", "FAILED")["JobState"] == "FAILED"
    assert f"rank 1 on n2 (process {lost}) is lost, so rank 0 on n1" in job.log()
    assert [path.stem for path in complete_checkpoints(job.run)] == ["step=000000010"]
    job = Job(cluster, name, digits_root)
    job.wait_for_state("COMPLETED")
    assert_same(job.run, uninterrupted)


def test_tasks_of_an_array_are_runs_of_their_own(cluster: Cluster, digits_root: Path) -> None:
    """Run two seeds side by side with one process each; the first is stopped, and continues later."""
    job = Job(cluster, "array", digits_root, nodes=1, sbatch="--array=0-1 --exclusive", flags=pause(1))
    runs = [job.run.with_name(f"array_{task}") for task in (0, 1)]
    for run in runs:
        job.wait_for_step(3, run)
    cluster.call("scancel", "--signal=USR1", f"{job.id}_0")
    facts = [job.wait_for_state("COMPLETED", "FAILED", task=task) for task in (0, 1)]
    assert [(it["JobState"], it["Restarts"]) for it in facts] == [("COMPLETED", "1"), ("COMPLETED", "0")]
    losses = [curves(run)["train/loss"] for run in runs]
    for points in losses:
        assert [step for step, _ in points] == list(range(1, STEPS + 1))
    assert losses[0] != losses[1]  # another seed
