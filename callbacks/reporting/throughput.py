"""Speed, waiting, utilisation and memory of training."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from maetok.runtime.flops import FlopCounter, peak_rate, synchronize
from maetok.runtime.memory import peak_memory

GIBIBYTE = 2**30


@dataclass
class Interval:
    """What this process has done since the last log step, validation left out."""

    images: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0


class Throughput(Callback):
    """Logs how fast training is between two log steps, without validation time, under ``throughput/``.

    - ``images_per_second``: over all processes; of latents where these are trained on.
    - ``data_wait_share``: share of the time in which the training loop of this process stood still in the loader
      (``BatchLoader.seconds_waited``). Copies to a GPU run beside the computation and are not part of it, nor is the
      first batch, which is there before the first step. A GPU may still have been computing meanwhile.
    - ``model_flops_per_second``: of this process. FLOPs are matrix products, convolutions and attention of the whole
      step, frozen networks and discriminator included, counted while the first step runs, and again in the first one
      with discriminator. What backward passes only compute again does not count (activation checkpointing, scores of
      fused attention). The counting step is slower by the time that takes.
    - ``model_flops_utilization``: the same over the peak rate of the device.
    - ``memory_gib``: of this process; on a GPU the most that tensors took since the last log step, else the most that
      the process has had in memory.

    This callback waits for a GPU only at log steps, once.

    Args:
        peak_flops_per_second: peak rate of one device. If not given, the vendor's for the precision of training, or for
            a device that is not in ``maetok.runtime.flops.GPU_PEAKS`` what matrix products reach in 0.2 seconds.
        model_flops_per_image: known FLOPs, in place of counting, which compiled networks cannot be run with;
            ``python -m tools.plan`` prints those of a step.

    Raises:
        ValueError: if one of them is given and not positive.
    """

    def __init__(self, peak_flops_per_second: float | None = None, model_flops_per_image: float | None = None) -> None:
        for name, value in (
            ("peak_flops_per_second", peak_flops_per_second),
            ("model_flops_per_image", model_flops_per_image),
        ):
            if value is not None and not value > 0:
                raise ValueError(f"Throughput {name}={value} must be positive; leave it out to have it found out")
        self.peak, self.model_flops_per_image = peak_flops_per_second, model_flops_per_image
        self.interval = Interval()
        self.started: tuple[float, float] | None = None
        self.step_ended = (0.0, 0.0)
        self.flops_per_image: dict[str, float] = {}
        """FLOPs by the kind of step, ``Task.step_kind``."""
        self.kind = ""
        self.counter: FlopCounter | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the peak rate of the device."""
        self.interval, self.started = Interval(), None
        if not self.knows_flops(pl_module):
            rank_zero_info(
                "model.init_args.compile=true: throughput/model_flops_per_second and _utilization are not logged, "
                "since compiled blocks would be run uncompiled to count them; set model_flops_per_image of "
                "callbacks.Throughput, python -m tools.plan prints the FLOPs of a step"
            )
        elif self.peak is None:
            dtype = torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float32
            self.peak, source = peak_rate(pl_module.device, dtype)
            rank_zero_info(f"model FLOP/s utilisation is relative to {self.peak:.3g} FLOP/s, {source}")

    def knows_flops(self, pl_module: LightningModule) -> bool:
        """Whether FLOPs are given or can be counted."""
        return self.model_flops_per_image is not None or not getattr(pl_module, "compile_blocks", False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock unless it runs, and count FLOPs if those of such a step are not known."""
        if self.started is None:
            self.started = clock(trainer)
        if self.model_flops_per_image is None and self.knows_flops(pl_module):
            self.kind = pl_module.step_kind
            if self.kind not in self.flops_per_image:
                self.counter = FlopCounter()
                self.counter.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count images and FLOPs, and log when Lightning logs."""
        images = len(batch["labels"])
        if self.counter is not None:
            self.flops_per_image[self.kind] = self.counter.flops / images
            self.stop_counting()
        self.interval.images += images
        self.interval.flops += images * (self.model_flops_per_image or self.flops_per_image.get(self.kind, 0.0))
        self.step_ended = clock(trainer)
        if not trainer.log_every_n_steps or (batch_idx + 1) % trainer.log_every_n_steps:
            return
        synchronize(pl_module.device)
        self.stop_clock(clock(trainer))
        pl_module.log_dict({f"throughput/{name}": value for name, value in self.scalars(trainer, pl_module).items()})
        self.interval, self.started = Interval(), clock(trainer)
        self.step_ended = self.started

    def scalars(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """What is logged of the interval, by name."""
        done = self.interval
        found = {"images_per_second": done.images * trainer.world_size / done.seconds}
        if hasattr(trainer.train_dataloader, "seconds_waited"):
            found["data_wait_share"] = done.waited / done.seconds
        if done.flops and self.peak is not None:
            rate = done.flops / done.seconds
            found |= {"model_flops_per_second": rate, "model_flops_utilization": rate / self.peak}
        memory = peak_memory(pl_module.device)
        return found if memory is None else found | {"memory_gib": memory / GIBIBYTE}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation does not count, nor its loader, which has begun to read before this is called."""
        if self.started is not None:
            self.stop_clock(self.step_ended)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind if the step that was counted has failed."""
        if self.counter is not None:
            self.stop_counting()

    def stop_counting(self) -> None:
        """End the mode in which operations are counted."""
        assert self.counter is not None
        self.counter.__exit__(None, None, None)
        self.counter = None

    def stop_clock(self, now: tuple[float, float]) -> None:
        """Add the time since the clock was started to the interval."""
        assert self.started is not None
        self.interval.seconds += now[0] - self.started[0]
        self.interval.waited += now[1] - self.started[1]
        self.started = None


def clock(trainer: Trainer) -> tuple[float, float]:
    """Seconds now, and seconds that the training loop has waited for its loader so far (0 if that does not say)."""
    return time.perf_counter(), getattr(trainer.train_dataloader, "seconds_waited", 0.0)
