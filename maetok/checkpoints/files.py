"""Checkpoints on disk: one file, or a folder into which every process writes its shards.

A file holds the checkpoint as ``torch.save`` writes it: a dict with ``state_dict``, ``optimizer_states`` and other
entries. A folder holds the tensors of these two as ``torch.distributed.checkpoint`` writes them, under the names of
:func:`split`, and ``rest.pt`` with everything else. Any number of processes can read either, sharded or not.

Both are written under a hidden name, flushed to the disk and renamed, so a named checkpoint is always complete.
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
    """Return whether a complete checkpoint, a file or a folder, has this name."""
    return path.is_file() or ((path / REST).is_file() and (path / INDEX).is_file())


def split(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], Checkpoint]:
    """Return the tensors of weights and optimizer states by name, and the checkpoint without them.

    Names are ``state_dict.<name>`` and ``optimizer_states.<optimizer>.<parameter>.<name>``, where optimizers and
    parameters are numbers.
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
    """Invert :func:`split`; changes ``rest``."""
    for full_name, tensor in tensors.items():
        kind, name = full_name.split(".", 1)
        if kind == WEIGHTS:
            rest[WEIGHTS][name] = tensor
        else:
            number, index, key = name.split(".", 2)
            rest[OPTIMIZERS][int(number)]["state"].setdefault(int(index), {})[key] = tensor
    return rest


def stored_tensors(folder: Path) -> dict[str, TensorStorageMetadata]:
    """Return size and dtype of the tensors of a folder by name."""
    found = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {name: entry for name, entry in found.items() if isinstance(entry, TensorStorageMetadata)}


def read_tensors(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the whole tensors of a folder whose names begin with ``prefix``, on the CPU; not collective."""
    stored = {name: entry for name, entry in stored_tensors(folder).items() if name.startswith(prefix)}
    tensors: dict[str, Any] = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in stored.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # no_dist asks for that
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return tensors


def read_checkpoint(path: Path, weights_only: bool = True, mmap: bool = False) -> Checkpoint:
    """Return the whole checkpoint of a file or folder, on the CPU; with ``mmap`` a file is read only on use."""
    if path.is_dir():
        rest = torch.load(path / REST, map_location="cpu", weights_only=weights_only)
        return join(read_tensors(path), rest)
    return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=mmap)


def read_weights(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """Return the weights whose names begin with ``prefix``, on the CPU; weights of a file are read only on use."""
    if path.is_dir():
        tensors = read_tensors(path, f"{WEIGHTS}.{prefix}")
        return {name.removeprefix(f"{WEIGHTS}."): value for name, value in tensors.items()}
    weights = read_checkpoint(path, mmap=True)[WEIGHTS]
    return {name: value for name, value in weights.items() if name.startswith(prefix)}


class CheckpointFiles:
    """Writes and reads checkpoints; has the methods of Lightning's ``CheckpointIO``.

    Args:
        asynchronous: return as soon as everything is copied to host memory, and write while training continues. The
            next save or :meth:`wait` raises an error that occurred while writing.
    """

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous
        self.pending: Future[Any] | None = None
        self.writer: ThreadPoolExecutor | None = None
        self.processes: Any = None

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: Any = None) -> None:
        """Write a folder if weights are sharded (collective), and a file otherwise."""
        self.wait()
        path = Path(path)
        if any(isinstance(value, DTensor) for value in checkpoint[WEIGHTS].values()):
            self.save_folder(*split(checkpoint), path)
        elif self.asynchronous:
            self.pending = self.thread().submit(write_file, on_host(checkpoint), path)
        else:
            write_file(checkpoint, path)

    def save_folder(self, tensors: dict[str, Tensor], rest: Checkpoint, path: Path) -> None:
        """Write this process's shards; the first process writes the rest and renames the folder."""
        first, hidden = dist.get_rank() == 0, partial_path(path)
        serialized = io.BytesIO()
        torch.save(rest, serialized)  # now, because counters keep counting
        if first:
            remove(hidden)
            hidden.mkdir(parents=True)
        dist.barrier()
        writer = dcp.FileSystemWriter(hidden)
        if self.asynchronous:
            # Training communicates at the same time, so this needs its own process group.
            self.processes = self.processes or dist.new_group(backend="gloo")
            written = dcp.async_save(tensors, storage_writer=writer, process_group=self.processes)
            self.pending = self.thread().submit(finish_folder, written, serialized if first else None, path)
        else:
            dcp.save(tensors, storage_writer=writer)
            finish_folder(None, serialized if first else None, path)
            dist.barrier()

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Return the checkpoint that the first process names, whole and on the CPU."""
        self.wait()
        return read_checkpoint(Path(gather_over_ranks(str(path))[0]), weights_only is not False)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file or folder."""
        remove(Path(path))

    def wait(self) -> None:
        """Wait until everything is on the disk; raise an error that occurred while writing."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    teardown = wait

    def thread(self) -> ThreadPoolExecutor:
        """Return the writing thread."""
        self.writer = self.writer or ThreadPoolExecutor(1, "checkpoint")
        return self.writer


def write_file(checkpoint: Checkpoint, path: Path) -> None:
    """Write one file, which is either complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_and_flush(checkpoint, partial_path(path))
    publish(path)


def finish_folder(written: Any, rest: io.BytesIO | None, path: Path) -> None:
    """Wait for the tensors of all processes; on the process with ``rest``, write it and rename the folder."""
    if written is not None:
        written.result()
    if rest is not None:
        write_and_flush(rest.getbuffer(), partial_path(path) / REST)
        publish(path)


def write_and_flush(content: Any, path: Path) -> None:
    """Write bytes, or any object with ``torch.save``, and wait until they are on the disk."""
    with open(path, "wb") as file:
        file.write(content) if isinstance(content, memoryview) else torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def publish(path: Path) -> None:
    """Rename a complete checkpoint to its final name, replacing an older one."""
    if path.is_dir() or partial_path(path).is_dir():  # only a file replaces a file in one step
        remove(path)
    files.publish(partial_path(path), path)


def remove(path: Path) -> None:
    """Remove a file or folder if it exists; a folder loses its name before its content."""
    if path.is_dir():
        hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.removed")
        if hidden != path:
            remove(hidden)
            os.rename(path, hidden)
        shutil.rmtree(hidden)
    else:
        path.unlink(missing_ok=True)


def remove_partial(folders: Iterable[Path]) -> None:
    """Remove checkpoints that killed processes left partly written or partly removed."""
    for folder in folders:
        for pattern in (".*.partial", ".*.removed"):
            for path in folder.glob(pattern):
                remove(path)


def on_host(value: Any) -> Any:
    """Return a copy that training does not change, with tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_host(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_host(entry) for entry in value)
    return copy.deepcopy(value)
