"""Ends a run when one of its processes is lost, and names the process."""

import os
import socket
import sys
import threading
import time
import traceback
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from maetok.runtime.distributed import delay_exit_for_gloo

NO_RANK = -1


class Heartbeat(Callback):
    """Lets every process report to rank 0. If one goes silent, all end and print its rank, host and process id.

    Without it the other processes would wait in a collective until its timeout, and not know for which process. A
    thread sends the reports, so steps, validations and checkpoints may take any time.

    Args:
        timeout: seconds of silence after which a process is lost.
        interval: seconds between two reports.

    Raises:
        ValueError: unless 0 < interval < timeout.
    """

    def __init__(self, timeout: float = 300, interval: float = 10) -> None:
        if not 0 < interval < timeout:
            raise ValueError(f"heartbeat.timeout={timeout} must be greater than heartbeat.interval={interval} > 0")
        self.timeout, self.interval = timeout, interval
        self.finished = threading.Event()
        self.thread: threading.Thread | None = None
        self.group: Any = None
        self.names: list[str] = []
        self.exception: BaseException | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Delay the exit, in every subcommand, so that a successful process does not look lost."""
        if trainer.world_size > 1:
            delay_exit_for_gloo()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the thread, if there is more than one process."""
        if trainer.world_size == 1:
            return
        # Other ranks wait for rank 0, which may be waiting for one of them.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(seconds=2 * self.timeout))
        host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self.names = [""] * trainer.world_size
        dist.all_gather_object(self.names, f"on {host} (process {os.getpid()})", group=self.group)
        self.finished.clear()
        self.thread = threading.Thread(target=self.watch, args=(trainer.global_rank,), name="heartbeat", daemon=True)
        self.thread.start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the threads of all processes in the same round."""
        self.finished.set()
        if self.thread is not None:
            self.thread.join()
            self.thread = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop together when all processes leave together; a process that fails is lost to the others.

        A collective may fail because another process is gone. This process then waits until it knows which one.
        """
        if isinstance(exception, SystemExit) and not exception.code:
            self.on_train_end(trainer, pl_module)
        elif isinstance(exception, RuntimeError) and self.thread is not None:
            self.exception = exception
            self.thread.join(2 * self.interval)

    def watch(self, rank: int) -> None:
        """Run the thread: report, or collect reports, until training ends or a process is lost."""
        finished = False
        while not finished:
            self.finished.wait(self.interval)
            finished, lost = self.collect() if rank == 0 else self.report()
            if lost != NO_RANK:
                self.end(rank, lost)

    def end(self, rank: int, lost: int) -> None:
        """End this process at once, even if other threads are waiting."""
        if self.exception is not None:
            traceback.print_exception(self.exception)
        text = f"rank {lost} {self.names[lost]} is lost, so rank {rank} {self.names[rank]} ends"
        print(f"\n{text}; continue with --ckpt_path last", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    def collect(self) -> tuple[bool, int]:
        """Collect reports on rank 0, and tell all processes whether training has ended and which process is silent."""
        signs = {rank: torch.zeros(1, dtype=torch.int64) for rank in range(1, len(self.names))}
        lost, deadline = NO_RANK, time.monotonic() + self.timeout
        for rank, sign in signs.items():
            try:
                work: Any = dist.irecv(sign, rank, self.group)
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.1)))
            except RuntimeError:
                lost = rank if lost == NO_RANK else lost
        finished = self.finished.is_set() or any(bool(sign) for sign in signs.values())
        for rank in signs:
            try:
                dist.send(torch.tensor([finished, lost]), rank, self.group)
            except RuntimeError:
                lost = rank if lost == NO_RANK else lost
        return finished, lost

    def report(self) -> tuple[bool, int]:
        """Report to rank 0 from any other rank, and receive its answer."""
        answer = torch.zeros(2, dtype=torch.int64)
        try:
            dist.send(torch.tensor([self.finished.is_set()]).long(), 0, self.group)
            dist.recv(answer, 0, self.group)
        except RuntimeError:
            return False, 0
        return bool(answer[0]), int(answer[1])
