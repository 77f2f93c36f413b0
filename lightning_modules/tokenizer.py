"""Stage 1: train a tokenizer with mask modeling (paper section 3)."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lightning_modules.base import Optimization, Task
from maetok.ema import EMA
from maetok.losses import masked_prediction_loss
from maetok.losses.diff_augment import UNIFORM_NUMBERS
from maetok.losses.objective import ReconstructionObjective
from maetok.networks import FeatureTarget, MaskedAutoencoder, MaskRatio, Tokenizer, random_mask
from maetok.networks.patches import grid_of


class TokenizerTraining(Task):
    """Reconstruct pixels and predict feature targets of masked patches, against a discriminator from some step on.

    Args:
        tokenizer: the autoencoder to train.
        generator: optimisation of tokenizer and auxiliary decoders.
        objective: pixel, perceptual and adversarial losses.
        targets: builders of feature targets by name, called with the patch size; only those with a weight are built.
        target_weights: weight of each target that an auxiliary decoder has to predict; empty for none.
        auxiliary_depth: layers of an auxiliary decoder, or ``linear``.
        mask_ratio: distribution of the share of masked patches; ``high: 0`` turns masking off.
        discriminator: builder of the discriminator; called only if the adversarial weight is positive.
        discriminator_optimization: optimisation of the discriminator.
        ema_decay: decay of the moving average of the trained networks, which validation uses.
        activation_checkpointing: recompute block activations in the backward pass to save memory.
        compile: compile transformer blocks.
        accumulate_grad_batches: micro-batches per optimizer step.
        seed: seed of masks, augmentation and noise; ``seed_everything`` if not given.

    Raises:
        ValueError: for a weight without its target, or an adversarial weight without discriminator.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        generator: Optimization,
        objective: ReconstructionObjective,
        targets: dict[str, Callable[[int], FeatureTarget]] | None = None,
        target_weights: dict[str, float] | None = None,
        auxiliary_depth: int | Literal["linear"] = 3,
        mask_ratio: MaskRatio = MaskRatio(),  # noqa: B008 - frozen
        discriminator: Callable[[], nn.Module] | None = None,
        discriminator_optimization: Optimization | None = None,
        ema_decay: float = 0.9999,
        activation_checkpointing: bool = False,
        compile: bool = False,
        accumulate_grad_batches: int = 1,
        seed: int | None = None,
    ) -> None:
        super().__init__(accumulate_grad_batches, seed)
        self.target_weights = {name: weight for name, weight in (target_weights or {}).items() if weight}
        unknown = self.target_weights.keys() - (targets or {}).keys()
        if unknown:
            raise ValueError(f"target_weights names {sorted(unknown)}, but targets has only {sorted(targets or {})}")
        self.targets = nn.ModuleDict(
            {name: (targets or {})[name](tokenizer.patch_size) for name in self.target_weights}
        )
        dims = {name: target.dim for name, target in self.targets.items()}
        self.model = MaskedAutoencoder(tokenizer, dims, auxiliary_depth)
        self.ema = EMA(self.model, ema_decay)
        self.objective, self.mask_ratio = objective, mask_ratio
        self.discriminator: nn.Module | None = None
        if objective.weights.adversarial:
            if discriminator is None or discriminator_optimization is None:
                raise ValueError(
                    f"objective weights.adversarial={objective.weights.adversarial} needs "
                    "model.init_args.discriminator and discriminator_optimization; set them, or the weight to 0"
                )
            self.discriminator = discriminator()
        self.generator, self.discriminator_optimization = generator, discriminator_optimization
        self.compile_blocks, self.activation_checkpointing = compile, activation_checkpointing

    def configure_model(self) -> None:
        """Apply the compile and activation-checkpointing switches to the trained networks."""
        self.model.set_activation_checkpointing(self.activation_checkpointing)
        if self.compile_blocks:
            self.model.compile_blocks()

    def setup(self, stage: str) -> None:
        """Check that data and tokenizer agree on the image size, which both configs state."""
        super().setup(stage)
        data_size = getattr(getattr(self.trainer, "datamodule", None), "image_size", None)
        own_size = self.model.tokenizer.image_size
        if data_size is not None and tuple(data_size) != own_size:
            raise ValueError(
                f"data.init_args.image_size={tuple(data_size)} but "
                f"model.init_args.tokenizer.init_args.image_size={own_size}: set both to one size"
            )

    def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
        """The generator's optimizer first, then the discriminator's if there is one."""
        pairs = [self.generator.build(self.model, self.trainer.max_steps)]
        if self.discriminator is not None and self.discriminator_optimization is not None:
            steps = self.trainer.max_steps - self.objective.discriminator_start
            pairs.append(self.discriminator_optimization.build(self.discriminator, max(1, steps)))
        return [optimizer for optimizer, _ in pairs], [schedule for _, schedule in pairs]

    def draw_mask(self, images: Tensor, generator: np.random.Generator) -> Tensor | None:
        """A random mask (B, N) for these images, or None when masking is off."""
        if self.mask_ratio.high == 0:
            return None
        rows, columns = grid_of(images, self.model.tokenizer.patch_size)
        uniform = self.uniform(generator, len(images), 1 + rows * columns)
        return random_mask(self.mask_ratio(uniform[:, 0]), uniform[:, 1:])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One micro-batch for the generator, then the same for the discriminator once it plays."""
        generator = np.random.default_rng(self.begin_micro_step())
        images = batch["images"]
        # Asked before the generator steps: its step and the discriminator's belong together.
        plays = self.discriminator is not None and self.objective.plays(self.global_step)
        mask = self.draw_mask(images, generator)
        augmentation = self.uniform(generator, len(images), 3, UNIFORM_NUMBERS) if plays else None
        reconstructions, scalars = self.generator_step(images, mask, augmentation)
        if augmentation is not None:
            scalars |= self.discriminator_step(images, reconstructions, augmentation)
        self.end_micro_step()
        self.log_scalars(scalars)

    def generator_step(
        self, images: Tensor, mask: Tensor | None, augmentation: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Forward and backward of the trained networks; on the last micro-batch also their optimizer and EMA step.

        Returns:
            Detached reconstructions (B, 3, H, W) and the scalars to log.
        """
        plays = augmentation is not None
        if self.discriminator is not None:
            self.discriminator.requires_grad_(False)
        output = self.model(images, mask)
        last_layer = self.model.tokenizer.decoder.output.weight
        loss, terms = self.objective.generator(
            output.reconstructions,
            images,
            last_layer,
            self.discriminator if plays else None,
            augmentation[:, 0] if augmentation is not None else None,
        )
        for name, target in self.targets.items():
            term = masked_prediction_loss(output.predictions[name], target(images), mask, target.loss)
            loss, terms[name] = loss + self.target_weights[name] * term, term.detach()
        for name, term in output.losses.items():
            loss, terms[name] = loss + term, term.detach()
        self.manual_backward(loss / self.accumulate_grad_batches)
        scalars: dict[str, Tensor | float] = {f"train/{name}": term for name, term in terms.items()}
        scalars["train/loss"] = loss.detach()
        if mask is not None:
            scalars["train/mask_ratio"] = mask.float().mean()
        if self.is_last_micro_step:
            scalars["learning_rate/generator"] = self.learning_rate(0)
            norm = self.step_optimizer(0, self.model, self.generator.gradient_clip)
            self.ema.update(self.model, self.global_step)
            scalars["gradient_norm/generator"] = norm
        return output.reconstructions.detach(), scalars

    def discriminator_step(
        self, images: Tensor, reconstructions: Tensor, augmentation: Tensor
    ) -> dict[str, Tensor | float]:
        """Forward, backward and, on the last micro-batch, the optimizer step of the discriminator."""
        assert self.discriminator is not None
        assert self.discriminator_optimization is not None
        self.discriminator.requires_grad_(True)
        uniform = torch.cat((augmentation[:, 1], augmentation[:, 2]))
        loss, terms = self.objective.adversarial.discriminator(self.discriminator, images, reconstructions, uniform)
        self.manual_backward(loss / self.accumulate_grad_batches)
        scalars: dict[str, Tensor | float] = {f"discriminator/{name}": term.detach() for name, term in terms.items()}
        if self.is_last_micro_step:
            scalars["learning_rate/discriminator"] = self.learning_rate(1)
            clip = self.discriminator_optimization.gradient_clip
            scalars["gradient_norm/discriminator"] = self.step_optimizer(1, self.discriminator, clip)
        return scalars

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Nothing here: callbacks measure what ``encode``, ``reconstruct`` and ``views`` give."""

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """As in validation, callbacks do the measuring."""

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """``latents`` (n, L, C), ``labels`` (n,) and ``indices`` (n,) of the n valid samples of a batch."""
        valid = batch["valid"]
        latents = self.encode(batch["images"][valid])
        return {"latents": latents, "labels": batch["labels"][valid], "indices": batch["indices"][valid]}

    @property
    def averaged_model(self) -> MaskedAutoencoder:
        """The moving average of the trained networks."""
        network = self.ema.network
        assert isinstance(network, MaskedAutoencoder)
        return network

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, L, C) of unmasked images by the averaged tokenizer."""
        return self.averaged_model.tokenizer.encode(images)

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor:
        """Reconstructions (B, 3, H, W) of unmasked images by the averaged tokenizer."""
        return self.averaged_model.tokenizer(images)

    @torch.no_grad()
    def views(self, images: Tensor) -> dict[str, Tensor]:
        """Input, masked input, reconstructions from both, and each target with its prediction from the masked input."""
        model, patch_size = self.averaged_model, self.model.tokenizer.patch_size
        grid = grid_of(images, patch_size)
        pictures = {"input": images, "reconstruction": self.reconstruct(images)}
        mask = self.draw_mask(images, np.random.default_rng(self.seed))
        if mask is None:
            return pictures
        hidden = mask.unflatten(1, grid).repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)[:, None]
        output = model(images, mask)
        pictures |= {"masked input": images.masked_fill(hidden, 0.0), "from masked": output.reconstructions}
        for name, target in self.targets.items():
            features = target(images)
            pictures[name] = target.picture(features, grid, features)
            pictures[f"{name} predicted"] = target.picture(output.predictions[name], grid, features)
        return pictures
