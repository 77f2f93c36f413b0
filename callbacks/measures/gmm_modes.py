"""Number of modes of the latent space by Gaussian mixtures: fewer modes are easier for a diffusion model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.latents import gather_latents
from callbacks.pictures.drawing import save_png
from callbacks.schedule import forget_metrics, is_due, training_step
from maetok.analysis.figures import mode_curves, pixels
from maetok.analysis.gmm import PAPER_COMPONENT_COUNTS, check_component_counts
from maetok.analysis.modes import ModeAnalysis, analyse_modes, write_csv, write_json
from maetok.analysis.subsets import class_balanced


class GMMModes(Callback):
    """Fits mixtures of several numbers of components to training latents and measures them on validation latents.

    Logs ``validation/gmm_modes_nll`` and ``validation/gmm_modes_bic``, the numbers of components with the lowest
    held-out negative log-likelihood and the lowest BIC, and for each number K of components ``gmm_nll/K``,
    ``gmm_nll_held_out/K`` (nats per sample), ``gmm_bic/K``, ``gmm_largest_mean_norm/K``, ``gmm_smallest_weight/K`` and
    ``gmm_converged/K`` (1 or 0). The curves go to TensorBoard and ``pictures/``, everything as JSON and CSV to
    ``analysis/`` in the run directory.

    Runs in the validation of the last step, and in ``validate`` and ``test``. The datamodule must offer
    ``evaluation_dataloader(split, max_samples)``, and for ``every_n_epochs`` also ``position``, ``epoch_samples`` and
    ``batch_size``. The first process fits, on its GPU if it has one, while the others wait: keep the work small enough
    for the collective time limit.

    Args:
        component_counts: numbers of components; those of the paper by default.
        dimensions: principal components to keep; the same for all runs that are to be compared.
        explained_variance: where ``dimensions`` is not given, keep those that explain more than this share.
        covariance_type: of the components.
        per_class: largest number of latents of a class, of each split.
        max_samples: largest number of samples encoded of each split, taken evenly from all of it.
        restarts: starts of each mixture, of which the best counts.
        max_iterations: limit of iterations of each.
        regularization: added to the variances of the components, which are of standardised latents.
        seed: of the choice of latents and of the starts.
        every_n_steps: run as well in the first validation at or after each multiple of this step; 0 for no such.
        every_n_epochs: run as well in the first validation after each so many passes through the data; 0 for no such.
    """

    def __init__(
        self,
        component_counts: Sequence[int] = PAPER_COMPONENT_COUNTS,
        dimensions: int | None = None,
        explained_variance: float = 0.9,
        covariance_type: Literal["full", "diag"] = "full",
        per_class: int = 100,
        max_samples: int = 10_000,
        restarts: int = 3,
        max_iterations: int = 500,
        regularization: float = 1e-6,
        seed: int = 0,
        every_n_steps: int = 0,
        every_n_epochs: int = 0,
    ) -> None:
        self.component_counts, self.dimensions = component_counts, dimensions
        self.explained_variance, self.covariance_type = explained_variance, covariance_type
        self.per_class, self.max_samples, self.seed = per_class, max_samples, seed
        self.restarts, self.max_iterations, self.regularization = restarts, max_iterations, regularization
        self.every_n_steps, self.every_n_epochs = every_n_steps, every_n_epochs

    def measures(self, trainer: Trainer) -> bool:
        """Whether to run in this validation."""
        if is_due(trainer, self.every_n_steps):
            return True
        if not self.every_n_epochs:
            return False
        data = trainer.datamodule  # type: ignore[attr-defined]
        period = self.every_n_epochs * data.epoch_samples
        before = max(0, data.position - int(trainer.val_check_batch) * data.batch_size)  # at the last validation
        return data.position // period > before // period

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Encode both splits, fit, log, draw, write."""
        if trainer.sanity_checking:
            return
        if not self.measures(trainer):
            forget_metrics(trainer, "validation/gmm_modes", "gmm_")
            return
        train, held_out = (self.balanced_latents(trainer, pl_module, split) for split in ("train", "validation"))
        check_component_counts(self.component_counts, len(train))  # on all processes, so that none waits for the first
        analysis = self.analyse(trainer, train, held_out) if trainer.is_global_zero else None
        analysis = trainer.strategy.broadcast(analysis)
        assert analysis is not None
        self.log_scalars(pl_module, analysis)
        if trainer.is_global_zero:
            self.write(trainer, training_step(trainer, pl_module), analysis)

    on_test_epoch_end = on_validation_epoch_end

    def balanced_latents(self, trainer: Trainer, pl_module: Any, split: str) -> np.ndarray:
        """(n, L, C) float32 latents of a split, with at most ``per_class`` of a class."""
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
        """Draw the curves, and write JSON and CSV."""
        run, name = Path(trainer.default_root_dir), f"gmm_modes_step={step:09d}"
        picture = torch.from_numpy(pixels(mode_curves([analysis]))).permute(2, 0, 1) / 255
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("GMM modes", picture, step)
        save_png(picture, run / "pictures" / f"{name}.png")
        write_json([analysis], run / "analysis" / f"{name}.json")
        write_csv([analysis], run / "analysis" / f"{name}.csv")
