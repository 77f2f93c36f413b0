"""Where the time of a training step goes, by kind of operator."""

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness import Numbers
from benchmarks.speed.networks import Training, base_tokenizer
from benchmarks.speed.variants import SUITE, Precision, settings_of
from maetok.networks import MaskedAutoencoder, MaskRatio, random_mask
from maetok.runtime.memory import keep_freed_memory

KINDS = {
    "matrix products": ("addmm", "::mm", "bmm", "baddbmm", "linear", "convolution", "mkldnn"),
    "attention": ("scaled_dot_product", "softmax"),
    "optimizer, clipping, average": ("adam", "_foreach", "linalg_vector_norm", "lerp"),
    "compiled elementwise": ("cpp_fused", "Compiled", "inductor"),
    "copies and casts": ("copy_", "_to_copy", "clone", "::cat", "fill_", "zero_"),
    "normalisation": ("layer_norm",),
    "activation": ("gelu", "silu"),
}
"""Kinds by parts of the names of operators; the first that fits counts."""


def step_operators(precision: Precision, images: int, compiled: bool) -> Numbers:
    """Return the share of each kind in the CPU time of a training step of MAETok-B at 256 px."""
    keep_freed_memory()
    model = MaskedAutoencoder(base_tokenizer(256), {})
    if compiled:
        model.compile_blocks()
    training, inputs = Training(model), torch.rand(images, 3, 256, 256) * 2 - 1
    mask = random_mask(MaskRatio()(torch.rand(images)), torch.rand(images, 256))

    def step() -> None:
        loss = lambda: (model(inputs, mask).reconstructions.float() - inputs).square().mean()  # noqa: E731
        training.suite_step(loss, precision)

    with settings_of(SUITE):
        step()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step()
    times: Numbers = dict.fromkeys([*KINDS, "others"], 0.0)
    for event in profiler.key_averages():
        times[kind_of(event.key)] += event.self_cpu_time_total
    total = sum(times.values())
    return {kind: value / total for kind, value in times.items()}


def kind_of(operator: str) -> str:
    """Return the kind of an operator by its name."""
    return next((kind for kind, parts in KINDS.items() if any(part in operator for part in parts)), "others")
