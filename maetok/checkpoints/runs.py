"""Checkpoints of a run, and initial weights of a network."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import nn

from maetok.checkpoints.files import is_complete, read_weights
from maetok.checkpoints.networks import read_network
from maetok.runtime.weights import on_meta_device

PATTERN = re.compile(r"step=(\d+)\.ckpt")


def complete_checkpoints(run_directory: str | Path) -> list[Path]:
    """Return all complete checkpoints of a run, oldest first; partial ones have another name."""
    folder = Path(run_directory) / "checkpoints"
    found = [path for path in folder.glob("step=*.ckpt") if PATTERN.fullmatch(path.name) and is_complete(path)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint of a run."""
    match = PATTERN.fullmatch(path.name)
    assert match is not None
    return int(match[1])


@dataclass(frozen=True)
class InitFrom:
    """Initial weights of a network. Continuing a run is different: use ``--ckpt_path``.

    Args:
        path: a checkpoint, or the directory of a run for its newest one.
        prefix: beginning of the wanted names in the checkpoint; it is removed.
    """

    KEY: ClassVar[str] = "init_from"
    """Config key, for error messages."""

    path: str
    prefix: str = "ema.network.tokenizer."

    def load(self, network: nn.Module, required: bool = True) -> bool:
        """Load the weights strictly. A network on the meta device loads nothing: another process sends its weights.

        Args:
            network: where to load them.
            required: raise an error if the checkpoint holds no weights of this prefix.

        Returns:
            Whether weights were found; True for a network on the meta device.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if it holds no weights of this prefix, or weights of another network.
        """
        path = self.locate()
        if on_meta_device(network):
            return True
        weights = read_network(path, self.prefix)
        if not weights:
            if not required:
                return False
            prefixes = sorted({".".join(name.split(".")[:3]) for name in read_weights(path)})
            raise ValueError(
                f"{self.KEY}.prefix={self.prefix!r}: {path} has no such weights, but {', '.join(prefixes)}"
            )
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(
                f"{self.KEY}.path={self.path}: the weights {self.prefix}* of {path} belong to another network than "
                f"the config describes: {error}"
            ) from error
        return True

    def locate(self) -> Path:
        """Return the checkpoint, a file or folder; raise FileNotFoundError if there is none."""
        path = Path(self.path)
        if path.is_dir() and not is_complete(path):
            found = complete_checkpoints(path)
            if not found:
                raise FileNotFoundError(f"{self.KEY}.path={self.path}: no checkpoints in it; train that run first")
            return found[-1]
        if not is_complete(path):
            raise FileNotFoundError(
                f"{self.KEY}.path={self.path} is no checkpoint and no run directory; train that run first"
            )
        return path


def locate_checkpoint(path: Path) -> Path:
    """Return the checkpoint, or the newest of a run; raise FileNotFoundError if there is none."""
    found = complete_checkpoints(path)[-1:] if path.is_dir() and not is_complete(path) else [path]
    if not found or not is_complete(found[0]):
        raise FileNotFoundError(f"--ckpt={path} is no checkpoint, and no run directory with one: train that run first")
    return found[0]
