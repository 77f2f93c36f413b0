"""Stage 2: fine-tune the pixel decoder on the frozen encoder (paper section 3.3)."""

from typing import Any, ClassVar

import torch
from jsonargparse.typing import NonNegativeFloat, restricted_number_type
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_modules.autoencoder import AutoencoderTask, Terms
from maetok.checkpoints.networks import TOKENIZER
from maetok.checkpoints.runs import InitFrom
from maetok.networks import LatentTokenizer, MaskedAutoencoder
from maetok.training.ema import frozen_modules

ShareBelowOne = restricted_number_type("ShareBelowOne", float, [(">=", 0), ("<", 1)])


class DecoderFinetuning(AutoencoderTask):
    """Trains only the pixel decoder. Encoder, latent tokens and bottleneck are frozen, so latents do not change.

    The share of masked patches falls linearly from ``mask_ratio`` in the first step to 0 in the last. The discriminator
    starts from the weights in the checkpoint of ``init_from`` if that holds a discriminator.

    Args:
        tokenizer: the autoencoder, without auxiliary decoders.
        init_from: checkpoint or run directory of stage 1; null if the tokenizer brings its weights.
        mask_ratio: share of masked patches in the first step; less than 1.
        latent_noise: standard deviation of Gaussian noise added to the latents; it makes the decoder robust to errors
            of a diffusion model.
        **kwargs: arguments of :class:`AutoencoderTask`.
    """

    trains: ClassVar = {"tokenizer": TOKENIZER}

    def __init__(
        self,
        tokenizer: LatentTokenizer,
        init_from: InitFrom | None,
        mask_ratio: ShareBelowOne = 0.6,
        latent_noise: NonNegativeFloat = 0.0,
        **kwargs: Any,
    ) -> None:
        if init_from is not None:
            init_from.load(tokenizer)
        trained = {id(parameter) for parameter in tokenizer.trainable_parameters(stage=2)}
        for parameter in tokenizer.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        super().__init__(MaskedAutoencoder(tokenizer, {}), **kwargs)
        self.train()  # Lightning keeps the modes of modules at the start
        self.mask_ratio, self.latent_noise = mask_ratio, latent_noise
        if self.discriminator is not None and init_from is not None:
            found = InitFrom(init_from.path, "discriminator.").load(self.discriminator, required=False)
            rank_zero_info(f"discriminator: {'weights of ' + init_from.path if found else 'new'}")

    def setup(self, stage: str) -> None:
        """Refuse to anneal the mask ratio over a training without an end."""
        super().setup(stage)
        if stage == "fit" and self.mask_ratio and self.trainer.max_steps < 1:
            raise ValueError(
                f"trainer.max_steps={self.trainer.max_steps}, but model.init_args.mask_ratio={self.mask_ratio} falls "
                "to 0 over a known number of steps: set trainer.max_steps, or the mask ratio to 0"
            )

    def train(self, mode: bool = True) -> "DecoderFinetuning":
        """Keep the modules that are not trained in evaluation mode."""
        super().train(mode)
        for module in frozen_modules(self.model):
            module.eval()
        return self

    def mask_ratios(self, uniform: Tensor) -> Tensor | None:
        """Return the same ratio for all images of a step; None outside training."""
        if not (self.trainer.training and self.mask_ratio):
            return None
        left = 1 - self.global_step / max(1, self.trainer.max_steps - 1)
        return torch.full_like(uniform, self.mask_ratio * left)

    def reconstruct_masked(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Terms]:
        """Return reconstructions from the latents of the frozen encoder, and no further losses."""
        tokenizer = self.model.tokenizer
        with torch.no_grad():
            latents = tokenizer.encode(images, mask)
        if self.latent_noise:
            latents = latents + self.latent_noise * torch.randn_like(latents)
        return tokenizer.decode(latents, (images.shape[2], images.shape[3])), {}
