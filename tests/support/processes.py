"""Fork groups of processes that train together. The parent has imported everything and computed nothing."""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    """Return an unused port below the range from which the system assigns ports to connections."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


def run_as_rank(
    rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """Call a function as one process of a group, with the environment that torchrun sets; alone, set none of it."""
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
        os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "GROUP_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
    try:
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


class Group:
    """Runs a function in several processes at once."""

    def __init__(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> None:
        context, port = multiprocessing.get_context("fork"), free_port()
        self.processes = [
            context.Process(target=run_as_rank, args=(rank, world_size, port, function, arguments))
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def join(self, timeout: float = 400) -> list[int | None]:
        """Wait for all processes and return their exit codes; if one fails, kill the rest."""
        end = time.monotonic() + timeout
        while any(process.is_alive() for process in self.processes):
            failed = any(process.exitcode not in (None, 0) for process in self.processes)
            if failed or time.monotonic() > end:
                self.kill()
            time.sleep(0.02)
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """Kill all processes with SIGKILL."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        for process in self.processes:
            process.join()


def run_group(world_size: int, function: Callable[..., Any], *arguments: Any) -> None:
    """Run a function in several processes, and require that all succeed."""
    codes = Group(world_size, function, *arguments).join()
    assert codes == [0] * world_size, f"{function.__name__}{arguments}: exit codes {codes}"
