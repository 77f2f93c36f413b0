"""The report of ``python -m tools.study``: writes table, figures and answers into ``docs/study.md``."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from maetok.analysis.modes import ModeAnalysis
from tools.study.measures import COMPONENT_COUNTS, Measures
from tools.study.runs import VARIANTS

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
"""The text between these lines of the document is replaced."""
QUESTION_COMPONENTS = 10


@dataclass(frozen=True)
class Quantity:
    """Describes a number that every tokenizer has."""

    title: str
    of: Callable[[Measures], float]
    form: str = "{:.2f}"
    higher_is_better: bool = False


QUANTITIES = (
    Quantity("PSNR (dB)", lambda m: m.psnr, higher_is_better=True),
    Quantity("PSNR, decoder fine-tuned", lambda m: m.psnr_tuned, higher_is_better=True),
    Quantity("FD of reconstructions", lambda m: m.reconstruction_fd, "{:.0f}"),
    Quantity("FD of reconstructions, decoder fine-tuned", lambda m: m.reconstruction_fd_tuned, "{:.0f}"),
    Quantity("linear probe", lambda m: m.linear_probe, "{:.1%}", higher_is_better=True),
    Quantity("linear probe, pooled", lambda m: m.linear_probe_pooled, "{:.1%}", higher_is_better=True),
    Quantity("k-NN", lambda m: m.nearest_neighbours, "{:.1%}", higher_is_better=True),
    Quantity(f"held-out NLL, {QUESTION_COMPONENTS} components", lambda m: m.nll(QUESTION_COMPONENTS)),
    Quantity("modes by held-out NLL", lambda m: m.modes["modes_by_held_out_nll"], "{:.0f}"),
    Quantity("modes by BIC", lambda m: m.modes["modes_by_bic"], "{:.0f}"),
    Quantity("largest mean norm B", lambda m: max(fit["largest_mean_norm"] for fit in m.modes["fits"])),
    Quantity("diffusion loss", lambda m: m.diffusion_losses[-1], "{:.3f}"),
    Quantity("diffusion loss, bound for normal latents", lambda m: m.gaussian_loss, "{:.3f}"),
    Quantity("FD of samples", lambda m: m.samples_fd, "{:.0f}"),
    Quantity("FD of samples, decoder fine-tuned", lambda m: m.samples_fd_tuned, "{:.0f}"),
)
QUESTIONS = {
    "Is the NLL lower at equal component count?": QUANTITIES[7],
    "Is the linear probe higher?": QUANTITIES[4],
    "Is the diffusion loss lower?": QUANTITIES[11],
    "Is the FD without guidance better?": QUANTITIES[14],
}


def spread(values: Sequence[float], form: str) -> str:
    """Format the mean, with the range if there are several values."""
    text = form.format(mean(values))
    return text if len(values) == 1 else f"{text} ({form.format(min(values))} ... {form.format(max(values))})"


def by_variant(measures: Sequence[Measures]) -> dict[str, list[Measures]]:
    """Group the measurements of all seeds by variant."""
    return {
        name: [m for m in measures if m.variant == name]
        for name in VARIANTS
        if any(m.variant == name for m in measures)
    }


def table(measures: Sequence[Measures]) -> str:
    """Return a table with a row per quantity and a column per variant: mean (lowest ... highest seed)."""
    groups = by_variant(measures)
    rows = ["| | " + " | ".join(VARIANTS[name].title for name in groups) + " |", "|---" * (1 + len(groups)) + "|"]
    for quantity in QUANTITIES:
        cells = [spread([quantity.of(m) for m in group], quantity.form) for group in groups.values()]
        rows.append(f"| {quantity.title} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def verdict(quantity: Quantity, masked: Sequence[Measures], baseline: Sequence[Measures]) -> str:
    """Return whether all seeds of the masked variant are better than all seeds of the baseline."""
    sign = 1 if quantity.higher_is_better else -1
    ours, theirs = ([sign * quantity.of(m) for m in group] for group in (masked, baseline))
    if min(ours) > max(theirs):
        return "yes"
    return "no" if max(ours) < min(theirs) else "within the spread"


def answers(measures: Sequence[Measures]) -> str:
    """Return a table that answers each question for every masked tokenizer against its baselines."""
    groups = by_variant(measures)
    masked = [name for name in groups if VARIANTS[name].is_masked]
    pairs = [(name, base) for name in masked for base in VARIANTS[name].baselines if base in groups]
    heads = [f"{VARIANTS[name].title} / {VARIANTS[base].title}" for name, base in pairs]
    rows = ["| masked / baseline | " + " | ".join(heads) + " |", "|---" * (1 + len(pairs)) + "|"]
    for question, quantity in QUESTIONS.items():
        cells = [verdict(quantity, groups[name], groups[base]) for name, base in pairs]
        rows.append(f"| {question} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def correlations(measures: Sequence[Measures]) -> str:
    """Return a table of Spearman's rank correlations with the FD of samples from fine-tuned decoders."""
    from scipy.stats import spearmanr

    distances = [m.samples_fd_tuned for m in measures]
    rows = ["| with the FD of samples | rank correlation | p |", "|---|---|---|"]
    for quantity in QUANTITIES:
        values = [quantity.of(m) for m in measures]
        if quantity.title != QUESTIONS["Is the FD without guidance better?"].title and len(set(values)) > 1:
            found = spearmanr(values, distances)
            rows.append(f"| {quantity.title} | {found.statistic:.2f} | {found.pvalue:.3f} |")
    return "\n".join(rows)


