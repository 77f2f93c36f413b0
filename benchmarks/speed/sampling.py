"""Cost of guidance: time per image with it, as a ratio to sampling without: ``python -m benchmarks.speed.sampling``.

Guidance over the whole interval should take at most 2.05 times as long, over half of it at most 1.55 times.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Case, Numbers, run_cases, spread, write_report
from maetok import SiT
from maetok.flow import Euler, index_noise, sample
from maetok.networks import TransformerSize
from maetok.runtime.cpu import tune_cpu

REFERENCE = "without guidance"
GUIDANCE: dict[str, dict[str, Any]] = {
    REFERENCE: {"guidance_scale": 1.0},
    "half of the interval": {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.5)},
    "whole interval": {"guidance_scale": 2.0, "guidance_interval": (0.0, 1.0)},
}
SIZES: dict[str, dict[str, Any]] = {
    "digits": {"latent_tokens": 16, "latent_channels": 8, "num_classes": 10, "size": TransformerSize(128, 5, 4)},
    "SiT-B": {"latent_tokens": 128, "latent_channels": 32, "num_classes": 1000, "size": TransformerSize(768, 12, 12)},
}
AMOUNTS = {"digits": (25, 10), "SiT-B": (2, 4)}
"""Images at a time (digits: as digits_samples.yaml), and an even number of Euler steps, of which half are in half."""


def measure_sampling(size: str, rounds: int) -> Numbers:
    """Return CPU-seconds per image of each case (fastest of interleaved rounds), and ratios to the reference."""
    tune_cpu()  # as tasks do on a CPU
    denoiser = SiT(**SIZES[size]).eval()
    images, steps = AMOUNTS[size]
    labels, shape = torch.arange(images) % 10, (denoiser.latent_tokens, denoiser.latent_channels)
    noise = index_noise(0, torch.arange(images), shape=shape)
    least = dict.fromkeys(GUIDANCE, float("inf"))
    for _ in range(rounds):
        for name, guidance in GUIDANCE.items():
            started = time.process_time()
            sample(denoiser, labels, noise, Euler(steps), **guidance)
            least[name] = min(least[name], (time.process_time() - started) / images)
    ratios = {f"{name}, ratio": least[name] / least[REFERENCE] for name in GUIDANCE}
    return {**least, **ratios}


def main(args: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.sampling", description=__doc__)
    parser.add_argument("--repeats", default=3, type=int)
    parser.add_argument("--rounds", default=5, type=int, help="rounds within a repeat, of which the fastest counts")
    parser.add_argument("--only", nargs="+", default=list(SIZES), choices=list(SIZES), help="denoisers to measure")
    parser.add_argument("--output", type=Path, help="write OUTPUT.md and OUTPUT.json")
    options = parser.parse_args(args)
    function = "benchmarks.speed.sampling:measure_sampling"
    cases = [Case(size, function, {"size": size, "rounds": options.rounds}) for size in options.only]
    results = run_cases(cases, options.repeats)
    lines = ["| denoiser | " + " | ".join(GUIDANCE) + " |", "|---" * (1 + len(GUIDANCE)) + "|"]
    for size, repeats in results.items():
        ratios = [spread([numbers[f"{name}, ratio"] for numbers in repeats], ".2f") for name in GUIDANCE]
        lines.append(f"| {size} | {' | '.join(ratios)} |")
    title = "Time per image as a ratio to sampling without guidance: median (min ... max)"
    write_report(options.output, "Cost of guidance", {title: "\n".join(lines)}, results)


if __name__ == "__main__":
    main()
