"""Time variants of a computation in one process, and compare each with the limit.

The variants of a case take turns, round after round, so other load of the machine affects all of them alike. A ratio
compares times within a round. Times are CPU-seconds of this process, which runs one thread. The limit is the
best rate of one large matrix product in the dtype of the case, measured in the same rounds.
"""

import contextlib
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import torch
import torch.nn.functional as F

from benchmarks.harness import Numbers, peak_memory
from maetok.runtime.cpu import use_fast_float32
from maetok.runtime.flops import FlopCounter
from maetok.runtime.memory import keep_freed_memory

Precision = Literal["float32", "bfloat16"]
REFERENCE, SUITE = "reference", "suite"


@contextlib.contextmanager
def settings_of(variant: str) -> Iterator[None]:
    """Use PyTorch's own float32 products for the reference, :func:`maetok.runtime.cpu.use_fast_float32` otherwise."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # set at run time
    before = matmul.fp32_precision
    if not variant.startswith(REFERENCE):
        use_fast_float32()
    try:
        yield
    finally:
        matmul.fp32_precision = before


def autocast(precision: Precision) -> torch.autocast:
    """Return the context in which networks compute in this precision; weights stay float32."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")


def matrix_product(precision: Precision) -> float:
    """Return the FLOP/s of a product as in a transformer, (1536, 768) x (768, 3072)."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    left, weight = torch.randn(1536, 768, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
    times = []
    for _ in range(8):
        started = time.process_time()
        F.linear(left, weight)
        times.append(time.process_time() - started)
    return 2 * left.numel() * len(weight) / min(times)


def measure(
    variants: Mapping[str, Callable[[], object]],
    precision: Precision,
    images: int,
    rounds: int,
    baseline: str = REFERENCE,
) -> Numbers:
    """Return CPU-seconds per image of each variant, ratios to the reference, and the limit.

    Args:
        variants: what to time, by name; a name that begins with ``reference`` runs with PyTorch's default settings.
        precision: of the matrix products whose rate is the limit.
        images: processed by one call.
        rounds: after one call of each that does not count.
        baseline: the variant that others are compared with.

    Returns:
        ``NAME seconds`` and, for others than the baseline, ``NAME ratio`` (baseline / NAME: how many times faster),
        ``NAME FLOPs`` per image and ``NAME limit share``, each with its smallest and largest over the rounds as
        ``... min`` and ``... max``; ``limit``, the FLOP/s; ``peak MiB`` of the process.
    """
    keep_freed_memory()
    flops = {name: count_flops(variant) for name, variant in variants.items()}  # which is the warm-up, but for ...
    for name in variants:
        if "compiled" in name:
            with settings_of(name):
                variants[name]()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    limits = []
    gc.disable()  # its pauses would meet one variant or another by chance
    for number in range(rounds):
        names = list(variants)
        for name in names if number % 2 == 0 else reversed(names):
            gc.collect()
            with settings_of(name):
                started = time.process_time()
                variants[name]()
                seconds[name].append((time.process_time() - started) / images)
        with settings_of(SUITE):
            limits.append(matrix_product(precision))
    gc.enable()
    numbers: Numbers = {"limit": statistics.median(limits), "images": images, "peak MiB": peak_memory(os.getpid())}
    for name, times in seconds.items():
        numbers |= with_spread(f"{name} seconds", times)
        numbers[f"{name} FLOPs"] = flops[name] / images
        rates = [flops[name] / images / own / limit for own, limit in zip(times, limits, strict=True)]
        numbers |= with_spread(f"{name} limit share", rates)
        if name != baseline:
            numbers |= with_spread(f"{name} ratio", [a / b for a, b in zip(seconds[baseline], times, strict=True)])
    return numbers


def with_spread(name: str, values: list[float]) -> Numbers:
    """Return median, smallest and largest value."""
    return {name: statistics.median(values), f"{name} min": min(values), f"{name} max": max(values)}


def count_flops(call: Callable[[], object]) -> int:
    """Return the FLOPs of a call, forward and backward, without recomputation."""
    with torch.compiler.set_stance("force_eager"), FlopCounter() as counter:
        call()
    return counter.flops
