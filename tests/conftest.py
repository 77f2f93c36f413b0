"""Shared fixtures. `make test` gives every process one thread."""

from pathlib import Path

import pytest
import torch

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, packed once for the whole run."""
    from datamodules.pack.digits import pack_digits

    root = tmp_path_factory.mktemp("digits")
    pack_digits(root)
    return root
