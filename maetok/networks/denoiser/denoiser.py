"""The contract of a denoiser, which owns its conditioning.

A denoiser predicts the velocity e - x of the path x_t = (1 - t) x + t e from data (t = 0) to noise (t = 1), for
normalised latents (paper section 3.3; SiT, arXiv 2401.08740).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from maetok.networks.layers.network import Network

Condition = Any
"""What samples are conditioned on: tensors with one row per sample, alone or in tuples and dicts, or None.

The denoiser alone knows what it means. Tasks, guidance and samplers pass it on unread.
"""


class Denoiser(Network, ABC):
    """The contract of a denoiser. :class:`lightning_modules.LatentDiffusion` trains and samples any subclass.

    A denoiser owns its conditioning: which entries of a batch it reads, how it embeds them, and what stands for "no
    condition". It conditions on class labels, or on nothing; one that conditions on something else overrides
    :meth:`condition_of`, :meth:`drop_condition`, :meth:`without_condition` and :attr:`has_null_condition`.

    Args:
        latent_tokens: number L of latent tokens.
        latent_channels: channels C of each.
        num_classes: number of classes, which is also the null label ("no class"); None or 0 for a denoiser without
            labels.
    """

    def __init__(self, latent_tokens: int, latent_channels: int, num_classes: int | None = None) -> None:
        super().__init__()
        self.latent_tokens, self.latent_channels, self.num_classes = latent_tokens, latent_channels, num_classes or None

    @property
    def has_null_condition(self) -> bool:
        """Whether the denoiser learns a null condition, which classifier-free guidance needs."""
        return self.num_classes is not None

    def condition_of(self, batch: Mapping[str, Any]) -> Condition:
        """Return the condition of a batch: its labels (B,) int64, or None without classes."""
        return batch["labels"] if self.has_null_condition else None

    def drop_condition(self, condition: Condition, uniform: Tensor, probability: float) -> Condition:
        """Replace conditions by the null condition with a given probability, for classifier-free guidance.

        Args:
            condition: of B samples.
            uniform: (B,) float in [0, 1), random numbers that the caller supplies.
            probability: share of conditions to drop, in [0, 1] (paper: 0.1).

        Returns:
            The condition of B samples: null where ``uniform < probability``.
        """
        if self.num_classes is None:
            return condition
        return drop_labels(condition, uniform, probability, self.num_classes)

    def without_condition(self, condition: Condition) -> Condition:
        """Return the null condition for as many samples as ``condition`` is of.

        Raises:
            ValueError: if the denoiser has none.
        """
        if self.num_classes is None:
            raise ValueError(
                f"{type(self).__name__} has no classes (num_classes: null), so classifier-free guidance is impossible: "
                "set guidance_scale to 1, or give a guide (autoguidance)"
            )
        return torch.full_like(condition, self.num_classes)

    @abstractmethod
    def forward(self, x: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """Predict the velocity.

        Args:
            x: (B, L, C) float, normalised latents with noise, x_t = (1 - t) x + t e.
            t: (B,) float in [0, 1]; 0 is data, 1 is noise.
            condition: of B samples: labels (B,) int64 in [0, num_classes], where ``num_classes`` is the null label.
                Ignored by a denoiser without labels.

        Returns:
            (B, L, C), the velocity e - x, in the dtype of ``x``.

        Raises:
            ValueError: if the shapes do not fit this denoiser or each other.
        """


def drop_labels(labels: Tensor, uniform: Tensor, probability: float, null_label: int) -> Tensor:
    """Replace labels by the null label with a given probability, for classifier-free guidance.

    Args:
        labels: (B,) int64.
        uniform: (B,) in [0, 1), random numbers that the caller supplies.
        probability: share of labels to drop, in [0, 1] (paper: 0.1).
        null_label: the label for "no class", ``num_classes`` of the denoiser.

    Returns:
        (B,) int64: ``null_label`` where ``uniform < probability``, otherwise the label.
    """
    return torch.where(uniform < probability, null_label, labels)
