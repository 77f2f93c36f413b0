"""A cheap forecast of generation quality, while the tokenizer still trains."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer

from callbacks.latents import gather_latents
from callbacks.schedule import forget_metrics, is_due
from maetok.analysis import linear_probe_accuracy
from maetok.analysis.gmm import check_component_counts, fit_mixtures
from maetok.analysis.projection import PrincipalComponents


class EarlySignal(Callback):
    """Measures in the validations of some steps what the paper says decides how well a diffusion model will do.

    Latents of both splits are encoded once. On those of the training split a linear classifier, Gaussian mixtures and a
    small SiT are trained from scratch, always in the same way, and measured on the validation split:
    ``early/linear_probe`` in [0, 1], the higher the better; ``early/nll/K`` in nats per sample for mixtures of K
    components in the first, standardised principal components; and ``early/diffusion_loss`` of latents normalised per
    channel, where predicting nothing gives 2. The lower the better both, at equal reconstruction: latents that know
    nothing of their images, as before training, are the simplest. Numbers compare between steps and runs of the same
    data and latent shape. Training goes on as if nothing had been measured. The first process measures while the
    others wait: keep it short enough for the collective time limit.

    Args:
        every_n_steps: measure in the first validation at or after each multiple of this step, and in the last one; 0
            for the last one only.
        max_samples: largest number of samples from each split, taken evenly from all of it.
        components: numbers of components of the mixtures.
        dimensions: principal components in which mixtures are fitted.
        diffusion_steps: training steps of the small SiT.
        iterations: limit of iterations of the linear classifier.
    """

    def __init__(
        self,
        every_n_steps: int,
        max_samples: int = 2000,
        components: Sequence[int] = (5, 10, 20),
        dimensions: int = 16,
        diffusion_steps: int = 300,
        iterations: int = 100,
    ) -> None:
        check_component_counts(components, max_samples)
        self.every_n_steps, self.max_samples, self.iterations = every_n_steps, max_samples, iterations
        self.components, self.dimensions, self.diffusion_steps = components, dimensions, diffusion_steps

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Gather latents on all processes, measure on the first, log on all."""
        if trainer.sanity_checking:
            return
        if not is_due(trainer, self.every_n_steps):
            forget_metrics(trainer, "early/")
            return
        with torch.random.fork_rng(devices=[]):  # loaders draw a seed for their workers
            train, validation = (
                gather_latents(trainer, pl_module, split, self.max_samples) for split in ("train", "validation")
            )
        numbers = self.measure(*train, *validation, pl_module.device) if trainer.is_global_zero else {}
        for name, number in trainer.strategy.broadcast(numbers).items():
            pl_module.log(f"early/{name}", number, rank_zero_only=True)

    def measure(
        self,
        train_latents: np.ndarray,
        train_labels: np.ndarray,
        latents: np.ndarray,
        labels: np.ndarray,
        device: torch.device | str = "cpu",
    ) -> dict[str, float]:
        """Numbers by name, from latents (n, L, C) and labels (n,) of both splits."""
        from maetok.analysis.short_diffusion import short_diffusion_loss

        samples = train_latents, train_labels, latents, labels
        projection = PrincipalComponents.fit(train_latents)
        points = (projection.standardised(values, self.dimensions) for values in (train_latents, latents))
        fits = fit_mixtures(*points, self.components, restarts=1, max_iterations=100)
        return {
            "linear_probe": linear_probe_accuracy(*samples, self.iterations).value,
            **{f"nll/{fit.components}": fit.nll_held_out for fit in fits},
            "diffusion_loss": short_diffusion_loss(*samples, self.diffusion_steps, device),
        }
