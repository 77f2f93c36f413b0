"""Figures of analyses, as matplotlib objects without windows or global state."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from maetok.analysis.modes import ModeAnalysis

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def mode_curves(analyses: Sequence[ModeAnalysis]) -> "Figure":
    """Draw negative log-likelihood against the number of components, one colour for each tokenizer.

    The curve of the fitting set is dashed, the curve of held-out latents is solid; a circle marks the lowest held-out
    value. A lower curve with fewer components is a simpler space (paper section 4).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=120, layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="components", ylabel="negative log-likelihood (nats per sample)")
    for number, analysis in enumerate(analyses):
        fits, colour = sorted(analysis.fits, key=lambda fit: fit.components), f"C{number}"
        counts, held_out = [fit.components for fit in fits], [fit.nll_held_out for fit in fits]
        axes.plot(counts, [fit.nll_fit for fit in fits], "--", color=colour, alpha=0.7)
        label = f"{analysis.name} ({analysis.dimensions} dimensions)"
        axes.plot(counts, held_out, "-", marker=".", color=colour, label=label)
        axes.plot(analysis.modes_by_held_out_nll, min(held_out), "o", color=colour, fillstyle="none", markersize=9)
    counts = sorted({fit.components for analysis in analyses for fit in analysis.fits})
    axes.set_xticks(counts, labels=[str(count) for count in counts])
    axes.minorticks_off()
    axes.set_title("dashed: fitting set, solid: held out", fontsize="small")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    return figure


def pixels(figure: "Figure") -> np.ndarray:
    """Render a figure as (H, W, 3) uint8."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
