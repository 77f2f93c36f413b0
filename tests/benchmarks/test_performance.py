"""What ``python -m benchmarks`` makes of its measurements."""

import json
import math
import time
from pathlib import Path

import pytest
import torch

from benchmarks.harness import Numbers
from benchmarks.speed import consecutive, growth, operators, variants
from benchmarks.speed import report as performance
from benchmarks.speed.report import Target


def burn(seconds: float) -> None:
    """Use so much time of the processor, and one matrix product of 2 * 8**3 FLOPs."""
    torch.ones(8, 8) @ torch.ones(8, 8)
    started = time.process_time()
    while time.process_time() - started < seconds:
        pass


def test_variants_are_compared_in_cpu_seconds_per_image() -> None:
    calls = {"reference": lambda: burn(0.04), "suite": lambda: burn(0.01)}
    numbers = variants.measure(calls, "float32", 2, 3)
    assert numbers["reference seconds min"] >= 0.02
    assert numbers["suite FLOPs"] == 2 * 8**3 / 2
    for name in calls:
        share = numbers[f"{name} FLOPs"] / numbers[f"{name} seconds"] / numbers["limit"]
        assert numbers[f"{name} limit share"] == pytest.approx(share, rel=0.5)
    assert numbers["suite ratio min"] <= numbers["suite ratio"] <= numbers["suite ratio max"]
    assert numbers["suite ratio"] > 1  # the first one is given four times the work
    assert "reference ratio" not in numbers


def test_only_the_suite_runs_with_fast_products() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    seen = {}
    for name in ("reference", "reference, read", "suite", "suite, compiled"):
        with variants.settings_of(name):
            seen[name] = matmul.fp32_precision
    assert matmul.fp32_precision == before
    assert seen["reference"] == seen["reference, read"] == before
    assert seen["suite"] == seen["suite, compiled"]


def test_exponent_of_a_power_law() -> None:
    assert growth.exponent([1, 2, 4, 8], [3 * size**1.7 for size in (1, 2, 4, 8)]) == pytest.approx(1.7)


def measured(ratio: float, share: float) -> Numbers:
    numbers = {"limit": 1e11, "peak MiB": 100.0}
    for name, seconds in (("reference", 0.4), ("suite", 0.4 / ratio)):
        numbers |= {f"{name} seconds": seconds, f"{name} FLOPs": 2e9, f"{name} limit share": share}
        numbers |= {f"{name} seconds min": seconds / 2, f"{name} seconds max": 2 * seconds}
    return numbers | {"suite ratio": ratio, "suite ratio min": ratio - 0.1, "suite ratio max": ratio + 0.1}


def test_the_table_gives_spread_and_target_and_says_what_was_missed() -> None:
    results = {"reached": measured(2.0, 0.8), "slow": measured(1.5, 0.8), "wasteful": measured(2.0, 0.5)}
    targets = dict.fromkeys(results, Target(1.9, limit_share=0.75)) | {"free": None}
    rows = performance.comparison_rows(results, targets)
    assert rows[2] == "| reached | reference | 400.0 (200.0 ... 800.0) | 2.0 | 0.80 |  |  |"
    assert rows[3] == "|  | suite | 200.0 (100.0 ... 400.0) | 2.0 | 0.80 | 2.00 (1.90 ... 2.10) | 1.90, share 0.75 |"
    assert performance.missed(results, targets) == [
        "slow: 1.50 times faster, not 1.90",
        "wasteful: 0.50 of the limit, not 0.75",
    ]


def test_every_case_names_a_function_and_every_target_a_variant() -> None:
    from benchmarks.speed import networks

    cases = performance.comparisons()
    assert len({it.case.name for it in cases}) == len(cases)
    for it in cases:
        assert callable(getattr(networks, it.case.function.split(":")[1]))
        assert it.target is None or it.target.variant in ("suite", "suite, compiled", "suite, drop")


def test_flops_of_an_attention_kernel_are_counted() -> None:
    queries = torch.randn(2, 3, 16, 8)
    call = lambda: torch.nn.functional.scaled_dot_product_attention(queries, queries, queries)  # noqa: E731
    assert variants.count_flops(call) == 2 * math.prod((2, 3, 16, 16, 8, 2))


@pytest.mark.parametrize(
    ("operator", "kind"),
    [("aten::addmm", "matrix products"), ("aten::gelu_backward", "activation"), ("aten::add", "others")],
)
def test_operators_are_sorted_by_name(operator: str, kind: str) -> None:
    assert operators.kind_of(operator) == kind


def test_two_runs_agree_where_the_ranges_of_their_rounds_overlap(tmp_path: Path) -> None:
    runs = ({"a": measured(2.0, 0.8), "b": measured(1.5, 0.8)}, {"a": measured(2.15, 0.8), "b": measured(1.8, 0.8)})
    paths = (tmp_path / "first.json", tmp_path / "second.json")
    for path, run in zip(paths, runs, strict=True):
        repeats = {name: [numbers] for name, numbers in run.items()}
        path.write_text(json.dumps({"repeats": repeats | {"overhead": [{"overhead_share": 0.01}]}}))
    first, second = consecutive.read_runs(paths)
    assert (first, second) == runs
    text = consecutive.consecutive_section(first, second)
    assert "of 2 ratios differ by 20.0 % at most, and the ranges of the rounds overlap for 1 of them" in text
    assert "b, suite: 6.7 % apart" in text  # 1.6 against 1.7
    assert "| a | suite | 2.00 (1.90 ... 2.10) | 2.15 (2.05 ... 2.25) |" in text
