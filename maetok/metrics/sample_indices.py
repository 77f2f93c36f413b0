"""Accounting for samples: each counts exactly once over all processes."""

import torch
from torch import Tensor

from maetok.runtime.distributed import gather_over_ranks


class SampleIndices:
    """Records which images of a set were measured.

    Args:
        side: ``samples`` or ``references``, for error messages.
    """

    def __init__(self, side: str) -> None:
        self.side = side
        self.indices = torch.empty(0, dtype=torch.int64)

    def update(self, indices: Tensor) -> None:
        """Add the indices (n,) of measured images."""
        self.indices = torch.cat([self.indices, indices.cpu()])

    def count(self, expected: int | None, left_out: int) -> int:
        """Return the number of images over all processes.

        Args:
            expected: number of images in the set; None if unknown.
            left_out: number of broken images.

        Raises:
            ValueError: unless every image was counted exactly once.
        """
        indices = torch.cat(gather_over_ranks(self.indices))
        check_indices(indices, expected, left_out, self.side)
        return len(indices)


def check_indices(indices: Tensor, expected: int | None, left_out: int, side: str) -> None:
    """Raise ValueError unless images 0 ... expected - 1 were counted once each, except those left out.

    Args:
        indices: (n,) int64, of all processes.
        expected: number of images in the set; None if unknown: then only duplicates are found.
        left_out: number of broken images.
        side: ``samples`` or ``references``.
    """
    values, counts = indices.unique(return_counts=True)
    if len(values) < len(indices):
        raise ValueError(
            f"{len(indices) - len(values)} {side} too many: index {int(values[counts > 1][0])} was counted more than "
            "once; give every process different samples"
        )
    if expected is None:
        return
    wanted = torch.arange(expected)
    unknown, missing = values[~torch.isin(values, wanted)], wanted[~torch.isin(wanted, values)]
    if len(unknown):
        raise ValueError(f"index {int(unknown[0])} of the {side} is not in 0 ... {expected - 1}")
    if len(missing) != left_out:
        examples = ", ".join(str(int(index)) for index in missing[:3])
        raise ValueError(
            f"{len(missing)} of {expected} {side} are missing, but {left_out} are known to be broken (first indices: "
            f"{examples or 'none'}): measure every other sample"
        )
