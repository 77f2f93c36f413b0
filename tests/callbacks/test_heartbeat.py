"""A lost process ends the others, and they say which it was."""

import os
import re
import socket
import subprocess
import sys

import pytest

from callbacks import Heartbeat
from tests.support.helpers import ROOT

# Two processes; what the second does is in argv. The main threads wait for ever, as in a collective without end.
PROGRAM = """
import os, signal, sys, threading
from types import SimpleNamespace
import torch.distributed as dist
from callbacks.resilience.heartbeat import Heartbeat

rank, port, end, timeout = int(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
heartbeat = Heartbeat(timeout, interval=0.5)
heartbeat.on_train_start(SimpleNamespace(world_size=2, global_rank=rank), None)
print(f"process {os.getpid()}", flush=True)
if end == "leave":
    heartbeat.on_exception(None, None, SystemExit(0))
elif rank == int(end[-1]):
    os.kill(os.getpid(), signal.SIGSTOP if end.startswith("stop") else signal.SIGKILL)
else:
    threading.Event().wait(250)
    sys.exit(3)
"""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def two_processes(end: str, timeout: int) -> list[subprocess.Popen]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "SLURMD_NODENAME": "node7"}
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), port, end, str(timeout)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


@pytest.mark.parametrize(("end", "timeout"), [("stop 1", 4), ("kill 0", 60)])
def test_the_other_process_names_the_lost_one_and_fails(end: str, timeout: int) -> None:
    """One that does nothing more, and one whose connection is closed at once."""
    processes, lost = two_processes(end, timeout), int(end[-1])
    other = 1 - lost
    output, errors = processes[other].communicate(timeout=280)
    processes[lost].kill()  # a stopped one
    processes[lost].communicate()
    assert processes[other].returncode == 1, errors
    mine = re.search(r"process \d+", output)[0]
    named = f"rank {lost} on node7 (process {processes[lost].pid}) is lost, so rank {other} on node7 ({mine}) ends"
    assert named in errors


def test_processes_that_end_together_miss_nobody() -> None:
    for process in two_processes("leave", timeout=60):
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors
        assert "lost" not in errors


def test_an_interval_without_meaning_is_refused() -> None:
    with pytest.raises(ValueError, match=r"heartbeat\.timeout=5 must be greater than heartbeat\.interval=10"):
        Heartbeat(timeout=5)
