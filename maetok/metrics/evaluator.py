"""Measures two sets of images under a protocol: one code for callbacks and for ``python -m maetok.metrics``."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from maetok.losses import LPIPSLoss
from maetok.metrics.features import feature_network
from maetok.metrics.gaussians import Gaussian
from maetok.metrics.image_set import ImageSet
from maetok.metrics.inception_score import inception_score
from maetok.metrics.precision_recall import precision_recall
from maetok.metrics.protocols import EvaluationProtocol, Measurement
from maetok.metrics.reconstruction import similarities
from maetok.runtime.distributed import gather_over_ranks
from maetok.runtime.pretrained import UnregisteredModule

Rows = Mapping[str, Tensor]


class UnavailableError(Exception):
    """Why a metric cannot be measured on these images with these networks."""


class ImageEvaluator:
    """Takes images of both sides, in batches on any number of processes, and measures them when all are there.

    Every process must call :meth:`compute`. Features that a metric needs row by row are kept in main memory: with
    Inception 8 KB per image for precision and recall, 4 KB for the Inception Score.

    Args:
        protocol: what to measure.
        features: a :class:`maetok.metrics.features.FeatureNetwork`, or any network from images in [0, 1] to one vector
            each.
        lpips: network of LPIPS; without it there is no such metric.
        statistics: moments of the references by name (``pool``, ``spatial``), of Inception features, that take the
            place of those of reference images.
        device: where features and distances are computed; that of collective operations.

    Raises:
        ValueError: for statistics with a network that is not Inception.
    """

    def __init__(
        self,
        protocol: EvaluationProtocol,
        features: nn.Module,
        lpips: LPIPSLoss | None = None,
        statistics: Mapping[str, Gaussian] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.protocol, self.network, self.lpips = protocol, feature_network(features), lpips
        self.statistics, self.device = statistics or {}, torch.device(device)
        if self.statistics and not self.network.is_inception:
            raise ValueError(
                f"the reference statistics are those of Inception features, not of {self.network.name}: use "
                "InceptionFeatures (--features inception), or reference images"
            )
        self.extract = UnregisteredModule(self.network)
        rows = {"inception_score": ["logits"], "precision_recall": ["pool"]}
        kept = [name for metric in protocol.metrics for name in rows.get(metric, [metric])]
        self.samples = ImageSet("samples", kept, self.device)
        self.references = ImageSet("references", [name for name in kept if name == "pool"], self.device)
        self.image_size: tuple[int, int] | None = None

    @torch.no_grad()
    def update(self, images: Tensor, indices: Tensor, is_reference: bool = False) -> None:
        """Add images of one side.

        Args:
            images: (n, 3, H, W) uint8.
            indices: (n,) int64 number of each in its set.
            is_reference: whether they are real images rather than those to be judged.

        Raises:
            ValueError: if these are no such images, or of another size than those before.
        """
        if self.takes(images, indices):
            (self.references if is_reference else self.samples).update(self.extract(images.to(self.device)), indices)

    @torch.no_grad()
    def update_pairs(self, samples: Tensor, references: Tensor, indices: Tensor) -> None:
        """Add images (n, 3, H, W) uint8 to be judged and the real ones that belong to them, with their indices (n,)."""
        if not (self.takes(samples, indices) and self.takes(references, indices)):
            return
        samples, references = samples.to(self.device), references.to(self.device)
        close = similarities(samples, references)
        if self.lpips is not None:
            close["lpips"] = self.lpips.per_image(samples / 127.5 - 1, references / 127.5 - 1)
        self.samples.update(self.extract(samples) | close, indices)
        self.references.update(self.extract(references), indices)

    def takes(self, images: Tensor, indices: Tensor) -> bool:
        """Whether there are any images; raises ValueError for what cannot be measured."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) != len(indices):
            raise ValueError(
                f"images must be (n, 3, H, W) uint8 with n indices, got {tuple(images.shape)} {images.dtype} with "
                f"{len(indices)}"
            )
        size = (images.shape[2], images.shape[3])
        if len(images) and self.image_size not in (None, size):
            raise ValueError(f"images of {size} pixels after some of {self.image_size}: all must be of one size")
        self.image_size = size if len(images) else self.image_size
        return bool(len(images))

    def compute(
        self,
        samples: int | None = None,
        references: int | None = None,
        left_out: int = 0,
        deviations: Mapping[str, str] | None = None,
    ) -> Measurement:
        """Everything that the protocol asks for, the same on all processes.

        Args:
            samples: how many images to be judged there must be; None if that is not known.
            references: the same for real images.
            left_out: how many broken ones are left out of both.
            deviations: what the caller does otherwise than the protocol says, by the name of its field.

        Raises:
            ValueError: if there are no images, or one of them is missing or was counted more than once.
        """
        sample_count, sample_rows = self.samples.rows(samples, left_out)
        reference_count, reference_rows = self.references.rows(references, left_out)
        sizes = {size for size in gather_over_ranks(self.image_size) if size is not None}
        if len(sizes) != 1 or not sample_count:
            raise ValueError(f"nothing to measure: {sample_count} samples, images of {sorted(sizes)} pixels")
        deviations = dict(deviations or {})
        if self.protocol.statistics == "file" and not self.statistics:
            deviations["statistics"] = "images"
        measurement = Measurement(
            self.protocol,
            self.network.name,
            {"features": self.network.digest} | ({"lpips": self.lpips.digest} if self.lpips is not None else {}),
            sizes.pop(),
            sample_count,
            reference_count,
            deviations,
        )
        values, unavailable = self.measure(sample_rows, reference_rows)
        return replace(measurement, values=values, unavailable=unavailable)

    def measure(self, samples: Rows, references: Rows) -> tuple[dict[str, float], dict[str, str]]:
        """Results of the protocol's metrics, and why others cannot be had."""
        ways: dict[str, Callable[[Rows, Rows], dict[str, float]]] = {
            "fid": self.measure_fid,
            "sfid": self.measure_sfid,
            "inception_score": self.measure_inception_score,
            "precision_recall": self.measure_precision_recall,
        }
        values: dict[str, float] = {}
        unavailable: dict[str, str] = {}
        for metric in self.protocol.metrics:
            try:
                if metric in ways:
                    found = ways[metric](samples, references)
                else:
                    found = {
                        metric: float(
                            present(samples, metric, "no pairs of images, or no network was given").double().mean()
                        )
                    }
                if not all(math.isfinite(value) for value in found.values()):
                    raise UnavailableError(f"not finite: {found}")
                values |= found
            except UnavailableError as reason:
                unavailable[metric] = str(reason)
        return values, unavailable

    def measure_fid(self, samples: Rows, references: Rows) -> dict[str, float]:
        """Fréchet distance of the pooled features: ``fid`` with Inception, otherwise ``fd``."""
        return {"fid" if self.network.is_inception else "fd": self.frechet("pool")}

    def measure_sfid(self, samples: Rows, references: Rows) -> dict[str, float]:
        """Fréchet distance of the spatial features: ``sfid`` with Inception, otherwise ``sfd``."""
        return {"sfid" if self.network.is_inception else "sfd": self.frechet("spatial")}

    def frechet(self, name: str) -> float:
        """Fréchet distance of features by name, over all processes."""
        real = self.references.moments[name].gaussian()
        real, found = self.statistics.get(name, real), self.samples.moments[name].gaussian()
        if found is None or real is None:
            raise UnavailableError(f"no {name} features, or fewer than two images")
        for gaussian in (found, real):
            if gaussian.count is not None and gaussian.count <= len(gaussian.mean):
                raise UnavailableError(
                    f"{gaussian.count} images are too few for {len(gaussian.mean)} {name} features: measure on more "
                    "images, or with a smaller network"
                )
        return found.distance(real)

    def measure_inception_score(self, samples: Rows, references: Rows) -> dict[str, float]:
        """``inception_score``."""
        logits = present(samples, "logits", f"{self.network.name} gives no logits")
        return {"inception_score": inception_score(logits, self.protocol.inception_score_split)}

    def measure_precision_recall(self, samples: Rows, references: Rows) -> dict[str, float]:
        """``precision`` and ``recall``."""
        found, real = present(samples, "pool", "no samples"), present(references, "pool", "no reference images")
        k, device = self.protocol.neighbours, self.device
        try:
            precision, recall = precision_recall(found.to(device), real.to(device), k)
        except ValueError as error:
            raise UnavailableError(str(error)) from error
        return {"precision": precision, "recall": recall}


def present(rows: Rows, name: str, reason: str) -> Tensor:
    """These rows; raises UnavailableError with the reason if there are none."""
    if name not in rows:
        raise UnavailableError(reason)
    return rows[name]
