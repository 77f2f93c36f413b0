"""PSNR, SSIM and LPIPS between images and their reconstructions."""

from torch import Tensor

from maetok.losses import LPIPSLoss
from maetok.metrics.metric import Batch, MeanOverPairs, UnavailableError


class PSNR(MeanOverPairs):
    """Averages the peak signal-to-noise ratio in dB; infinite where a pair is equal."""

    name = "psnr"

    def values(self, samples: Tensor, references: Tensor) -> Tensor:
        """Return (n,) float32 in dB against a peak of 1."""
        from torchmetrics.functional.image import peak_signal_noise_ratio

        pair = samples.float().div(255.0), references.float().div(255.0)
        return peak_signal_noise_ratio(*pair, data_range=1.0, reduction="none", dim=(1, 2, 3))


class SSIM(MeanOverPairs):
    """Averages the structural similarity, at most 1."""

    name = "ssim"

    def values(self, samples: Tensor, references: Tensor) -> Tensor:
        """Return (n,) float32."""
        from torchmetrics.functional.image import structural_similarity_index_measure

        pair = samples.float().div(255.0), references.float().div(255.0)
        return structural_similarity_index_measure(*pair, data_range=1.0, reduction="none").reshape(-1)


class LPIPS(MeanOverPairs):
    """Averages the perceptual distance of the given network.

    Args:
        network: measures each pair of images in [-1, 1]; without it the metric is unavailable.
    """

    name = "lpips"

    def __init__(self, network: LPIPSLoss | None = None) -> None:
        self.network = network
        self.digest = network.digest if network is not None else None

    def update(self, batch: Batch) -> None:
        """Measure each pair, if there is a network."""
        if self.network is not None:
            super().update(batch)

    def values(self, samples: Tensor, references: Tensor) -> Tensor:
        """Return (n,) distances."""
        assert self.network is not None
        return self.network.per_image(samples / 127.5 - 1, references / 127.5 - 1)

    def compute(self) -> dict[str, float]:
        """Return the mean; raises UnavailableError without a network."""
        if self.network is None:
            raise UnavailableError(self.unavailable_reason)
        return super().compute()
