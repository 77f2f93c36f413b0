"""Shared fixtures. `make test` gives every process one thread."""

import os
from pathlib import Path

import pytest
import torch

STORED = Path(__file__).parent / "data"
"""Files that are part of the tests: reference tensors, and runs and caches that older versions wrote."""
DATA = Path(os.environ.get("MAETOK_TEST_DATA", STORED))
"""Reference tensors that the parity tests compare with. ``MAETOK_TEST_DATA`` names another folder of the same form."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pack the digits once for the whole session."""
    from datamodules.pack.digits import pack_digits

    root = tmp_path_factory.mktemp("digits")
    pack_digits(root)
    return root
