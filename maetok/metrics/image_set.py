"""What is collected of one of two sets of images, each sample exactly once over all processes."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from maetok.metrics.gaussians import Moments
from maetok.runtime.distributed import gather_over_ranks


class ImageSet:
    """Moments of features, and the rows that a metric needs as they are.

    Args:
        side: ``samples`` or ``references``, for error messages.
        kept: names of the features and per-image results of which every row is kept, in main memory.
        device: where moments are added up.
    """

    def __init__(self, side: str, kept: Collection[str], device: torch.device) -> None:
        self.side = side
        self.moments = {name: Moments(device) for name in ("pool", "spatial")}
        self.indices: list[Tensor] = []
        self.kept: dict[str, list[Tensor]] = {name: [] for name in kept}

    def update(self, features: Mapping[str, Tensor], indices: Tensor) -> None:
        """Add features and per-image results (n, ...) by name, of samples with these indices (n,)."""
        self.indices.append(indices.cpu())
        for name in features.keys() & self.moments.keys():
            self.moments[name].update(features[name])
        for name in features.keys() & self.kept.keys():
            self.kept[name].append(features[name].cpu())

    def rows(self, expected: int | None, left_out: int) -> tuple[int, dict[str, Tensor]]:
        """Number of samples over all processes, and what was kept of them, in the order of their indices.

        Args:
            expected: number of samples of the set; None if it is not known.
            left_out: how many of them are broken.

        Raises:
            ValueError: unless every sample was counted exactly once.
        """
        indices = all_rows(self.indices)
        if indices is None:
            indices = torch.empty(0, dtype=torch.int64)
        check_indices(indices, expected, left_out, self.side)
        order = indices.argsort()
        kept = {name: all_rows(parts) for name, parts in self.kept.items()}
        return len(indices), {name: rows[order] for name, rows in kept.items() if rows is not None}


def all_rows(parts: list[Tensor]) -> Tensor | None:
    """The rows of all processes, one process after another; None if there are none."""
    everything = [part for others in gather_over_ranks(parts) for part in others]
    return torch.cat(everything) if everything else None


def check_indices(indices: Tensor, expected: int | None, left_out: int, side: str) -> None:
    """Raise ValueError unless samples 0 ... expected - 1 were counted once each, but for those left out.

    Args:
        indices: (n,) int64, of all processes.
        expected: number of samples of the set; None if it is not known, so that only duplicates are found.
        left_out: number of broken samples.
        side: ``samples`` or ``references``.
    """
    values, counts = indices.unique(return_counts=True)
    if len(values) < len(indices):
        raise ValueError(
            f"{len(indices) - len(values)} {side} too many: index {int(values[counts > 1][0])} was counted more than "
            "once; every process must be given other samples"
        )
    if expected is None:
        return
    wanted = torch.arange(expected)
    unknown, missing = values[~torch.isin(values, wanted)], wanted[~torch.isin(wanted, values)]
    if len(unknown):
        raise ValueError(f"index {int(unknown[0])} of the {side} is none of 0 ... {expected - 1}")
    if len(missing) != left_out:
        examples = ", ".join(str(int(index)) for index in missing[:3])
        raise ValueError(
            f"{len(missing)} of {expected} {side} are missing where {left_out} are known to be broken (first indices: "
            f"{examples or 'none'}): every other sample must be measured"
        )
