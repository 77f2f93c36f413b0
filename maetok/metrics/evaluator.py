"""Measurement of two sets of images under a protocol, for callbacks and for ``python -m maetok.metrics``."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from maetok.losses import LPIPSLoss
from maetok.metrics.features import feature_network
from maetok.metrics.gaussians import Gaussian
from maetok.metrics.metric import Batch, Metric, UnavailableError
from maetok.metrics.protocols import EvaluationProtocol, Measurement
from maetok.metrics.sample_indices import SampleIndices
from maetok.metrics.standard import protocol_metrics
from maetok.runtime.distributed import gather_over_ranks
from maetok.runtime.pretrained import UnregisteredModule


class ImageEvaluator:
    """Feeds batches of images of both sides to metrics, on any number of processes, and collects the results.

    Every process must call :meth:`compute`.

    Args:
        protocol: names what to measure.
        features: a :class:`maetok.metrics.features.FeatureNetwork`, or any network that maps images in [0, 1] to one
            vector each.
        lpips: network of LPIPS; without it there is no such metric.
        reference_moments: moments of a reference set by name of the Inception features (``pool``, ``spatial``); they
            replace the moments of the reference images.
        device: where features and distances are computed, and where collective operations run.
        metrics: metrics to measure besides the protocol's.

    Raises:
        ValueError: for reference moments with a network other than Inception, and for two metrics of one name.
    """

    def __init__(
        self,
        protocol: EvaluationProtocol,
        features: nn.Module,
        lpips: LPIPSLoss | None = None,
        reference_moments: Mapping[str, Gaussian] | None = None,
        device: torch.device | str = "cpu",
        metrics: Sequence[Metric] = (),
    ) -> None:
        self.protocol, self.network, self.device = protocol, feature_network(features), torch.device(device)
        self.reference_moments = reference_moments or {}
        if self.reference_moments and not self.network.is_inception:
            raise ValueError(
                f"the reference moments belong to Inception features, not to {self.network.name}: use "
                "InceptionFeatures (--features inception), or reference images"
            )
        self.extract = UnregisteredModule(self.network)
        standard = protocol_metrics(protocol, self.network.is_inception, lpips, self.reference_moments)
        self.metrics = [*standard, *metrics]
        names = [metric.name for metric in self.metrics]
        if len(set(names)) < len(names):
            raise ValueError(f"metrics={names}: two metrics have one name, so their results could not be told apart")
        for metric in self.metrics:
            metric.device = self.device
            metric.reset()
        self.samples, self.references = SampleIndices("samples"), SampleIndices("references")
        self.available: set[str] = set()
        self.image_size: tuple[int, int] | None = None

    @torch.no_grad()
    def update(self, images: Tensor, indices: Tensor, is_reference: bool = False) -> None:
        """Add images of one side.

        Args:
            images: (n, 3, H, W) uint8.
            indices: (n,) int64, the number of each image in its set.
            is_reference: whether these are real images rather than images to judge.

        Raises:
            ValueError: if dtype or shape is wrong, or the size differs from earlier images.
        """
        if not self.accepts(images, indices):
            return
        values = self.values_of(images)
        if is_reference:
            self.references.update(indices)
            self.feed(Batch(indices, references=values))
        else:
            self.samples.update(indices)
            self.feed(Batch(indices, samples=values))

    @torch.no_grad()
    def update_pairs(self, samples: Tensor, references: Tensor, indices: Tensor) -> None:
        """Add images to judge (n, 3, H, W) uint8 and the real images that belong to them, with their indices (n,)."""
        if not (self.accepts(samples, indices) and self.accepts(references, indices)):
            return
        self.samples.update(indices)
        self.references.update(indices)
        self.feed(Batch(indices, self.values_of(samples), self.values_of(references)))

    def values_of(self, images: Tensor) -> dict[str, Tensor]:
        """Return the images on the device, with their features if a metric needs any."""
        images = images.to(self.device)
        needs = {need for metric in self.metrics for need in metric.needs}
        return {"images": images} | (self.extract(images) if needs - {"images", "pairs"} else {})

    def feed(self, batch: Batch) -> None:
        """Give each metric the batch, if the batch holds what the metric needs."""
        there = set(batch.samples or batch.references) | ({"pairs"} if batch.samples and batch.references else set())
        self.available |= there
        for metric in self.metrics:
            if there.issuperset(metric.needs):
                metric.update(batch)

    def accepts(self, images: Tensor, indices: Tensor) -> bool:
        """Return whether there are any images; raise ValueError for what cannot be measured."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or len(images) != len(indices):
            raise ValueError(
                f"images must be (n, 3, H, W) uint8 with n indices, got {tuple(images.shape)} {images.dtype} with "
                f"{len(indices)}"
            )
        size = (images.shape[2], images.shape[3])
        if len(images) and self.image_size not in (None, size):
            raise ValueError(f"images of {size} pixels after images of {self.image_size}: all must have one size")
        self.image_size = size if len(images) else self.image_size
        return bool(len(images))

    def compute(
        self,
        samples: int | None = None,
        references: int | None = None,
        left_out: int = 0,
        deviations: Mapping[str, str] | None = None,
    ) -> Measurement:
        """Return all results, the same on all processes.

        Args:
            samples: how many images to judge there must be; None if unknown.
            references: the same for real images.
            left_out: how many broken images both sides leave out.
            deviations: what the caller does differently from the protocol, by the name of the protocol's field.

        Raises:
            ValueError: if there are no images, or one of them is missing or was counted more than once.
        """
        sample_count = self.samples.count(samples, left_out)
        reference_count = self.references.count(references, left_out)
        sizes = {size for size in gather_over_ranks(self.image_size) if size is not None}
        if len(sizes) != 1 or not sample_count:
            raise ValueError(f"nothing to measure: {sample_count} samples, images of {sorted(sizes)} pixels")
        deviations = dict(deviations or {})
        if self.protocol.reference_moments_from == "file" and not self.reference_moments:
            deviations["statistics"] = "images"  # the field's name in records, see EvaluationProtocol.recorded_fields
        measurement = Measurement(
            self.protocol,
            self.network.name,
            {"features": self.network.digest}
            | {metric.name: metric.digest for metric in self.metrics if metric.digest is not None},
            sizes.pop(),
            sample_count,
            reference_count,
            deviations,
        )
        values, unavailable = self.results()
        return replace(measurement, values=values, unavailable=unavailable)

    def results(self) -> tuple[dict[str, float], dict[str, str]]:
        """Return the results by name, and by metric the reasons why others are unavailable."""
        available = set().union(*gather_over_ranks(self.available))
        values: dict[str, float] = {}
        unavailable: dict[str, str] = {}
        for metric in self.metrics:
            missing = [need for need in metric.needs if need not in available]
            if missing:
                reason = "no pairs of images" if missing == ["pairs"] else f"{self.network.name} gives no {missing[0]}"
                unavailable[metric.name] = metric.unavailable_reason or reason
                continue
            try:
                found = metric.compute()
                if not all(math.isfinite(value) for value in found.values()):
                    raise UnavailableError(f"not finite: {found}")
                if values.keys() & found.keys():
                    raise ValueError(f"metrics: {metric.name} gives {sorted(found)}, as another metric does: rename it")
                values |= found
            except UnavailableError as reason_found:
                unavailable[metric.name] = str(reason_found)
        return values, unavailable
