"""The cases of ``python -m benchmarks``, and how their numbers become tables and plots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness import Case, Numbers
from benchmarks.speed.variants import SUITE


@dataclass(frozen=True)
class Target:
    """The target of a case.

    Args:
        ratio: how many times faster than the reference the variant must be.
        variant: name of the suite's variant.
        limit_share: share of the rate of matrix products that it must reach.
    """

    ratio: float
    variant: str = SUITE
    limit_share: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """A case of networks with its target.

    Args:
        case: case to run; it gets a number of rounds.
        target: target to reach, if there is one.
        quick: whether ``make bench`` runs it.
        full: whether ``--full`` runs it.
        most_rounds: for cases of minutes per round.
    """

    case: Case
    target: Target | None = None
    quick: bool = False
    full: bool = True
    most_rounds: int = 100


def network_case(name: str, function: str, **arguments: object) -> Case:
    """Return a case of :mod:`benchmarks.speed.networks`."""
    return Case(name, f"benchmarks.speed.networks:{function}", arguments)


def tokenizer_comparisons() -> list[Comparison]:
    """Return the cases of encoding, decoding and training steps."""
    found = []
    for part in ("encode", "decode"):
        for precision, ratio in (("float32", 2.0), ("bfloat16", 1.15)):
            arguments = {"part": part, "precision": precision, "images": 2}
            case = network_case(f"tokenizer {part}, {precision}", "tokenizer_inference", **arguments)
            found.append(Comparison(case, Target(ratio), quick=True))
    for precision, ratio, share in (("float32", 1.85, 0.75), ("bfloat16", 1.15, 0.7)):
        for images, target in ((2, Target(ratio, "suite, compiled", share)), (4, None)):
            name = f"tokenizer step, batch {images}, {precision}"
            case = network_case(name, "tokenizer_step", precision=precision, images=images)
            found.append(Comparison(case, target))
        eager = network_case(
            f"tokenizer step, not compiled, {precision}",
            "tokenizer_step",
            precision=precision,
            images=1,
            compiled=False,
        )
        found.append(Comparison(eager, quick=True, full=False))
    return found


def denoiser_comparisons() -> list[Comparison]:
    """Return the cases of forward passes and training steps of SiT."""
    found = []
    for size, images in (("B", 8), ("XL", 4)):
        for function, noun, ratios in (("sit_forward", "forward", (1.9, 1.1)), ("sit_step", "step", (1.9, 1.0))):
            for precision, ratio in zip(("float32", "bfloat16"), ratios, strict=True):
                arguments = {"size": size, "tokens": 128, "precision": precision, "images": images}
                case = network_case(f"SiT-{size} {noun}, 128 tokens, {precision}", function, **arguments)
                variant = SUITE if noun == "forward" else "suite, compiled"
                needed = 1.0 if size == "B" and noun == "forward" and precision == "bfloat16" else ratio
                target = Target(needed, variant)
                quick = size == "B" and noun == "forward"
                found.append(Comparison(case, target, quick=quick, most_rounds=3 if size == "XL" else 100))
    for images, ratio in ((1, 1.35), (16, 1.0)):
        arguments = {"size": "XL", "tokens": 128, "precision": "bfloat16", "images": images}
        case = network_case(f"SiT-XL forward, batch {images}, bfloat16", "sit_forward", **arguments)
        found.append(Comparison(case, Target(ratio)))
    for function, noun in (("sit_forward", "forward"), ("sit_step", "step")):
        for precision in ("float32", "bfloat16"):
            arguments = {"size": "XL", "tokens": 1024, "precision": precision, "images": 1}
            case = network_case(f"SiT-XL {noun}, 1024 tokens, {precision}", function, **arguments)
            variant = SUITE if noun == "forward" else "suite, compiled"
            target = Target(2.0, variant) if precision == "float32" else None
            found.append(Comparison(case, target, most_rounds=2))
    return found


def comparisons() -> list[Comparison]:
    """Return all cases of suite against reference, in the order of the table."""
    found = tokenizer_comparisons() + denoiser_comparisons()
    for precision, ratio in (("float32", 3.6), ("bfloat16", 2.1)):
        case = network_case(
            f"SiT-B guided sampling, {precision}", "guided_sampling", size="B", precision=precision, images=2
        )
        found.append(Comparison(case, Target(ratio), quick=precision == "float32"))
    for side in (256, 512):
        arguments = {"side": side, "images": 2 if side == 256 else 1}
        case = network_case(f"tokenizer step, {side} px, half of the patches masked", "mask_modes", **arguments)
        found.append(Comparison(case, Target(1.25, "suite, drop"), quick=side == 256))
    return found


def surroundings(full: bool) -> dict[str, str]:
    """Return cases of :mod:`benchmarks.speed.system` by name."""
    quick = {
        "moving average of SiT-B": "benchmarks.speed.system:moving_average",
        "start-up": "benchmarks.speed.system:start_up",
    }
    others = {
        "optimizer, gradient norm and average of SiT-B": "benchmarks.speed.system:update",
        "checkpoint of SiT-B, 2.1 GB": "benchmarks.speed.system:checkpoints",
    }
    return quick | others if full else quick


GROWTH = {
    "encode, by batch": "benchmarks.speed.growth:batch",
    "encode, by side of the image": "benchmarks.speed.growth:resolution",
    "SiT-B, by latent tokens": "benchmarks.speed.growth:tokens",
}


def variants_of(numbers: Numbers) -> list[str]:
    """Return the names of the measured variants of a case, the reference first."""
    return [name.removesuffix(" seconds") for name in numbers if name.endswith(" seconds")]


def comparison_rows(results: Mapping[str, Numbers], targets: Mapping[str, Target | None]) -> list[str]:
    """Return a line for each variant of each case: time, FLOPs, share of the limit, ratio and target."""
    lines = [
        "| case | variant | ms per image: median (min ... max) | GFLOP per image | share of the limit "
        "| times faster: median (min ... max) | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, numbers in results.items():
        target = targets[case]
        for place, variant in enumerate(variants_of(numbers)):
            aimed = target if target is not None and target.variant == variant else None
            reached = (
                f"{aimed.ratio:.2f}" + (f", share {aimed.limit_share:.2f}" if aimed.limit_share else "")
                if aimed
                else ""
            )
            cells = [
                "" if place else case,
                variant,
                spread_of(numbers, f"{variant} seconds", 1000, ".1f"),
                f"{numbers[f'{variant} FLOPs'] / 1e9:.1f}",
                f"{numbers[f'{variant} limit share']:.2f}",
                spread_of(numbers, f"{variant} ratio", 1, ".2f") if f"{variant} ratio" in numbers else "",
                reached,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def token_rows(results: Mapping[str, Numbers]) -> list[str]:
    """Return the cost of SiT-XL at 1024 tokens, relative to 128: times of the suite and FLOPs per image."""
    lines = ["| SiT-XL, 1024 tokens against 128 | time | FLOPs |", "|---|---|---|"]
    for noun in ("forward", "step"):
        for precision in ("float32", "bfloat16"):
            pair = [results.get(f"SiT-XL {noun}, {tokens} tokens, {precision}") for tokens in (1024, 128)]
            if None not in pair:
                ratios = [pair[0][key] / pair[1][key] for key in (f"{SUITE} seconds", f"{SUITE} FLOPs")]
                lines.append(f"| {noun}, {precision} | {ratios[0]:.2f} times | {ratios[1]:.2f} times |")
    return lines if len(lines) > 2 else []


def spread_of(numbers: Numbers, name: str, factor: float, form: str) -> str:
    """Return ``median (min ... max)`` of a number of a case."""
    low, high = numbers[f"{name} min"], numbers[f"{name} max"]
    return f"{factor * numbers[name]:{form}} ({factor * low:{form}} ... {factor * high:{form}})"


def missed(results: Mapping[str, Numbers], targets: Mapping[str, Target | None]) -> list[str]:
    """Return sentences about the missed targets."""
    found = []
    for case, numbers in results.items():
        target = targets[case]
        if target is None:
            continue
        ratio, share = numbers[f"{target.variant} ratio"], numbers[f"{target.variant} limit share"]
        if ratio < target.ratio:
            found.append(f"{case}: {ratio:.2f} times faster, not {target.ratio:.2f}")
        if share < target.limit_share:
            found.append(f"{case}: {share:.2f} of the limit, not {target.limit_share:.2f}")
    return found


def join_lines(lines: Sequence[str]) -> str:
    """Return lines as one block of Markdown."""
    return "\n".join(lines)
