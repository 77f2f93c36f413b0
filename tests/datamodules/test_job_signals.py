"""Signals that a cluster sends to every process of a job do not end loader processes."""

import os
import signal
from itertools import islice
from multiprocessing import active_children
from pathlib import Path

from tests.support.shards import image_shards, write_shards


def test_loader_processes_outlive_them(tmp_path: Path) -> None:
    write_shards(tmp_path, [30])
    write_shards(tmp_path, [2], split="validation")
    options = {"image_size": 6, "batch_size": 3}
    expected = [
        batch["indices"].tolist() for batch in islice(image_shards(tmp_path, 0, **options).train_dataloader(), 9)
    ]
    batches = iter(image_shards(tmp_path, 2, **options).train_dataloader())
    found = [batch["indices"].tolist() for batch in islice(batches, 2)]  # one of each process: both are running
    workers = active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(worker.pid, number)
    found += [batch["indices"].tolist() for batch in islice(batches, 7)]
    assert found == expected
    assert all(worker.is_alive() for worker in workers)
