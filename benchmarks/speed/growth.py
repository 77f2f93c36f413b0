"""How cost grows with batch, tokens and resolution: the exponent of the power law through the measured times."""

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Numbers
from benchmarks.speed.networks import base_tokenizer
from benchmarks.speed.variants import SUITE, count_flops, settings_of
from maetok import SiT
from maetok.networks.denoiser.transformer import SIZES
from maetok.runtime.memory import keep_freed_memory


def measure_growth(calls: Mapping[int, Callable[[], object]], rounds: int) -> Numbers:
    """Return CPU-seconds (fastest round) and FLOPs of each call by the growing number, and the exponents of both."""
    keep_freed_memory()
    numbers: Numbers = {f"FLOPs {size}": float(count_flops(call)) for size, call in calls.items()}
    least = dict.fromkeys(calls, float("inf"))
    with settings_of(SUITE), torch.no_grad():
        for _ in range(rounds):
            for size, call in calls.items():
                started = time.process_time()
                call()
                least[size] = min(least[size], time.process_time() - started)
    numbers |= {f"seconds {size}": seconds for size, seconds in least.items()}
    for quantity in ("seconds", "FLOPs"):
        values = [numbers[f"{quantity} {size}"] for size in calls]
        numbers[f"exponent of {quantity}"] = exponent(list(calls), values)
    return numbers


def exponent(sizes: list[int], values: list[float]) -> float:
    """Return the slope of the straight line through log(value) over log(size)."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def batch(rounds: int) -> Numbers:
    """Encode 1 to 8 images of 256 px."""
    tokenizer = base_tokenizer(256).eval()
    return measure_growth(
        {count: lambda count=count: encode(tokenizer.encode, count, 256) for count in (1, 2, 4, 8)}, rounds
    )


def resolution(rounds: int) -> Numbers:
    """Encode one image of 128 to 512 px."""
    tokenizer = base_tokenizer(256).eval()
    return measure_growth(
        {side: lambda side=side: encode(tokenizer.encode, 1, side) for side in (128, 256, 384, 512)}, rounds
    )


def tokens(rounds: int) -> Numbers:
    """Predict a velocity with SiT-B for one sample of 32 to 1024 latent tokens."""
    models = {count: SiT(count, 32, size=SIZES["B"]).eval() for count in (32, 64, 128, 256, 512, 1024)}
    return measure_growth({count: lambda model=model: velocity(model) for count, model in models.items()}, rounds)


@torch.no_grad()
def encode(call: Callable[[Tensor], Tensor], images: int, side: int) -> Tensor:
    """Encode grey images."""
    return call(torch.zeros(images, 3, side, side))


@torch.no_grad()
def velocity(model: SiT) -> Tensor:
    """Predict the velocity of one sample."""
    x = torch.zeros(1, model.latent_tokens, model.latent_channels)
    return model(x, torch.full((1,), 0.5), torch.zeros(1, dtype=torch.int64))
