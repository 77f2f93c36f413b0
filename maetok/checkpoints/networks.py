"""Records of the networks that a checkpoint's task trains, and reading of their weights.

A task writes one record for each network it trains; :data:`LEGACY` stands in for checkpoints that have none.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maetok.checkpoints.files import REST, Checkpoint, read_checkpoint, read_weights

KEY = "networks"
"""Key of the records in a checkpoint: {name: record}; the name is the argument of the task."""


@dataclass(frozen=True)
class NetworkRecord:
    """One trained network of a checkpoint.

    Args:
        raw: beginning of the names of its weights as they were trained.
        averaged: beginning of the names of its moving average, which holds the trained modules only; of several
            averages the first, which validation uses.
        class_path: class or function that builds it.
        init_args: arguments for it, as in a config; None if the network was not built from one.
    """

    raw: str
    averaged: str
    class_path: str = ""
    init_args: dict[str, Any] | None = None

    def weights(self, state: Mapping[str, Tensor], averaged: bool = True) -> dict[str, Tensor]:
        """Return all weights of the network from a checkpoint's weights, without prefix; empty if there are none.

        With ``averaged`` they come from the moving average, and from the network itself where it was not trained.
        """
        raw, average = (without_prefix(state, prefix) for prefix in (self.raw, self.averaged))
        if averaged:
            return raw | average if average else {}
        return raw


TOKENIZER = NetworkRecord("model.tokenizer.", "ema.network.tokenizer.")
DENOISER = NetworkRecord("denoiser.", "emas.0.network.")
LEGACY = {
    "TokenizerTraining": {"tokenizer": TOKENIZER},
    "DecoderFinetuning": {"tokenizer": TOKENIZER},
    "LatentDiffusion": {"denoiser": DENOISER},
}
"""Records for checkpoints that have none, by the class name of the task in their ``config.yaml``."""


def without_prefix(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names begin with a prefix, without it."""
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def write_records(checkpoint: Checkpoint, records: Mapping[str, NetworkRecord]) -> None:
    """Put the records into a checkpoint."""
    checkpoint[KEY] = {name: asdict(record) for name, record in records.items()}


def read_records(path: Path) -> dict[str, NetworkRecord]:
    """Return the records of a checkpoint, a file or folder, by name; empty for one that has none."""
    if path.is_dir():
        content = torch.load(path / REST, map_location="cpu", weights_only=True)
    else:
        content = read_checkpoint(path, mmap=True)
    found = content.get(KEY, {}) if isinstance(content, dict) else {}
    return {name: NetworkRecord(**record) for name, record in found.items()}


def read_network(path: Path, prefix: str) -> dict[str, Tensor]:
    """Return the weights under a prefix, without it. Untrained weights complete a moving average.

    Args:
        path: a checkpoint, file or folder.
        prefix: beginning of the wanted names.
    """
    weights = without_prefix(read_weights(path, prefix), prefix)
    record = next((record for record in read_records(path).values() if record.averaged == prefix), None)
    if weights and record is not None:
        return without_prefix(read_weights(path, record.raw), record.raw) | weights
    return weights
