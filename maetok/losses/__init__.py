"""Losses: pure functions and small modules that return named scalars. They import no network of the suite."""

from maetok.losses.adversarial import AdversarialLoss, LeCAM, adaptive_weight, autoencoder_loss, discriminator_loss
from maetok.losses.diff_augment import DiffAugment
from maetok.losses.masked_prediction import masked_prediction_loss
from maetok.losses.objective import LossWeights, ReconstructionObjective
from maetok.losses.reconstruction import LPIPSLoss, PerceptualLoss, TimmPerceptualLoss, pixel_loss
from maetok.runtime.renamed import renamed

__all__ = [
    "AdversarialLoss",
    "DiffAugment",
    "LPIPSLoss",
    "LeCAM",
    "LossWeights",
    "PerceptualLoss",
    "ReconstructionObjective",
    "TimmPerceptualLoss",
    "adaptive_weight",
    "autoencoder_loss",
    "discriminator_loss",
    "masked_prediction_loss",
    "pixel_loss",
]

__getattr__ = renamed("maetok.losses", {"generator_loss": "maetok.losses.adversarial.autoencoder_loss"})
