"""The contract of a metric, and containers for what a metric collects."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maetok.runtime.distributed import gather_over_ranks

Values = Mapping[str, Tensor]


class UnavailableError(Exception):
    """Says why a metric cannot be measured on these images with these networks."""


@dataclass(frozen=True)
class Batch:
    """Images of one side, or pairs of images of both sides, with their features.

    Args:
        indices: (n,) int64, the number of each image in its set.
        samples: images to judge: ``images`` (n, 3, H, W) uint8 and the features (n, D) that the metric needs, by name.
            Empty in a batch of references.
        references: the same for real images. Empty in a batch of samples.
    """

    indices: Tensor
    samples: Values = field(default_factory=dict)
    references: Values = field(default_factory=dict)


class Metric(ABC):
    """Measures a set of samples against a set of references.

    To add a metric, write a subclass in any module and name its class path in ``metrics`` of ``callbacks.ImageMetrics``
    or ``callbacks.SampleMetrics``, or in ``--metrics`` of ``python -m maetok.metrics``. The package does not change.

    ``needs`` lists what :meth:`update` receives. ``images`` are always there; ``pool``, ``spatial`` and ``logits`` are
    features that a :class:`maetok.metrics.features.FeatureNetwork` may give; with ``pairs`` the metric receives only
    batches that hold both sides, image for image. The evaluator checks that each image is counted exactly once.
    """

    name: str
    """Names the metric in a protocol, and in ``unavailable`` of a record."""
    needs: tuple[str, ...] = ("images",)
    unavailable_reason: str | None = None
    """Goes into a record where a need is not met; by default the evaluator names the need."""
    digest: str | None = None
    """Hash of a network that the metric brings; it enters the hash of the measurement."""
    device: torch.device = torch.device("cpu")
    """Where features arrive and where tensors of collective operations must be; the evaluator sets it."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all images. The evaluator calls this before the first update, after it has set ``device``."""

    @abstractmethod
    def update(self, batch: Batch) -> None:
        """Collect a batch of this process."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Return the results by the names under which they are logged and written.

        All processes call this together; all must return the same numbers.

        Raises:
            UnavailableError: if the images do not allow a result.
        """


class Rows:
    """Keeps one row per image in main memory.

    Args:
        side: names the images in messages: ``samples`` or ``reference images``.
    """

    def __init__(self, side: str = "samples") -> None:
        self.side = side
        self.parts: list[tuple[Tensor, Tensor]] = []

    def append(self, indices: Tensor, rows: Tensor) -> None:
        """Add rows (n, ...) of the images with these indices (n,)."""
        self.parts.append((indices.cpu(), rows.cpu()))

    def gather(self) -> Tensor:
        """Return the rows of all processes in the order of their indices, the same on each process.

        Raises:
            UnavailableError: if no process has any.
        """
        parts = [part for parts in gather_over_ranks(self.parts) for part in parts]
        if not parts:
            raise UnavailableError(f"no {self.side}")
        indices, rows = (torch.cat(column) for column in zip(*parts, strict=True))
        return rows[indices.argsort()]


class MeanOverPairs(Metric):
    """Averages a number per pair of images; a subclass defines :meth:`values`."""

    needs = ("pairs",)
    unavailable_reason = "no pairs of images, or no network was given"

    @abstractmethod
    def values(self, samples: Tensor, references: Tensor) -> Tensor:
        """Return (n,) numbers of pairs of images (n, 3, H, W) uint8."""

    def reset(self) -> None:
        """Forget all pairs."""
        self.rows = Rows()

    def update(self, batch: Batch) -> None:
        """Measure each pair."""
        self.rows.append(batch.indices, self.values(batch.samples["images"], batch.references["images"]))

    def compute(self) -> dict[str, float]:
        """Return the mean over all pairs."""
        return {self.name: float(self.rows.gather().double().mean())}
