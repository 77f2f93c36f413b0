"""Running PSNR, SSIM and L1 of float images, and the conversion of images to what is measured and stored."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


def reconstruction_metrics(prefix: str = "") -> "MetricCollection":
    """Return torchmetrics' PSNR and SSIM, averaged per image, and mean absolute error.

    ``update`` takes float images in [0, 1]: PSNR is in dB against a peak of 1, L1 in units of the full range.
    ``compute`` sums the states over processes.
    """
    from torchmetrics import MeanAbsoluteError, MeanMetric, MetricCollection
    from torchmetrics.functional.image import peak_signal_noise_ratio
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    class MeanPeakSignalNoiseRatio(MeanMetric):
        """Averages PSNR. torchmetrics' own class keeps a list, and a process without images cannot exchange it."""

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


def to_unit_range(images: Tensor) -> Tensor:
    """Clamp images to [-1, 1] and map them to float32 in [0, 1]."""
    return images.float().clamp(-1.0, 1.0).add(1.0).div(2.0)


def to_uint8(images: Tensor) -> Tensor:
    """Return images of [-1, 1] as they are stored and measured: round(127.5 x + 127.5), clamped to 0 ... 255, uint8."""
    return images.float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round().to(torch.uint8)
