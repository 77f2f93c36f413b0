"""The cluster and the uninterrupted run that others are compared with, once for all tests."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import Job


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))  # which ends what was started
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="session")
def uninterrupted(cluster: Cluster, digits_root: Path) -> Path:
    """Run a job on two nodes without disturbing it, and return its run directory."""
    job = Job(cluster, "uninterrupted", digits_root)
    facts = job.wait_for_state("COMPLETED", "FAILED")
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "0"), job.log()[-4000:]
    return job.run
