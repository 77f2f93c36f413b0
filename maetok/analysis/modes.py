"""The modes of a tokenizer's latent space: mixtures with several numbers of components, and their table in files."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from maetok.analysis.gmm import MixtureFit, check_component_counts, fit_mixtures
from maetok.analysis.projection import PrincipalComponents


@dataclass(frozen=True)
class ModeAnalysis:
    """Holds the mixtures fitted to the latents of one tokenizer, with the settings of the fit."""

    name: str
    """Name of the tokenizer."""
    samples: int
    held_out_samples: int
    dimensions: int
    """Number of principal components kept."""
    explained_variance: float
    """Their share of the variance of the fitting set, in [0, 1]."""
    log_scale: float
    """Add this to an NLL of standardised latents to get the NLL of their principal components; nats per sample."""
    covariance_type: str
    fits: tuple[MixtureFit, ...]

    @property
    def modes_by_held_out_nll(self) -> int:
        """Number of components with the lowest negative log-likelihood on held-out latents."""
        return min(self.fits, key=lambda fit: fit.nll_held_out).components

    @property
    def modes_by_bic(self) -> int:
        """Number of components with the lowest Bayesian information criterion."""
        return min(self.fits, key=lambda fit: fit.bic).components

    def to_dict(self) -> dict[str, Any]:
        """Return all fields and the two estimates of the number of modes, for JSON."""
        estimates = {"modes_by_held_out_nll": self.modes_by_held_out_nll, "modes_by_bic": self.modes_by_bic}
        return asdict(self) | estimates

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModeAnalysis":
        """Return the analysis that :meth:`to_dict` turned into a dictionary."""
        own = {field.name: values[field.name] for field in fields(cls)}
        return cls(**own | {"fits": tuple(MixtureFit(**fit) for fit in values["fits"])})


def analyse_modes(
    name: str,
    train: np.ndarray,
    held_out: np.ndarray,
    component_counts: Sequence[int],
    dimensions: int | None = None,
    explained_variance: float = 0.9,
    components: PrincipalComponents | None = None,
    **mixture_options: Any,
) -> ModeAnalysis:
    """Fit mixtures to the standardised principal components of flattened latents (paper section 4).

    Args:
        name: name of the tokenizer.
        train: (n, L, C) latents to fit, of any float dtype.
        held_out: (m, L, C) other latents.
        component_counts: numbers of components.
        dimensions: principal components to keep; one number for all tokenizers makes their likelihoods comparable.
        explained_variance: without ``dimensions``, keep as many as explain more than this share of the variance.
        components: principal components of ``train``, if they are already known.
        mixture_options: other arguments of :func:`maetok.analysis.gmm.fit_mixtures`.

    Raises:
        ValueError: if there are too few samples for the components or dimensions.
    """
    check_component_counts(component_counts, len(train))
    components = components or PrincipalComponents.fit(train)
    kept = components.dimensions(explained_variance) if dimensions is None else dimensions
    projected = components.standardised(train, kept), components.standardised(held_out, kept)
    fits = fit_mixtures(*projected, component_counts, **mixture_options)
    return ModeAnalysis(
        name=name,
        samples=len(train),
        held_out_samples=len(held_out),
        dimensions=kept,
        explained_variance=components.explained_variance(kept),
        log_scale=components.log_scale(kept),
        covariance_type=mixture_options.get("covariance_type", "full"),
        fits=tuple(fits),
    )


def write_json(analyses: Sequence[ModeAnalysis], path: Path) -> None:
    """Write analyses as JSON and make the folder; :func:`read_json` restores them exactly."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([analysis.to_dict() for analysis in analyses], indent=1) + "\n")


def read_json(path: Path) -> list[ModeAnalysis]:
    """Return the analyses that :func:`write_json` wrote."""
    return [ModeAnalysis.from_dict(values) for values in json.loads(path.read_text())]


def write_csv(analyses: Sequence[ModeAnalysis], path: Path) -> None:
    """Write one CSV row for each tokenizer and number of components; make the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for analysis in analyses:
        shared = {key: value for key, value in asdict(analysis).items() if key != "fits"}
        rows += [shared | asdict(fit) for fit in analysis.fits]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def table(analyses: Sequence[ModeAnalysis]) -> str:
    """Return lines of text: for each tokenizer its estimates, then a line for each number of components."""
    lines = []
    for analysis in analyses:
        lines += [
            f"{analysis.name}: {analysis.samples} latents in {analysis.dimensions} dimensions "
            f"({analysis.explained_variance:.1%} of the variance), {analysis.held_out_samples} held out; modes: "
            f"{analysis.modes_by_held_out_nll} by held-out NLL, {analysis.modes_by_bic} by BIC",
            f"{'components':>10}{'NLL':>10}{'held out':>10}{'BIC':>14}{'mean norm':>11}{'weight':>10}{'converged':>11}",
        ]
        lines += [
            f"{fit.components:>10}{fit.nll_fit:>10.3f}{fit.nll_held_out:>10.3f}{fit.bic:>14.1f}"
            f"{fit.largest_mean_norm:>11.2f}{fit.smallest_weight:>10.5f}{'yes' if fit.converged else 'no':>11}"
            for fit in analysis.fits
        ]
    return "\n".join(lines)
