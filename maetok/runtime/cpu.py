"""Settings of this process that make networks faster on a CPU; results keep float32 precision.

No library sets them. The gain of each depends on the CPU and was not measured by itself in docs/performance.md.
"""

import torch

from maetok.runtime.memory import keep_freed_memory


def tune_cpu() -> None:
    """Apply all settings to this process; tasks call this when they run on a CPU."""
    keep_freed_memory()
    use_fast_float32()


def use_fast_float32() -> bool:
    """Let oneDNN compute float32 matrix products, which is up to twice as fast where MKL does not know the CPU.

    PyTorch asks oneDNN only if products may be rounded to bfloat16. On a CPU without AMX oneDNN has no use for that
    permission and computes in float32. This function therefore changes nothing on CPUs with AMX, and on other CPUs
    compares one product with float64 before it keeps the setting. Products on a GPU are not affected.

    Returns:
        Whether the setting is active.
    """
    if not torch.backends.mkldnn.is_available() or torch.cpu._is_amx_tile_supported():
        return False
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # set at run time
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    if product_error() > 2e-6:
        matmul.fp32_precision = before
        return False
    return True


def product_error() -> float:
    """Return the relative error of a float32 matrix product on the CPU: about 3e-7, or 3e-3 if rounded to bfloat16."""
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 768, generator=rng) for _ in range(2))
    exact = left.double() @ right.double().T
    return float(((left @ right.T) - exact).norm() / exact.norm())
