"""The command ``python -m maetok.analysis``: compares the latent spaces of tokenizers by their latent caches."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maetok.analysis.figures import mode_curves
from maetok.analysis.gmm import PAPER_COMPONENT_COUNTS
from maetok.analysis.modes import ModeAnalysis, analyse_modes, table, write_csv, write_json
from maetok.analysis.projection import PrincipalComponents
from maetok.analysis.subsets import class_balanced
from maetok.formats.latent_cache import LatentCache

HELD_OUT_SHARE = 0.2
"""Share of the train split that is held out if a cache has no validation split."""


@dataclass(frozen=True)
class LabelledLatents:
    """Holds the fitting set and the held-out set of one tokenizer's latents."""

    train: np.ndarray
    """(n, L, C) float32."""
    train_labels: np.ndarray
    """(n,) int64."""
    held_out: np.ndarray
    held_out_labels: np.ndarray


def load(cache: LatentCache, per_class: int, seed: int) -> LabelledLatents:
    """Read at most ``per_class`` latents of each class from the train split, and as many from the validation split.

    Without a validation split, a fifth of the latents from the train split is held out.
    """
    labels = cache.labels("train")
    chosen = class_balanced(labels, per_class, seed)
    train = cache.latents("train", chosen), labels[chosen]
    if cache.has("validation"):
        labels = cache.labels("validation")
        chosen = class_balanced(labels, per_class, seed)
        return LabelledLatents(*train, cache.latents("validation", chosen), labels[chosen])
    held_out = np.zeros(len(chosen), dtype=bool)
    order = np.random.Generator(np.random.PCG64([seed, 1])).permutation(len(chosen))
    held_out[order[: round(len(chosen) * HELD_OUT_SHARE)]] = True
    return LabelledLatents(*(part[~held_out] for part in train), *(part[held_out] for part in train))


def short_names(caches: Sequence[Path]) -> list[str]:
    """Return the paths without their common folders; for a single path, its name and the name of its parent."""
    paths = [cache.resolve() for cache in caches]
    common = os.path.commonpath(paths) if len(paths) > 1 else paths[0].parents[1]
    names = [path.relative_to(common).parts for path in paths]
    while len(names) > 1 and all(len(parts) > 1 for parts in names) and len({parts[-1] for parts in names}) == 1:
        names = [parts[:-1] for parts in names]  # a common last part tells nothing either
    return ["/".join(parts) for parts in names]


def compare_modes(
    latents: dict[str, LabelledLatents],
    component_counts: Sequence[int],
    dimensions: int | None,
    explained_variance: float,
    **mixture_options: Any,
) -> list[ModeAnalysis]:
    """Fit mixtures to the latents of each tokenizer, all in the same number of dimensions.

    Without ``dimensions``, the tokenizer that needs the most dimensions to explain the share of the variance decides.
    """
    components = {name: PrincipalComponents.fit(found.train) for name, found in latents.items()}
    if dimensions is None:
        dimensions = max(each.dimensions(explained_variance) for each in components.values())
    return [
        analyse_modes(
            name,
            found.train,
            found.held_out,
            component_counts,
            dimensions,
            components=components[name],
            **mixture_options,
        )
        for name, found in latents.items()
    ]


def parse(args: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m maetok.analysis", description=__doc__)
    parser.add_argument("caches", nargs="+", type=Path, metavar="CACHE", help="folder of a latent cache")
    parser.add_argument("--names", nargs="+", help="names of the tokenizers; default: from the folders")
    parser.add_argument("--output", required=True, type=Path, help="folder for modes.json, modes.csv and modes.png")
    parser.add_argument("--per-class", default=100, type=int, help="largest number of latents of a class and split")
    parser.add_argument("--components", nargs="+", default=PAPER_COMPONENT_COUNTS, type=int)
    parser.add_argument("--covariance", default="full", choices=("full", "diag"))
    dimensions = parser.add_mutually_exclusive_group()
    dimensions.add_argument("--dimensions", type=int, help="principal components to keep")
    dimensions.add_argument("--explained-variance", default=0.9, type=float, help="or the least share to explain")
    parser.add_argument("--restarts", default=3, type=int)
    parser.add_argument("--max-iterations", default=500, type=int)
    parser.add_argument("--regularization", default=1e-6, type=float, help="added to the variances of the mixtures")
    parser.add_argument("--seed", default=0, type=int, help="seeds the choice of latents and the starts of mixtures")
    options = parser.parse_args(args)
    options.names = options.names or short_names(options.caches)
    if len(set(options.names)) < len(options.caches) or len(options.names) > len(options.caches):
        parser.error(
            f"--names {' '.join(options.names)}: give {len(options.caches)} different names, one for each cache"
        )
    return options


def main(args: list[str] | None = None) -> None:
    """Analyse, print the table and write the files."""
    options = parse(args)
    latents = {
        name: load(LatentCache(folder), options.per_class, options.seed)
        for name, folder in zip(options.names, options.caches, strict=True)
    }
    analyses = compare_modes(
        latents,
        options.components,
        options.dimensions,
        options.explained_variance,
        covariance_type=options.covariance,
        restarts=options.restarts,
        max_iterations=options.max_iterations,
        regularization=options.regularization,
        seed=options.seed,
    )
    print(table(analyses))
    write_json(analyses, options.output / "modes.json")
    write_csv(analyses, options.output / "modes.csv")
    mode_curves(analyses).savefig(options.output / "modes.png")
    print(f"modes.json, modes.csv and modes.png are in {options.output}")
