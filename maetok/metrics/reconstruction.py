"""How close reconstructions are to their images."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torchmetrics import MetricCollection


def reconstruction_metrics(prefix: str = "") -> "MetricCollection":
    """PSNR and SSIM (per image, averaged) and the mean absolute error, by torchmetrics.

    Inputs of ``update`` are float images in [0, 1], so PSNR is in dB against a peak of 1 and L1 in units of the full
    range. States are summed over processes when computed.
    """
    from torchmetrics import MeanAbsoluteError, MetricCollection
    from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

    return MetricCollection(
        {
            "psnr": PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3)),
            "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
            "l1": MeanAbsoluteError(),
        },
        prefix=prefix,
        compute_groups=False,
    )


def to_unit_range(images: Tensor) -> Tensor:
    """Images of about [-1, 1], clamped and mapped to float32 in [0, 1]."""
    return images.float().clamp(-1.0, 1.0).add(1.0).div(2.0)
