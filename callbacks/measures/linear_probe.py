"""Linear-probe and nearest-neighbour accuracy of latents: they tell how easy the space is for a diffusion model."""

from typing import Any

import numpy as np
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch import Callback, Trainer

from callbacks.latents import gather_latents
from callbacks.schedule import forget_metrics, is_due
from maetok.analysis import linear_probe_accuracy, neighbour_accuracy


class LinearProbe(Callback):
    """Fits a linear classifier on training latents and logs its accuracy on validation latents.

    The callback runs in the validation of the last step and in ``validate``. All values lie in [0, 1]:
    ``validation/linear_probe`` of flattened latents, with the bounds ``validation/linear_probe_low`` and ``_high`` of
    its 95 % interval; ``validation/linear_probe_pooled`` of the mean over tokens; ``validation/knn`` by the classes of
    the 20 nearest training latents. The datamodule must offer ``evaluation_dataloader(split, max_samples)``. The first
    process fits and the other processes wait: keep ``max_samples`` and ``iterations`` small enough for the collective
    time limit.

    Args:
        every_n_steps: probe also in the first validation at or after each multiple of this step; 0 for the last step
            only.
        max_samples: largest number of samples from each split, spread evenly over it.
        iterations: limit of L-BFGS iterations of the classifier.
    """

    def __init__(
        self, every_n_steps: NonNegativeInt = 0, max_samples: PositiveInt = 10_000, iterations: PositiveInt = 300
    ) -> None:
        self.every_n_steps, self.max_samples, self.iterations = every_n_steps, max_samples, iterations

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Encode both splits, fit and log."""
        if trainer.sanity_checking:
            return
        if not is_due(trainer, self.every_n_steps):
            forget_metrics(trainer, "validation/linear_probe", "validation/knn")
            return
        train, validation = (
            gather_latents(trainer, pl_module, split, self.max_samples) for split in ("train", "validation")
        )
        accuracies = self.accuracies(*train, *validation) if trainer.is_global_zero else {}
        for name, accuracy in trainer.strategy.broadcast(accuracies).items():
            pl_module.log(f"validation/{name}", accuracy, rank_zero_only=True)

    def accuracies(self, *samples: np.ndarray) -> dict[str, float]:
        """Return the accuracies by name, from latents and labels of both splits."""
        flattened = linear_probe_accuracy(*samples, self.iterations)
        return {
            "linear_probe": flattened.value,
            "linear_probe_low": flattened.low,
            "linear_probe_high": flattened.high,
            "linear_probe_pooled": linear_probe_accuracy(*samples, self.iterations, view="pooled").value,
            "knn": neighbour_accuracy(*samples).value,
        }
