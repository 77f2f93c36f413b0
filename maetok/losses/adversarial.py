"""Adversarial losses. Logits are (B, K); every result is a float32 scalar, or a dict of named scalars."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maetok.losses.diff_augment import DiffAugment
from maetok.runtime.distributed import mean_over_ranks

Discriminator = Callable[[Tensor], Tensor]
AdversarialForm = Literal["hinge", "non_saturating"]


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, form: AdversarialForm = "hinge") -> Tensor:
    """Return the loss that the discriminator minimises.

    ``hinge`` is the mean of (relu(1 - real) + relu(1 + fake)) / 2. ``non_saturating`` is the mean of (softplus(-real) +
    softplus(fake)) / 2, the binary cross-entropy with targets 1 and 0. Logits are (B, K).
    """
    real_logits, fake_logits = real_logits.float(), fake_logits.float()
    if form == "hinge":
        return 0.5 * (F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean())
    return 0.5 * (F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean())


def autoencoder_loss(fake_logits: Tensor, form: AdversarialForm = "hinge") -> Tensor:
    """Return the loss that the autoencoder minimises: the mean of ``-fake`` or, non-saturating, ``softplus(-fake)``."""
    return -fake_logits.float().mean() if form == "hinge" else F.softplus(-fake_logits.float()).mean()


def adaptive_weight(
    reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor, maximum: float = 1e4
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the weight that gives both losses gradients of equal size at the last decoder layer (VQGAN, equation 7).

    Gradients are averaged over all processes before their norms are taken, so the weight does not depend on how
    processes divide a batch.

    Args:
        reconstruction_loss: scalar with graph, pixel plus perceptual loss.
        adversarial_loss: scalar with graph.
        last_layer: weight of the decoder's output layer.
        maximum: upper limit of the weight.

    Returns:
        The weight, a scalar without graph, and both gradient norms by name.
    """
    norms = [
        mean_over_ranks(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float()).norm()
        for loss in (reconstruction_loss, adversarial_loss)
    ]
    weight = (norms[0] / (norms[1] + 1e-6)).clamp(0.0, maximum).detach()
    return weight, {"reconstruction_gradient": norms[0], "adversarial_gradient": norms[1]}


class LeCAM(nn.Module):
    """LeCAM regulariser (Tseng et al. 2021, equation 3): keeps logits near the other side's moving average.

    The averages are buffers, so checkpoints hold them. They are equal on all processes. Logits that are not finite
    do not change them.

    Args:
        decay: decay of the moving averages of real and fake logits.
    """

    real_average: Tensor
    fake_average: Tensor

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("real_average", torch.zeros(()))
        self.register_buffer("fake_average", torch.zeros(()))

    def forward(self, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
        """Update the averages, then return mean(relu(real - fake average)^2) + mean(relu(real average - fake)^2)."""
        real_logits, fake_logits = real_logits.float(), fake_logits.float()
        means = mean_over_ranks(torch.stack((real_logits.mean(), fake_logits.mean())))
        finite = means.isfinite().all()
        self.real_average.lerp_(torch.where(finite, means[0], self.real_average), 1.0 - self.decay)
        self.fake_average.lerp_(torch.where(finite, means[1], self.fake_average), 1.0 - self.decay)
        real_term = F.relu(real_logits - self.fake_average.clone()).square().mean()
        return real_term + F.relu(self.real_average.clone() - fake_logits).square().mean()


class AdversarialLoss(nn.Module):
    """Losses of autoencoder and discriminator in adversarial training, with DiffAugment, LeCAM and consistency.

    The discriminator is passed in.

    Args:
        form: hinge (paper) or non-saturating.
        lecam_weight: factor of the LeCAM regulariser; 0 turns it off.
        lecam_decay: decay of LeCAM's moving averages.
        consistency_weight: factor of the squared difference between logits of augmented and plain images; 0 turns it
            off.
        augment: augments everything that the discriminator sees; null for none.
    """

    def __init__(
        self,
        form: AdversarialForm = "hinge",
        lecam_weight: float = 0.001,
        lecam_decay: float = 0.999,
        consistency_weight: float = 0.0,
        augment: DiffAugment | None = None,
    ) -> None:
        super().__init__()
        self.form, self.lecam_weight, self.consistency_weight = form, lecam_weight, consistency_weight
        self.augment = augment
        self.lecam = LeCAM(lecam_decay)

    def autoencoder(self, discriminator: Discriminator, fakes: Tensor, uniform: Tensor) -> Tensor:
        """Return the autoencoder's loss on fakes (B, 3, H, W); ``uniform`` (B, 7) in [0, 1) drives the augmentation."""
        return autoencoder_loss(discriminator(self._augmented(fakes, uniform)), self.form)

    def discriminator(
        self, discriminator: Discriminator, images: Tensor, fakes: Tensor, uniform: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the discriminator's loss and its named parts.

        Args:
            discriminator: (B, 3, H, W) -> (B, K) logits; called once on real and fake images together.
            images: real images (B, 3, H, W) in [-1, 1].
            fakes: reconstructions of the same shape; no gradient flows to them.
            uniform: (2 B, 7) numbers in [0, 1), for the augmentation of real and fake images.
        """
        both = torch.cat((images, fakes.detach().to(images.dtype)))
        logits = discriminator(self._augmented(both, uniform))
        real_logits, fake_logits = logits.chunk(2)
        parts = {"adversarial": discriminator_loss(real_logits, fake_logits, self.form)}
        if self.lecam_weight:
            parts["lecam"] = self.lecam_weight * self.lecam(real_logits, fake_logits)
        if self.consistency_weight and self.augment is not None:
            parts["consistency"] = self.consistency_weight * F.mse_loss(logits, discriminator(both))
        total = torch.stack(list(parts.values())).sum()
        return total, parts | {"real_logits": real_logits.mean(), "fake_logits": fake_logits.mean()}

    def _augmented(self, images: Tensor, uniform: Tensor) -> Tensor:
        return images if self.augment is None else self.augment(images, uniform)
