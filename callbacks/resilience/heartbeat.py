"""Ends a run when one of its processes is lost, and says which."""

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
    """Every process tells rank 0 that it lives; if one is not heard from, all end with its rank, host and process id.

    Otherwise the others would wait in a collective for as long as that may take, and then not know for whom. Signs of
    life come from a thread, so steps, validations and checkpoints may last as long as they like.

    Args:
        timeout: seconds without a sign of life after which a process is lost.
        interval: seconds between two signs.

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
        """In every subcommand, keep a process that ends well from looking lost."""
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
        """Stop together when all leave together; a process that fails is lost to the others.

        What fails may be a collective for want of another process: then this one waits until it is known which.
        """
        if isinstance(exception, SystemExit) and not exception.code:
            self.on_train_end(trainer, pl_module)
        elif isinstance(exception, RuntimeError) and self.thread is not None:
            self.exception = exception
            self.thread.join(2 * self.interval)

    def watch(self, rank: int) -> None:
        """Body of the thread."""
        finished = False
        while not finished:
            self.finished.wait(self.interval)
            finished, lost = self.collect() if rank == 0 else self.report()
            if lost != NO_RANK:
                self.end(rank, lost)

    def end(self, rank: int, lost: int) -> None:
        """End this process, whatever its other threads wait for."""
        if self.exception is not None:
            traceback.print_exception(self.exception)
        text = f"rank {lost} {self.names[lost]} is lost, so rank {rank} {self.names[rank]} ends"
        print(f"\n{text}; continue with --ckpt_path last", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)

    def collect(self) -> tuple[bool, int]:
        """Rank 0: hear from all, and tell all whether training has ended and who was not heard from."""
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
        """Any other rank: give a sign of life, and hear what rank 0 knows."""
        answer = torch.zeros(2, dtype=torch.int64)
        try:
            dist.send(torch.tensor([self.finished.is_set()]).long(), 0, self.group)
            dist.recv(answer, 0, self.group)
        except RuntimeError:
            return False, 0
        return bool(answer[0]), int(answer[1])
