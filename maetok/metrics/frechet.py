"""Fréchet distances between the features of two sets of images: FID, sFID, and FD in any other network's features."""

from maetok.metrics.gaussians import Gaussian, Moments
from maetok.metrics.metric import Batch, Metric, UnavailableError


class FrechetDistance(Metric):
    """Measures the Fréchet distance between Gaussians fitted to features (Heusel et al. 2017, arXiv 1706.08500).

    Only sums are kept: nothing grows with the number of images.

    Args:
        features: ``pool`` gives FID; ``spatial`` gives sFID (Nash et al. 2021, arXiv 2103.03841).
        is_inception: whether the features come from the Inception network. The results are then called ``fid`` and
            ``sfid``, and with any other network ``fd`` and ``sfd``.
        reference: moments of a reference set; without them the reference images are measured.
    """

    def __init__(self, features: str = "pool", is_inception: bool = False, reference: Gaussian | None = None) -> None:
        self.features, self.reference = features, reference
        self.name = "fid" if features == "pool" else "sfid"
        self.result = self.name if is_inception else self.name.replace("fid", "fd")
        self.needs = (features,)
        self.unavailable_reason = f"no {features} features, or fewer than two images"

    def reset(self) -> None:
        """Forget all images."""
        self.samples, self.references = Moments(self.device), Moments(self.device)

    def update(self, batch: Batch) -> None:
        """Add the features of the sides that the batch holds."""
        if batch.samples:
            self.samples.update(batch.samples[self.features])
        if batch.references and self.reference is None:
            self.references.update(batch.references[self.features])

    def compute(self) -> dict[str, float]:
        """Return the distance over all processes; raises UnavailableError if there are too few images."""
        real = self.references.gaussian() if self.reference is None else self.reference
        found = self.samples.gaussian()
        if found is None or real is None:
            raise UnavailableError(self.unavailable_reason)
        for gaussian in (found, real):
            if gaussian.count is not None and gaussian.count <= len(gaussian.mean):
                raise UnavailableError(
                    f"{gaussian.count} images are too few for {len(gaussian.mean)} {self.features} features: measure "
                    "on more images, or with a smaller network"
                )
        return {self.result: found.distance(real)}
