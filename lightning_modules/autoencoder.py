"""The base of stage 1 (tokenizer) and stage 2 (its pixel decoder): reconstruction and adversarial training."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_modules.base import Task
from lightning_modules.optimization import Optimization
from maetok.losses.diff_augment import UNIFORM_NUMBERS
from maetok.losses.objective import ReconstructionObjective
from maetok.networks import MaskedAutoencoder, random_mask
from maetok.networks.layers.patches import grid_of
from maetok.training.ema import EMA

Terms = dict[str, tuple[float, Tensor]]
"""Losses by name: the weight, and the scalar before weighting."""


class AutoencoderTask(Task):
    """Trains an autoencoder on pixels, and from a given step on against a discriminator.

    Args:
        model: the autoencoder; its parameters that require gradients are trained.
        autoencoder_optimization: optimisation of the autoencoder.
        objective: pixel, perceptual and adversarial losses.
        discriminator: builder of the discriminator; called only if the adversarial weight is positive.
        discriminator_optimization: optimisation of the discriminator.
        ema_decay: decay of the moving average of the trained weights, which validation uses.
        **kwargs: arguments of :class:`Task`.

    Raises:
        ValueError: for an adversarial weight without discriminator.
    """

    def __init__(
        self,
        model: MaskedAutoencoder,
        autoencoder_optimization: Optimization,
        objective: ReconstructionObjective,
        discriminator: Callable[[], nn.Module] | None = None,
        discriminator_optimization: Optimization | None = None,
        ema_decay: float = 0.9999,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.model = model
        self.ema = EMA(model, ema_decay)
        self.objective = objective
        self.discriminator: nn.Module | None = None
        if objective.weights.adversarial:
            if discriminator is None or discriminator_optimization is None:
                raise ValueError(
                    f"objective weights.adversarial={objective.weights.adversarial} needs "
                    "model.init_args.discriminator and discriminator_optimization; set them, or the weight to 0"
                )
            self.discriminator = discriminator()
        self.autoencoder_optimization = autoencoder_optimization
        self.discriminator_optimization = discriminator_optimization

    @abstractmethod
    def mask_ratios(self, uniform: Tensor) -> Tensor | None:
        """Return the share of masked patches (B,) per image from uniform numbers (B,) in [0, 1); None for no mask."""

    @abstractmethod
    def reconstruct_masked(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Terms]:
        """Run the training forward pass: return reconstructions (B, 3, H, W) with graph, and further losses."""

    def configure_model(self) -> None:
        """Recompute activations, compile and shard the trained networks, as the config says."""
        self.prepare_training(self.model)

    def setup(self, stage: str) -> None:
        """Check that data and tokenizer agree on the image size."""
        super().setup(stage)
        self.check_image_size(self.model.tokenizer.image_size)

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        """Build the autoencoder's optimizer, then the discriminator's if there is one."""
        pairs = [self.autoencoder_optimization.build(self.model, self.trainer.max_steps)]
        if self.discriminator is not None and self.discriminator_optimization is not None:
            self.discriminator.requires_grad_(True)  # an earlier training may have turned it off
            steps = self.trainer.max_steps
            if steps > 0:  # otherwise training has no end
                steps = max(1, steps - self.objective.discriminator_start)
            pairs.append(self.discriminator_optimization.build(self.discriminator, steps))
        return [optimizer for optimizer, _ in pairs], [schedule for _, schedule in pairs]

    def draw_mask(self, images: Tensor, rng: np.random.Generator) -> Tensor | None:
        """Draw a random mask (B, N) for these images; None if masking is off.

        The mask is on the host, where reading the number of visible patches does not wait for an accelerator.
        """
        rows, columns = grid_of(images, self.model.tokenizer.patch_size)
        uniform = self.uniform_on_host(rng, len(images), 1 + rows * columns)
        ratios = self.mask_ratios(uniform[:, 0])
        return None if ratios is None else random_mask(ratios, uniform[:, 1:])

    @property
    def discriminator_is_active(self) -> bool:
        """Return whether the discriminator takes part in the next step."""
        return self.discriminator is not None and self.objective.discriminator_active(self.global_step)

    @property
    def step_kind(self) -> str:
        """Return the kind of the next step, which costs more once the discriminator is active."""
        return "with discriminator" if self.discriminator_is_active else "without discriminator"

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Train the autoencoder on one micro-batch, then the discriminator once it is active."""
        rng = np.random.default_rng(self.begin_micro_step())
        images = batch["images"]
        active = self.discriminator_is_active  # read before the autoencoder steps: both steps belong together
        mask = self.draw_mask(images, rng)
        augmentation = self.uniform(rng, len(images), 3, UNIFORM_NUMBERS) if active else None
        reconstructions, scalars = self.autoencoder_step(images, mask, augmentation)
        if augmentation is not None:
            scalars |= self.discriminator_step(images, reconstructions, augmentation)
        self.end_micro_step()
        self.log_scalars(scalars)

    def autoencoder_step(
        self, images: Tensor, mask: Tensor | None, augmentation: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Run forward and backward of the trained networks; on the last micro-batch also the optimizer and EMA step.

        Returns:
            Detached reconstructions (B, 3, H, W) and the scalars to log.
        """
        active = augmentation is not None
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
        reconstructions, auxiliary_losses = self.reconstruct_masked(images, mask)
        with self.local_gradients():  # the adaptive weight computes gradients of one layer
            loss, terms = self.objective.autoencoder(
                reconstructions,
                images,
                self.model.tokenizer.last_layer,
                self.discriminator if active else None,
                augmentation[:, 0] if augmentation is not None else None,
            )
        for name, (weight, term) in auxiliary_losses.items():
            loss, terms[name] = loss + weight * term, term.detach()
        self.backward_micro_batch(0, loss)
        scalars: dict[str, Tensor | float] = {f"train/{name}": term for name, term in terms.items()}
        scalars["train/loss"] = loss.detach()
        if mask is not None:
            scalars["train/mask_ratio"] = mask.float().mean()
        if self.is_last_micro_step:
            scalars["learning_rate/autoencoder"] = self.learning_rate(0)
            norm = self.step_optimizer(0, self.model, self.autoencoder_optimization.gradient_clip)
            self.ema.update(self.model, self.global_step)
            scalars["gradient_norm/autoencoder"] = norm
        return reconstructions.detach(), scalars

    def discriminator_step(
        self, images: Tensor, reconstructions: Tensor, augmentation: Tensor
    ) -> dict[str, Tensor | float]:
        """Run forward, backward and, on the last micro-batch, the optimizer step of the discriminator."""
        assert self.discriminator is not None
        assert self.discriminator_optimization is not None
        self.discriminator.requires_grad_(True)
        uniform = torch.cat((augmentation[:, 1], augmentation[:, 2]))
        loss, terms = self.objective.adversarial.discriminator(self.discriminator, images, reconstructions, uniform)
        self.backward_micro_batch(1, loss)
        scalars: dict[str, Tensor | float] = {f"discriminator/{name}": term.detach() for name, term in terms.items()}
        if self.is_last_micro_step:
            scalars["learning_rate/discriminator"] = self.learning_rate(1)
            clip = self.discriminator_optimization.gradient_clip
            scalars["gradient_norm/discriminator"] = self.step_optimizer(1, self.discriminator, clip)
        return scalars

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Do nothing: callbacks measure with ``encode``, ``reconstruct`` and ``views``."""

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Do nothing, as in validation."""

    @property
    def averaged_model(self) -> MaskedAutoencoder:
        """Return the moving average of the trained networks."""
        network = self.ema.network
        assert isinstance(network, MaskedAutoencoder)
        return network

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Encode unmasked images with the averaged tokenizer to latents (B, L, C)."""
        return self.averaged_model.tokenizer.encode(images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode raw latents (B, L, C) with the averaged tokenizer to images (B, 3, H, W)."""
        return self.averaged_model.tokenizer.decode(latents)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstruct unmasked images (B, 3, H, W) with the averaged tokenizer."""
        tokenizer = self.averaged_model.tokenizer
        return tokenizer.decode(tokenizer.encode(images), (images.shape[2], images.shape[3]))

    @torch.no_grad()
    def views(self, images: Tensor) -> dict[str, Tensor]:
        """Return input and reconstruction; while masking is on, also the masked input and its reconstruction."""
        model, patch_size = self.averaged_model, self.model.tokenizer.patch_size
        grid = grid_of(images, patch_size)
        pictures = {"input": images, "reconstruction": self.reconstruct(images)}
        mask = self.draw_mask(images, np.random.default_rng(self.seed))
        if mask is None:
            return pictures
        hidden = (
            mask.to(images.device)
            .unflatten(1, grid)
            .repeat_interleave(patch_size, 1)
            .repeat_interleave(patch_size, 2)[:, None]
        )
        output = model(images, mask)
        pictures |= {"masked input": images.masked_fill(hidden, 0.0), "from masked": output.reconstructions}
        return pictures | self.target_views(images, output.predictions)

    def target_views(self, images: Tensor, predictions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return further picture columns for other predictions of the model."""
        return {}
