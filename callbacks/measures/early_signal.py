"""A cheap forecast of generation quality during the training of the tokenizer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import Callback, Trainer

from callbacks.latents import gather_latents
from callbacks.schedule import forget_metrics, is_due
from maetok.analysis import linear_probe_accuracy
from maetok.analysis.gmm import check_component_counts, fit_mixtures
from maetok.analysis.projection import PrincipalComponents


class EarlySignal(Callback):
    """Measures properties of the latents that, by the paper, decide how well a diffusion model will do.

    The callback encodes both splits. It trains a linear classifier, Gaussian mixtures and a small SiT from scratch on
    the training latents, always in the same way, and measures them on the validation latents:

    - ``early/linear_probe`` in [0, 1]; higher is better.
    - ``early/nll/K`` in nats per sample, for a mixture of K components in the first standardised principal components.
    - ``early/diffusion_loss`` of latents normalised per channel, where predicting nothing gives 2.

    For both losses lower is better, at equal reconstruction: latents without information about their images, as before
    training, are the simplest. Numbers compare between steps and between runs with the same data and latent shape.
    Measuring does not change training. The first process measures and the other processes wait: keep it shorter than
    the collective time limit.

    Args:
        every_n_steps: measure in the first validation at or after each multiple of this step, and in the last one; 0
            for the last one only.
        max_samples: largest number of samples from each split, spread evenly over it.
        components: numbers of components of the mixtures.
        dimensions: number of principal components in which mixtures are fitted.
        diffusion_steps: training steps of the small SiT.
        iterations: limit of iterations of the linear classifier.
    """

    def __init__(
        self,
        every_n_steps: NonNegativeInt,
        max_samples: PositiveInt = 2000,
        components: Sequence[PositiveInt] = (5, 10, 20),
        dimensions: PositiveInt = 16,
        diffusion_steps: PositiveInt = 300,
        iterations: PositiveInt = 100,
    ) -> None:
        check_component_counts(components, max_samples)
        self.every_n_steps, self.max_samples, self.iterations = every_n_steps, max_samples, iterations
        self.components, self.dimensions, self.diffusion_steps = components, dimensions, diffusion_steps

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Gather latents on all processes, measure on the first and log on all."""
        if trainer.sanity_checking:
            return
        if not is_due(trainer, self.every_n_steps):
            forget_metrics(trainer, "early/")
            return
        with torch.random.fork_rng(devices=[]):  # data loaders draw a seed for their workers
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
        """Return the numbers by name, from latents (n, L, C) and labels (n,) of both splits."""
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
