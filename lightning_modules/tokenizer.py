"""Stage 1: train a tokenizer with mask modeling (paper section 3)."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from lightning_modules.autoencoder import AutoencoderTask, Terms
from maetok.checkpoints.networks import TOKENIZER
from maetok.losses import masked_prediction_loss
from maetok.networks import FeatureTarget, LatentTokenizer, MaskedAutoencoder, MaskRatio
from maetok.networks.layers.patches import grid_of


class TokenizerTraining(AutoencoderTask):
    """Trains a tokenizer to reconstruct pixels and predict feature targets of masked patches, against a discriminator.

    Args:
        tokenizer: the autoencoder to train.
        targets: builders of feature targets by name, called with the patch size; only those with a weight are built.
        target_weights: weight of each target that an auxiliary decoder predicts; empty for none.
        auxiliary_depth: layers of an auxiliary decoder, or ``linear``.
        mask_ratio: distribution of the share of masked patches; ``high: 0`` turns masking off.
        **kwargs: arguments of :class:`AutoencoderTask`.

    Raises:
        ValueError: for a weight without its target.
    """

    trains: ClassVar = {"tokenizer": TOKENIZER}

    def __init__(
        self,
        tokenizer: LatentTokenizer,
        targets: dict[str, Callable[[int], FeatureTarget]] | None = None,
        target_weights: dict[str, float] | None = None,
        auxiliary_depth: int | Literal["linear"] = 3,
        mask_ratio: MaskRatio = MaskRatio(),  # noqa: B008 - frozen
        **kwargs: Any,
    ) -> None:
        weights = {name: weight for name, weight in (target_weights or {}).items() if weight}
        unknown = weights.keys() - (targets or {}).keys()
        if unknown:
            raise ValueError(f"target_weights names {sorted(unknown)}, but targets has only {sorted(targets or {})}")
        built = {name: (targets or {})[name](tokenizer.patch_size) for name in weights}
        super().__init__(
            MaskedAutoencoder(tokenizer, {name: target.dim for name, target in built.items()}, auxiliary_depth),
            **kwargs,
        )
        self.target_weights, self.targets, self.mask_ratio = weights, nn.ModuleDict(built), mask_ratio

    def mask_ratios(self, uniform: Tensor) -> Tensor | None:
        """Draw a ratio for each image."""
        return None if self.mask_ratio.high == 0 else self.mask_ratio(uniform)

    def reconstruct_masked(self, images: Tensor, mask: Tensor | None) -> tuple[Tensor, Terms]:
        """Return reconstructions, and the losses of feature targets and bottleneck."""
        output = self.model(images, mask)
        terms: Terms = {}
        for name, target in self.targets.items():
            term = masked_prediction_loss(output.predictions[name], target(images), mask, target.loss)
            terms[name] = self.target_weights[name], term
        return output.reconstructions, terms | {name: (1.0, term) for name, term in output.losses.items()}

    def target_views(self, images: Tensor, predictions: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return each target with its prediction from the masked input."""
        pictures, grid = {}, grid_of(images, self.model.tokenizer.patch_size)
        for name, target in self.targets.items():
            features = target(images)
            pictures[name] = target.picture(features, grid, features)
            pictures[f"{name} predicted"] = target.picture(predictions[name], grid, features)
        return pictures
