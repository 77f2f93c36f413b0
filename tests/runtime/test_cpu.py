"""Settings of a CPU process: memory stays with it, and faster float32 products are float32 products."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from maetok.runtime import cpu

CODE = """
import resource, sys, torch
from maetok.runtime.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def use_memory():
    return [torch.ones(2**21) for _ in range(8)]  # 8 MiB each, all freed on return
for _ in range(3):
    use_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use_memory()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(argument: str) -> int:
    # glibc raises its threshold while a process runs, and what it does then depends on how the heap happens to lie;
    # with the initial threshold held fixed, every tensor is mapped anew unless the process asks for something else
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024)}
    command = [sys.executable, "-c", CODE, argument]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(result.stdout)


def test_memory_that_was_used_before_causes_no_page_faults() -> None:
    assert page_faults("keep") < 100 < page_faults("default")


@pytest.fixture
def _setting_of_before() -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    yield
    matmul.fp32_precision = before


@pytest.mark.usefixtures("_setting_of_before")
class TestFastFloat32:
    def test_products_and_their_gradients_stay_float32(self) -> None:
        cpu.use_fast_float32()
        inputs, weight = torch.randn(96, 512, requires_grad=True), torch.randn(320, 512, requires_grad=True)
        output = torch.nn.functional.linear(inputs, weight)
        gradients = torch.autograd.grad(output.square().sum(), (inputs, weight))
        exact_inputs, exact_weight = inputs.double(), weight.double()
        exact = exact_inputs @ exact_weight.T
        expected = torch.autograd.grad(exact.square().sum(), (inputs, weight))
        for found, reference in zip((output, *gradients), (exact, *expected), strict=True):
            assert (found - reference).norm() < 2e-6 * reference.norm()

    def test_a_cpu_that_would_round_keeps_its_setting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = torch.backends.mkldnn.matmul.fp32_precision
        monkeypatch.setattr(cpu, "product_error", lambda: 3e-3)
        assert not cpu.use_fast_float32()
        assert torch.backends.mkldnn.matmul.fp32_precision == before

    def test_cpus_with_matrix_tiles_are_left_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = torch.backends.mkldnn.matmul.fp32_precision
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        assert not cpu.use_fast_float32()
        assert torch.backends.mkldnn.matmul.fp32_precision == before

    def test_rounding_to_bfloat16_would_be_noticed(self) -> None:
        left, right = torch.randn(64, 768).bfloat16(), torch.randn(64, 768).bfloat16()
        exact = left.double() @ right.double().T
        assert ((left @ right.T) - exact).norm() > 1e-3 * exact.norm() > 2e-6 * exact.norm()
        assert cpu.product_error() < 2e-6
