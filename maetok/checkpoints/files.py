"""Checkpoints on disk: one file, or a folder into which every process writes its share of sharded tensors.

A file is what ``torch.save`` makes of the checkpoint, a dict with ``state_dict`` and ``optimizer_states`` and whatever
else. A folder holds the tensors of these two as ``torch.distributed.checkpoint`` writes them, under the names of
:func:`split`, and everything else in ``rest.pt``. Either can be read by any number of processes, sharded or not.

Both are written under a hidden name, flushed to the disk and renamed, so a name never stands for half a checkpoint.
"""

import copy
import io
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from maetok.formats import files
from maetok.formats.files import partial_path
from maetok.runtime.distributed import gather_over_ranks

REST, INDEX = "rest.pt", ".metadata"
WEIGHTS, OPTIMIZERS = "state_dict", "optimizer_states"

Checkpoint = dict[str, Any]


def is_complete(path: Path) -> bool:
    """Whether there is a checkpoint of this name, a file or a folder."""
    return path.is_file() or ((path / REST).is_file() and (path / INDEX).is_file())


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], Checkpoint]:
    """Tensors of weights and optimizer states by name, and the checkpoint without them.

    Names are ``state_dict.<name>`` and ``optimizer_states.<optimizer>.<parameter>.<name>``, the latter with numbers of
    optimizers and parameters.
    """
    tensors = {f"{WEIGHTS}.{name}": value for name, value in checkpoint[WEIGHTS].items() if isinstance(value, Tensor)}
    rest = {**checkpoint, WEIGHTS: {k: v for k, v in checkpoint[WEIGHTS].items() if not isinstance(v, Tensor)}}
    rest[OPTIMIZERS] = []
    for number, optimizer in enumerate(checkpoint.get(OPTIMIZERS, ())):
        numbers: dict[int, dict[str, Any]] = {}
        for index, state in optimizer["state"].items():
            numbers[index] = {name: value for name, value in state.items() if not isinstance(value, Tensor)}
            tensors |= {f"{OPTIMIZERS}.{number}.{index}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        rest[OPTIMIZERS].append({**optimizer, "state": numbers})
    return tensors, rest


def join(tensors: Mapping[str, Tensor], rest: Checkpoint) -> Checkpoint:
    """The inverse of :func:`split`; ``rest`` is changed."""
    for full_name, tensor in tensors.items():
        kind, name = full_name.split(".", 1)
        if kind == WEIGHTS:
            rest[WEIGHTS][name] = tensor
        else:
            number, index, key = name.split(".", 2)
            rest[OPTIMIZERS][int(number)]["state"].setdefault(int(index), {})[key] = tensor
    return rest


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Size and dtype of the tensors of a folder by name."""
    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole tensors of a folder whose names begin with ``prefix``, on the CPU; each process reads by itself."""
    stored = {name: entry for name, entry in stored_tensors(folder).items() if name.startswith(prefix)}
    tensors: dict[str, Any] = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in stored.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what no_dist asks for
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return tensors


def read_checkpoint(path: Path, weights_only: bool = True, mmap: bool = False) -> Checkpoint:
    """The whole checkpoint of a file or folder, on the CPU; of a file not yet read from the disk with ``mmap``."""
    if path.is_dir():
        rest = torch.load(path / REST, map_location="cpu", weights_only=weights_only)
        return join(read_tensors(path), rest)
    return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap)


def read_weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Weights of a checkpoint whose names begin with ``prefix``, on the CPU; a file is read only when they are used."""
    if path.is_dir():
        tensors = read_tensors(path, f"{WEIGHTS}.{prefix}")
        return {name.removeprefix(f"{WEIGHTS}."): value for name, value in tensors.items()}
    weights = read_checkpoint(path, mmap=True)[WEIGHTS]
    return {name: value for name, value in weights.items() if name.startswith(prefix)}


class CheckpointFiles:
    """Writes and reads checkpoints; has the methods of Lightning's ``CheckpointIO``.

    Args:
        asynchronous: return as soon as everything is copied to the memory of the host, and write while training goes
            on. An error in writing is raised by the next save or :meth:`wait`.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self.pending: Future[Any] | None = None
        self.writer: ThreadPoolExecutor | None = None
        self.processes: Any = None

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: Any = None) -> None:
        """Write a folder if weights are sharded, which all processes must do together, and a file otherwise."""
        self.wait()
        path = Path(path)
        if any(isinstance(value, DTensor) for value in checkpoint[WEIGHTS].values()):
            self.save_folder(*split(checkpoint), path)
        elif self.asynchronous:
            self.pending = self.thread().submit(write_file, on_host(checkpoint), path)
        else:
            write_file(checkpoint, path)

    def save_folder(self, tensors: dict[str, Tensor], rest: Checkpoint, path: Path) -> None:
        """Write this process's share of the tensors; the first process writes the rest, and renames."""
        first, hidden = dist.get_rank() == 0, partial_path(path)
        serialized = io.BytesIO()
        torch.save(rest, serialized)  # now, for counters go on counting
        if first:
            remove(hidden)
            hidden.mkdir(parents=True)
        dist.barrier()
        writer = dcp.FileSystemWriter(hidden)
        if self.asynchronous:
            # A process group of its own: training communicates at the same time.
            self.processes = self.processes or dist.new_group(backend="gloo")
            written = dcp.async_save(tensors, storage_writer=writer, process_group=self.processes)
            self.pending = self.thread().submit(finish_folder, written, serialized if first else None, path)
        else:
            dcp.save(tensors, storage_writer=writer)
            finish_folder(None, serialized if first else None, path)
            dist.barrier()

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """The checkpoint that the first process names, whole and on the CPU."""
        self.wait()
        return read_checkpoint(Path(gather_over_ranks(str(path))[0]), weights_only is not False)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file or folder."""
        remove(Path(path))

    def wait(self) -> None:
        """Return when everything is on the disk; raises what went wrong in writing it."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    teardown = wait

    def thread(self) -> ThreadPoolExecutor:
        """The thread that writes."""
        self.writer = self.writer or ThreadPoolExecutor(1, "checkpoint")
        return self.writer


def write_file(checkpoint: Checkpoint, path: Path) -> None:
    """Write one file, so that it is either there and complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_and_flush(checkpoint, partial_path(path))
    publish(path)


def finish_folder(written: Any, rest: io.BytesIO | None, path: Path) -> None:
    """When all processes have written their tensors, add the rest, if this process has it, and give it its name."""
    if written is not None:
        written.result()
    if rest is not None:
        write_and_flush(rest.getbuffer(), partial_path(path) / REST)
        publish(path)


def write_and_flush(content: Any, path: Path) -> None:
    """Write bytes, or an object by ``torch.save``, and wait until the disk has them."""
    with open(path, "wb") as file:
        file.write(content) if isinstance(content, memoryview) else torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def publish(path: Path) -> None:
    """Give a complete checkpoint its name; one of the same name is replaced."""
    if path.is_dir() or partial_path(path).is_dir():  # only a file replaces a file in one step
        remove(path)
    files.publish(partial_path(path), path)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there; a folder loses its name before its content."""
    if path.is_dir():
        hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.removed")
        if hidden != path:
            remove(hidden)
            os.rename(path, hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)


def remove_partial(folders: Iterable[Path]) -> None:
    """Remove what killed processes have left half written or half removed."""
    for folder in folders:
        for pattern in (".*.partial", ".*.removed"):
            for path in folder.glob(pattern):
                remove(path)


def on_host(value: Any) -> Any:
    """A copy that training does not change, with tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(entry) for entry in value)
    return copy.deepcopy(value)
