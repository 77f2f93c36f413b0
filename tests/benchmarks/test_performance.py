"""``python -m benchmarks``: its measurements and the tables that it makes of them."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import Numbers
from benchmarks.speed import consecutive, growth, operators, variants
from benchmarks.speed import report as performance
from benchmarks.speed.report import Target


class Clock:
    """Stands in for ``time``: CPU-seconds pass only when a variant adds them."""

    now = 0.0

    def process_time(self) -> float:
        return self.now


def test_variants_take_turns_and_are_compared_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = Clock(), []
    monkeypatch.setattr(variants, "time", clock)
    limits = iter([100.0, 200.0, 400.0])
    monkeypatch.setattr(variants, "matrix_product", lambda precision: next(limits))
    seconds = {"reference": iter([50.0, 4.0, 8.0, 12.0]), "suite": iter([60.0, 1.0, 4.0, 3.0])}  # first: warm-up

    def call(name: str) -> None:
        order.append(name)
        torch.ones(8, 8) @ torch.ones(8, 8)
        clock.now += next(seconds[name])

    numbers = variants.measure({name: lambda name=name: call(name) for name in seconds}, "float32", 2, 3)
    assert order == ["reference", "suite"] * 2 + ["suite", "reference"] + ["reference", "suite"]
    expected = {
        "images": 2,
        "limit": 200.0,
        "reference FLOPs": 512.0,  # 2 * 8**3 for two images
        "suite FLOPs": 512.0,
    }
    median_min_max = {
        "reference seconds": (4.0, 2.0, 6.0),
        "suite seconds": (1.5, 0.5, 2.0),
        "suite ratio": (4.0, 2.0, 4.0),  # 2 / 0.5, 4 / 2, 6 / 1.5; the medians alone would give 2.67
        "reference limit share": (512 / 4 / 200, 512 / 6 / 400, 512 / 2 / 100),
        "suite limit share": (512 / 2 / 200, 512 / 1.5 / 400, 512 / 0.5 / 100),
    }
    for name, values in median_min_max.items():
        expected |= dict(zip((name, f"{name} min", f"{name} max"), values, strict=True))
    assert numbers.pop("peak MiB") > 10
    assert numbers == pytest.approx(expected)


def test_only_the_suite_runs_with_fast_products(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul, calls, seen = torch.backends.mkldnn.matmul, [], {}

    def fast() -> None:
        calls.append(None)
        matmul.fp32_precision = "bf16"

    monkeypatch.setattr(variants, "use_fast_float32", fast)
    matmul.fp32_precision = "ieee"
    try:
        for name in ("reference", "reference, read", "suite", "suite, compiled"):
            with variants.settings_of(name):
                seen[name] = (matmul.fp32_precision, len(calls))
            assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = "none"
    assert seen == {
        "reference": ("ieee", 0),
        "reference, read": ("ieee", 0),
        "suite": ("bf16", 1),
        "suite, compiled": ("bf16", 2),
    }


def test_the_limit_is_the_rate_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 3.0, 10.0, 12.0, 20.0, 25.0] + [30.0, 33.0] * 5)
    monkeypatch.setattr(variants, "time", SimpleNamespace(process_time=lambda: next(times)))
    assert variants.matrix_product("bfloat16") == 2 * 1536 * 768 * 3072 / 2.0


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
    assert len({it.case.name for it in cases}) == len(cases) > 10
    assert sum(it.target is not None for it in cases) > 5
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
