"""Floating-point operations of a training step, counted while it runs, and the peak rate of a device."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

FORMULAS = flop_registry | {  # torch has no formula for attention on the CPU
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
if torch.backends.mkldnn.is_available():  # maetok.networks.inference.PackedLinear
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = lambda inputs, *_, out_val: 2 * inputs.shape[-1] * out_val.numel()

ATTENTION_BACKWARD = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
}
"""Operations of five matrix products of equal size; the first product recomputes the scores of the forward pass."""


class FlopCounter(TorchDispatchMode):
    """Counts matrix products, convolutions and attention that run while it is active; one multiply-add is two.

    Every operation runs unchanged, so results are equal bit for bit. Compiled functions are the exception: torch runs
    them uncompiled while such a mode is active.

    torch's ``FlopCounterMode`` is not enough: it counts recomputation as part of the model, and has no formula for
    attention on the CPU or for packed layers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        """Operations that the mathematics of the step require, independent of kernels and memory use."""
        self.recomputed = 0
        """Operations that backward passes repeat: for activation checkpointing and in fused attention."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it."""
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # composite operations arrive before they are decomposed
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        operation = func.overloadpacket
        if operation in FORMULAS:
            flops = FORMULAS[operation](*args, **kwargs, out_val=result)
            again = flops if recomputes() else flops // 5 if operation in ATTENTION_BACKWARD else 0
            self.flops += flops - again
            self.recomputed += again
        return result


def recomputes() -> bool:
    """Return whether activation checkpointing repeats a forward pass: a backward pass that records gradients."""
    return torch.is_grad_enabled() and torch._C._current_graph_task_id() != -1


@dataclass(frozen=True)
class PeakRates:
    """Peak rates of dense matrix products on a GPU in FLOP/s, as its vendor states them."""

    bfloat16: float
    tf32: float
    float32: float


GPU_PEAKS = {
    "H100 PCIe": PeakRates(756e12, 378e12, 51e12),
    "H100": PeakRates(989e12, 494e12, 67e12),
    "H200": PeakRates(989e12, 494e12, 67e12),
    "A100": PeakRates(312e12, 156e12, 19.5e12),
    "L40S": PeakRates(362e12, 183e12, 91.6e12),
}
"""Peak rates by a part of the name that CUDA gives. The first match counts, so PCIe versions come before SXM.

Lightning's table is not enough: its H200 rates for bfloat16 and TF32 are those with sparsity, twice the dense rates.
"""

OTHER_DEVICES = ("MIG", "NVL")
"""Parts of the names of slices and versions of these GPUs that have other rates."""


def vendor_peak(gpu_name: str, dtype: torch.dtype, tf32: bool) -> float | None:
    """Return the FLOP/s of a GPU from the table, or None if the table lacks it.

    Args:
        gpu_name: the result of ``torch.cuda.get_device_name``.
        dtype: bfloat16 or float32.
        tf32: whether float32 products may use TF32.
    """
    peak = next((rates for part, rates in GPU_PEAKS.items() if part in gpu_name), None)
    if peak is None or any(part in gpu_name for part in OTHER_DEVICES):
        return None
    return peak.bfloat16 if dtype == torch.bfloat16 else peak.tf32 if tf32 else peak.float32


def measured_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """Return the FLOP/s of the fastest of many square matrix products with the threads of this process."""
    size, best, end = 128, 0.0, time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        # random numbers here would change the random numbers of training
        matrix = torch.linspace(-1, 1, size * size, device=device).to(dtype).view(size, size)
        for _ in range(3):
            synchronize(device)
            before = time.perf_counter()
            matrix @ matrix
            synchronize(device)
            best = max(best, 2 * size**3 / (time.perf_counter() - before))
        if time.perf_counter() - started < seconds / 10 and size < 8192:
            size *= 2
    return best


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak FLOP/s of a device in matrix products of a dtype, and the source of the number."""
    if device.type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        known = vendor_peak(torch.cuda.get_device_name(device), dtype, tf32)
        if known is not None:
            return known, "the vendor's peak"
    return measured_peak(device, dtype), "measured with matrix products"
