"""Number of modes of the latent space, by Gaussian mixtures: fewer modes are easier for a diffusion model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveFloat, PositiveInt
from lightning.pytorch import Callback, Trainer

from callbacks.latents import gather_latents
from callbacks.pictures.drawing import show_picture
from callbacks.schedule import current_step, forget_metrics, is_due
from maetok.analysis.figures import mode_curves, pixels
from maetok.analysis.gmm import PAPER_COMPONENT_COUNTS, check_component_counts
from maetok.analysis.modes import ModeAnalysis, analyse_modes, write_csv, write_json
from maetok.analysis.subsets import class_balanced


class GMMModes(Callback):
    """Fits mixtures with several numbers of components to training latents and measures them on validation latents.

    Logs ``validation/gmm_modes_nll`` and ``validation/gmm_modes_bic``, the numbers of components with the lowest
    held-out negative log-likelihood and the lowest BIC, and for each number K of components ``gmm_nll/K``,
    ``gmm_nll_held_out/K`` (nats per sample), ``gmm_bic/K``, ``gmm_largest_mean_norm/K``, ``gmm_smallest_weight/K`` and
    ``gmm_converged/K`` (1 or 0). The curves go to TensorBoard and ``pictures/``; all numbers go to
    ``analysis/`` in the run directory as JSON and CSV.

    The callback runs in the validation of the last step, in ``validate`` and in ``test``. The datamodule must offer
    ``evaluation_dataloader(split, max_samples)``, and for ``every_n_epochs`` also ``position``, ``epoch_samples`` and
    ``batch_size``. The first process fits on its CPU and the other processes wait: keep the work shorter than the
    collective time limit.

    Args:
        component_counts: numbers of components; the paper's by default.
        dimensions: number of principal components to keep; only runs with the same number compare.
        explained_variance: without ``dimensions``, keep as many as explain more than this share of the variance.
        covariance_type: a full covariance for each component, or a diagonal one.
        per_class: largest number of latents of a class in each split.
        max_samples: largest number of samples to encode from each split, spread evenly over it.
        restarts: number of starts of each mixture; the best one counts.
        max_iterations: limit of iterations of each start.
        regularization: added to the variances of the components, in units of standardised latents.
        seed: seeds the choice of latents and the starts.
        every_n_steps: run also in the first validation at or after each multiple of this step; 0 to disable.
        every_n_epochs: run also in the first validation after each such number of passes through the data; 0 to
            disable.
    """

    def __init__(
        self,
        component_counts: Sequence[PositiveInt] = PAPER_COMPONENT_COUNTS,
        dimensions: PositiveInt | None = None,
        explained_variance: OpenUnitInterval = 0.9,
        covariance_type: Literal["full", "diag"] = "full",
        per_class: PositiveInt = 100,
        max_samples: PositiveInt = 10_000,
        restarts: PositiveInt = 3,
        max_iterations: PositiveInt = 500,
        regularization: PositiveFloat = 1e-6,
        seed: NonNegativeInt = 0,
        every_n_steps: NonNegativeInt = 0,
        every_n_epochs: NonNegativeInt = 0,
    ) -> None:
        self.component_counts, self.dimensions = component_counts, dimensions
        self.explained_variance, self.covariance_type = explained_variance, covariance_type
        self.per_class, self.max_samples, self.seed = per_class, max_samples, seed
        self.restarts, self.max_iterations, self.regularization = restarts, max_iterations, regularization
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs

    def measures(self, trainer: Trainer) -> bool:
        """Return whether to run in this validation."""
        if is_due(trainer, self.every_n_steps):
            return True
        if not self.every_n_epochs:
            return False
        data = trainer.datamodule  # type: ignore[attr-defined]
        period = self.every_n_epochs * data.epoch_samples
        before = max(0, data.position - int(trainer.val_check_batch) * data.batch_size)  # at the last validation
        return data.position // period > before // period

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Encode both splits, fit, log, draw and write."""
        if trainer.sanity_checking:
            return
        if not self.measures(trainer):
            forget_metrics(trainer, "validation/gmm_modes", "gmm_")
            return
        train, held_out = (self.balanced_latents(trainer, pl_module, split) for split in ("train", "validation"))
        check_component_counts(self.component_counts, len(train))  # all processes raise, so none waits for the first
        analysis = self.analyse(trainer, train, held_out) if trainer.is_global_zero else None
        analysis = trainer.strategy.broadcast(analysis)
        assert analysis is not None
        self.log_scalars(pl_module, analysis)
        if trainer.is_global_zero:
            self.write(trainer, current_step(trainer, pl_module), analysis)

    on_test_epoch_end = on_validation_epoch_end

    def balanced_latents(self, trainer: Trainer, pl_module: Any, split: str) -> np.ndarray:
        """Return latents (n, L, C) float32 of a split, at most ``per_class`` of a class."""
        latents, labels = gather_latents(trainer, pl_module, split, self.max_samples)
        return latents[class_balanced(labels, self.per_class, self.seed)]

    def analyse(self, trainer: Trainer, train: np.ndarray, held_out: np.ndarray) -> ModeAnalysis:
        """Fit the mixtures on the CPU."""
        return analyse_modes(
            Path(trainer.default_root_dir).name,
            train,
            held_out,
            self.component_counts,
            self.dimensions,
            self.explained_variance,
            covariance_type=self.covariance_type,
            restarts=self.restarts,
            max_iterations=self.max_iterations,
            regularization=self.regularization,
            seed=self.seed,
        )

    def log_scalars(self, pl_module: Any, analysis: ModeAnalysis) -> None:
        """Log the estimates of the number of modes and the curves."""
        scalars = {
            "validation/gmm_modes_nll": float(analysis.modes_by_held_out_nll),
            "validation/gmm_modes_bic": float(analysis.modes_by_bic),
        }
        for fit in analysis.fits:
            scalars[f"gmm_nll/{fit.components}"] = fit.nll_fit
            scalars[f"gmm_nll_held_out/{fit.components}"] = fit.nll_held_out
            scalars[f"gmm_bic/{fit.components}"] = fit.bic
            scalars[f"gmm_largest_mean_norm/{fit.components}"] = fit.largest_mean_norm
            scalars[f"gmm_smallest_weight/{fit.components}"] = fit.smallest_weight
            scalars[f"gmm_converged/{fit.components}"] = float(fit.converged)
        pl_module.log_dict(scalars, rank_zero_only=True)

    def write(self, trainer: Trainer, step: int, analysis: ModeAnalysis) -> None:
        """Draw the curves and write JSON and CSV."""
        run, name = Path(trainer.default_root_dir), f"gmm_modes_step={step:09d}"
        picture = torch.from_numpy(pixels(mode_curves([analysis]))).permute(2, 0, 1) / 255
        show_picture(trainer, "GMM modes", picture, step, "gmm_modes_")
        write_json([analysis], run / "analysis" / f"{name}.json")
        write_csv([analysis], run / "analysis" / f"{name}.csv")
