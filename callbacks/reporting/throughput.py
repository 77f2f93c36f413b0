"""Speed, waiting, utilisation and memory of training."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from jsonargparse.typing import PositiveFloat
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from maetok.runtime.flops import FlopCounter, peak_rate, synchronize
from maetok.runtime.memory import peak_memory

GIBIBYTE = 2**30


@dataclass
class Interval:
    """Work of this process since the last log step, without validation."""

    images: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0


class Throughput(Callback):
    """Logs the speed of training between two log steps, without validation time, under ``throughput/``.

    - ``images_per_second``: over all processes; counts latents where training reads latents.
    - ``data_wait_share``: share of the time that the training loop of this process waited in the loader
      (``BatchLoader.seconds_waited``). It excludes copies to a GPU, which run beside the computation, and the first
      batch, which arrives before the first step. A GPU may have been computing in the meantime.
    - ``model_flops_per_second``: FLOP/s of this process. FLOPs are matrix products, convolutions and attention of the
      whole step, including frozen networks and the discriminator. They are counted in the first step, and again in the
      first step with the discriminator. Recomputation in backward passes does not count (activation checkpointing,
      scores of fused attention). Counting slows that step down.
    - ``model_flops_utilization``: the same, divided by the peak rate of the device.
    - ``memory_gib``: peak memory of this process; on a GPU the peak of tensors since the last log step, on a CPU the
      peak since the process started.

    This callback waits for a GPU only once per log step. Lightning's ``ThroughputMonitor`` is not enough: it knows no
    waiting for the loader and one number of FLOPs for all steps, but a step with the discriminator takes more.

    Args:
        peak_flops_per_second: peak rate of one device. By default the vendor's rate for the precision of training, or,
            for a device that is not in ``maetok.runtime.flops.GPU_PEAKS``, the rate of matrix products in a test of 0.2
            seconds.
        model_flops_per_image: known FLOPs, instead of counting, which is impossible with compiled networks;
            ``python -m tools.plan`` prints the FLOPs of a step.
    """

    def __init__(
        self, peak_flops_per_second: PositiveFloat | None = None, model_flops_per_image: PositiveFloat | None = None
    ) -> None:
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
                "since counting would run compiled blocks uncompiled; set model_flops_per_image of "
                "callbacks.Throughput (python -m tools.plan prints the FLOPs of a step)"
            )
        elif self.peak is None:
            dtype = torch.bfloat16 if str(trainer.precision).startswith("bf16") else torch.float32
            self.peak, source = peak_rate(pl_module.device, dtype)
            rank_zero_info(f"model FLOP/s utilisation is relative to {self.peak:.3g} FLOP/s, {source}")

    def knows_flops(self, pl_module: LightningModule) -> bool:
        """Return whether FLOPs are given or can be counted."""
        return self.model_flops_per_image is not None or not getattr(pl_module, "compile_blocks", False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Start the clock unless it runs, and count FLOPs if they are unknown for this kind of step."""
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
        """Return the values to log for the interval, by name."""
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
        """Stop the clock at the end of the last step: the validation loader has begun to read before this call."""
        if self.started is not None:
            self.stop_clock(self.step_ended)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop counting if the counted step failed."""
        if self.counter is not None:
            self.stop_counting()

    def stop_counting(self) -> None:
        """End the mode that counts operations."""
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
    """Return the time in seconds, and the seconds that training has waited for its loader (0 if unknown)."""
    return time.perf_counter(), getattr(trainer.train_dataloader, "seconds_waited", 0.0)
