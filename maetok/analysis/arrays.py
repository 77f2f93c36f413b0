"""numpy arrays and tensors alike: what is analysed on the CPU or, as tensors, on a GPU."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    Array = np.ndarray | Tensor


def flattened(latents: "Array") -> Any:
    """(n, ...) of any float type -> (n, d) float64, on the device it is on."""
    flat = latents.reshape(len(latents), -1)
    return flat.astype(np.float64) if isinstance(flat, np.ndarray) else flat.double()


def as_numpy(array: "Array") -> np.ndarray:
    """The same values as a numpy array."""
    return array if isinstance(array, np.ndarray) else array.cpu().numpy()


def like(array: np.ndarray, other: "Array") -> Any:
    """A numpy array as what ``other`` is: numpy array, or tensor on its device."""
    if isinstance(other, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array).to(other.device)


@contextmanager
def array_api(array: "Array") -> Iterator[None]:
    """Within it scikit-learn computes on tensors where they are, through the array API; numpy arrays go the usual way.

    scikit-learn insists that SciPy's own switch is on, even for estimators that do not use SciPy.
    """
    import sklearn

    if isinstance(array, np.ndarray):
        yield
        return
    before = os.environ.get("SCIPY_ARRAY_API")
    os.environ["SCIPY_ARRAY_API"] = "1"
    try:
        with sklearn.config_context(array_api_dispatch=True):
            yield
    finally:
        os.environ.pop("SCIPY_ARRAY_API")
        if before is not None:
            os.environ["SCIPY_ARRAY_API"] = before
