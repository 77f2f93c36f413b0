"""The pixel-side objective of tokenizer training: reconstruction, perceptual and adversarial terms together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from maetok.losses.adversarial import AdversarialLoss, Discriminator, adaptive_weight
from maetok.losses.reconstruction import PerceptualLoss, pixel_loss


@dataclass(frozen=True)
class LossWeights:
    """Weights of the pixel-side terms (paper section 3.3). A term with weight 0 is neither built nor computed."""

    reconstruction: float = 1.0
    perceptual: float = 1.0
    adversarial: float = 0.4


class ReconstructionObjective(nn.Module):
    """Weighted sum of pixel, perceptual and adversarial losses; for stages 1 and 2.

    Args:
        weights: weight of each term.
        pixel_norm: ``l2`` (paper) or ``l1``.
        perceptual: builds the perceptual loss; called only if its weight is positive.
        adversarial: losses of adversarial training; hinge with the defaults of :class:`AdversarialLoss` if not given.
        adaptive: scale the adversarial term by the ratio of gradient norms at the last decoder layer.
        discriminator_start: first step with the discriminator.

    Raises:
        ValueError: if the perceptual weight is positive but there is no perceptual loss.
    """

    def __init__(
        self,
        weights: LossWeights = LossWeights(),
        pixel_norm: Literal["l1", "l2"] = "l2",
        perceptual: Callable[[], PerceptualLoss] | None = None,
        adversarial: AdversarialLoss | None = None,
        adaptive: bool = True,
        discriminator_start: int = 30_000,
    ) -> None:
        super().__init__()
        if weights.perceptual and perceptual is None:
            raise ValueError(
                f"objective weights.perceptual={weights.perceptual} needs a perceptual loss; set it or use 0"
            )
        self.weights, self.pixel_norm, self.adaptive = weights, pixel_norm, adaptive
        self.discriminator_start = discriminator_start
        self.perceptual = perceptual() if perceptual is not None and weights.perceptual else None
        self.adversarial = adversarial if adversarial is not None else AdversarialLoss()

    def discriminator_active(self, step: int) -> bool:
        """Return whether the discriminator takes part in this step."""
        return self.weights.adversarial > 0 and step >= self.discriminator_start

    def autoencoder(
        self,
        reconstructions: Tensor,
        images: Tensor,
        last_layer: Tensor,
        discriminator: Discriminator | None = None,
        uniform: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the autoencoder.

        Args:
            reconstructions: (B, 3, H, W) with graph.
            images: (B, 3, H, W) in [-1, 1].
            last_layer: weight of the decoder's output layer, for the adaptive weight.
            discriminator: adds the adversarial term if given.
            uniform: (B, 7) in [0, 1) for the augmentation before the discriminator.

        Returns:
            The total, and every unweighted term by name.
        """
        reconstructions = reconstructions.float()
        terms = {"reconstruction": pixel_loss(reconstructions, images, self.pixel_norm)}
        total = self.weights.reconstruction * terms["reconstruction"]
        if self.perceptual is not None:
            terms["perceptual"] = self.perceptual(reconstructions, images)
            total = total + self.weights.perceptual * terms["perceptual"]
        if discriminator is not None:
            assert uniform is not None
            terms["adversarial"] = self.adversarial.autoencoder(discriminator, reconstructions, uniform)
            weight = torch.ones_like(total)
            if self.adaptive:
                weight, norms = adaptive_weight(total, terms["adversarial"], last_layer)
                terms |= norms
            terms["adaptive_weight"] = weight
            total = total + self.weights.adversarial * weight * terms["adversarial"]
        return total, {name: term.detach() for name, term in terms.items()}
