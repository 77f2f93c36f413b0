"""Improved precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991)."""

from torch import Tensor

from maetok.metrics.metric import Batch, Metric, Rows, UnavailableError


def precision_recall(
    samples: Tensor, references: Tensor, neighbours: int = 3, chunk: int = 1000
) -> tuple[float, float]:
    """Return the share of samples on the manifold of the references, and of references on the samples' manifold.

    The manifold of a set is the union of the balls around its members; each ball reaches to the k-th neighbour of its
    member. torch-fidelity computes both shares; float64 keeps rounding from deciding who lies inside, where the ADM
    evaluation suite computes distances in float16.

    Args:
        samples: (n, D) features of the images to judge.
        references: (m, D) features of real images.
        neighbours: k; 3 in the paper and in the ADM evaluation suite.
        chunk: rows of the distance matrix that are in memory at a time.

    Returns:
        Precision and recall, in [0, 1].

    Raises:
        ValueError: if a set has no more members than ``neighbours``.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    for name, features in (("samples", samples), ("references", references)):
        if len(features) <= neighbours:
            raise ValueError(f"{neighbours} neighbours need more images than that, got {len(features)} {name}")
    found = prc_features_to_metric(
        samples.double(),
        references.double(),
        prc_neighborhood=neighbours,
        prc_batch_size=chunk,
        save_cpu_ram=True,
        verbose=False,
    )
    # The library averages in float32; the counts give the exact shares.
    count, reference_count = len(samples), len(references)
    return round(found["precision"] * count) / count, round(found["recall"] * reference_count) / reference_count


class PrecisionRecall(Metric):
    """Measures precision and recall in pooled features.

    With Inception, 8 KB per image are kept in main memory.

    Args:
        neighbours: k of the k-th nearest neighbour.
    """

    name = "precision_recall"
    needs = ("pool",)

    def __init__(self, neighbours: int = 3) -> None:
        self.neighbours = neighbours

    def reset(self) -> None:
        """Forget all images."""
        self.samples, self.references = Rows(), Rows("reference images")

    def update(self, batch: Batch) -> None:
        """Keep the features of the sides that the batch holds."""
        for rows, values in ((self.samples, batch.samples), (self.references, batch.references)):
            if values:
                rows.append(batch.indices, values["pool"])

    def compute(self) -> dict[str, float]:
        """Return ``precision`` and ``recall``; raises UnavailableError if there are too few images."""
        samples, references = self.samples.gather().to(self.device), self.references.gather().to(self.device)
        try:
            precision, recall = precision_recall(samples, references, self.neighbours)
        except ValueError as error:
            raise UnavailableError(str(error)) from error
        return {"precision": precision, "recall": recall}
