"""How close reconstructions are to their images."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


def reconstruction_metrics(prefix: str = "") -> "MetricCollection":
    """PSNR and SSIM (per image, averaged) and the mean absolute error, by torchmetrics.

    Inputs of ``update`` are float images in [0, 1], so PSNR is in dB against a peak of 1 and L1 in units of the full
    range. States are summed over processes when computed.
    """
    from torchmetrics import MeanAbsoluteError, MeanMetric, MetricCollection
    from torchmetrics.functional.image import peak_signal_noise_ratio
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    class MeanPeakSignalNoiseRatio(MeanMetric):
        """That of torchmetrics keeps a list, which processes without any image cannot exchange with the others."""

        def update(self, preds: Tensor, target: Tensor) -> None:
            super().update(peak_signal_noise_ratio(preds, target, 1.0, reduction="none", dim=(1, 2, 3)))

    return MetricCollection(
        {
            "psnr": MeanPeakSignalNoiseRatio(),
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
            "l1": MeanAbsoluteError(),
        },
        prefix=prefix,
        compute_groups=False,
    )


def similarities(samples: Tensor, references: Tensor) -> dict[str, Tensor]:
    """PSNR in dB and SSIM of each pair of images, as in :func:`reconstruction_metrics`, by name: (n,) float32.

    Args:
        samples: (n, 3, H, W) uint8.
        references: the same; PSNR is infinite where they are equal.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    pair = samples.float().div(255.0), references.float().div(255.0)
    psnr = peak_signal_noise_ratio(*pair, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(*pair, data_range=1.0, reduction="none")
    return {"psnr": psnr, "ssim": ssim.reshape(-1)}


def to_unit_range(images: Tensor) -> Tensor:
    """Images of about [-1, 1], clamped and mapped to float32 in [0, 1]."""
    return images.float().clamp(-1.0, 1.0).add(1.0).div(2.0)


def to_uint8(images: Tensor) -> Tensor:
    """Images of about [-1, 1] as they are stored and measured: round(127.5 x + 127.5), clamped to 0 ... 255, uint8."""
    return images.float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)