def curve(axes: Any, x: Sequence[float], curves: Sequence[Sequence[float]], **style: Any) -> None:
    """Draw the mean over seeds, with the range as a band."""
    values = np.array(curves)
    (line,) = axes.plot(x, values.mean(0), **style)
    axes.fill_between(x, values.min(0), values.max(0), alpha=0.2, color=line.get_color())


def draw(measures: Sequence[Measures], path: Path) -> None:
    """Draw NLL against components, diffusion loss against steps, and FD of samples against the probe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), layout="constrained")
    components, losses, scatter = figure.subplots(1, 3)
    for (name, group), colour in zip(by_variant(measures).items(), itertools.count()):
        style = {"color": f"C{colour}", "label": VARIANTS[name].title}
        fits = [ModeAnalysis.from_dict(m.modes).fits for m in group]
        curve(components, COMPONENT_COUNTS, [[fit.nll_held_out for fit in each] for each in fits], marker=".", **style)
        curve(losses, group[0].diffusion_steps, [m.diffusion_losses for m in group], **style)
        scatter.scatter([m.linear_probe for m in group], [m.samples_fd_tuned for m in group], **style)
    components.set(xscale="log", xlabel="components", ylabel="held-out NLL (nats per sample)")
    components.set_xticks(COMPONENT_COUNTS, [str(count) for count in COMPONENT_COUNTS])
    components.minorticks_off()
    losses.set(xlabel="training steps of the SiT", ylabel="validation loss")
    scatter.set(xlabel="linear probe", ylabel="FD of samples without guidance")
    components.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def write(measures: Sequence[Measures], document: Path) -> None:
    """Replace the results in the document and draw its figure beside it.

    Raises:
        ValueError: if the document lacks the lines that enclose the results.
    """
    text = document.read_text() if document.exists() else f"# The study\n\n{BEGIN}\n{END}\n"
    if BEGIN not in text or END not in text:
        raise ValueError(f"{document} lacks the lines {BEGIN} and {END}, between which results are written")
    figure = document.with_suffix(".png")
    draw(measures, figure)
    seeds = len({m.seed for m in measures})
    parts = [
        f"Mean of {seeds} seeds (lowest ... highest):" if seeds > 1 else "One seed:",
        table(measures),
        f"![Curves]({figure.name})",
        "Is it better than the baseline with every seed (yes), or worse with every seed (no)?",
        answers(measures),
        f"Spearman's rank correlation over the {len(measures)} tokenizers:",
        correlations(measures),
    ]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    document.write_text(before + BEGIN + "\n" + "\n\n".join(parts) + "\n" + END + after)
