"""From the checkpoint of a training run to a published folder: tokenizers of stages 1 and 2, SiTs of stage 3.

What a checkpoint holds and how its network is built stand in the run's ``config.yaml``.
"""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from torch import Tensor, nn

from maetok.checkpoints.files import read_checkpoint, read_weights
from maetok.checkpoints.runs import locate_checkpoint
from maetok.networks.denoiser.sit import SiT
from maetok.networks.folder import PUBLISHED_FILES, STATISTICS_FILE, write_statistics
from maetok.networks.tokenizer.tokenizer import Tokenizer

TRAINED = {"TokenizerTraining": "tokenizer", "DecoderFinetuning": "tokenizer", "LatentDiffusion": "denoiser"}
"""The network that a task of a config trains: an argument of the task."""

PREFIXES = {
    "tokenizer": {"ema": "ema.network.tokenizer.", "raw": "model.tokenizer."},
    "denoiser": {"ema": "emas.0.network.", "raw": "denoiser."},
}
"""Beginnings of the names of its weights in a checkpoint; of several averages the first, which validation uses."""


def export(ckpt: str | Path, output: str | Path, config: str | Path | None = None, weights: str = "ema") -> nn.Module:
    """Write the network of a checkpoint as a published folder.

    Args:
        ckpt: a checkpoint, or the directory of a run for its newest one.
        output: folder for ``config.json`` and ``model.safetensors``, and for ``latent_statistics.safetensors`` of a
            denoiser.
        config: config of the run; by default ``config.yaml`` in the run directory.
        weights: ``ema`` for the moving average, ``raw`` for the weights that were trained.

    Returns:
        The network that was written, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no checkpoint or no config.
        FileExistsError: if the folder holds a model already.
        ValueError: if the files are of another kind, do not fit each other, or hold what the format has no place for.
    """
    output, ckpt = Path(output), locate_checkpoint(Path(ckpt))
    taken = [name for name in (*PUBLISHED_FILES, STATISTICS_FILE) if (output / name).exists()]
    if taken:
        raise FileExistsError(f"--output={output} holds {', '.join(taken)} already: give another folder, or remove it")
    task = read_task(ckpt.parent.parent / "config.yaml" if config is None else Path(config))
    part = TRAINED[task["class_path"].rpartition(".")[2]]
    network = build_network(task["init_args"].get(part), f"model.init_args.{part}")
    if part == "denoiser" and not isinstance(network, SiT):
        raise ValueError(
            f"model.init_args.denoiser.class_path={task['init_args'][part]['class_path']}: only SiT has a published "
            "format; keep the checkpoint, which denoiser_from and guide_from read"
        )
    state = read_state(ckpt)
    load(network, state, PREFIXES[part][weights], f"--ckpt={ckpt} --weights={weights}")
    network.eval()
    if isinstance(network, Tokenizer):
        network.save_pretrained(output)
    elif isinstance(network, SiT):
        mean, std = statistics_of(state, str(ckpt))
        network.save_pretrained(output)
        write_statistics(output, mean, std)
    return network


def read_task(path: Path) -> dict[str, Any]:
    """``class_path`` and ``init_args`` of the task in a config.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no config of a run, or its task trains nothing that can be published.
    """
    import yaml  # type: ignore[import-untyped]

    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such config; give the config.yaml of the run as --config")
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config={path} is no YAML ({error})") from error
    task = config.get("model") if isinstance(config, dict) else None
    if not isinstance(task, dict) or not {"class_path", "init_args"} <= task.keys():
        raise ValueError(f"--config={path} lacks model.class_path and model.init_args: give the config.yaml of the run")
    if task["class_path"].rpartition(".")[2] not in TRAINED:
        raise ValueError(
            f"--config={path}: model.class_path={task['class_path']} trains nothing that can be published; give a "
            f"checkpoint of {', '.join(TRAINED)}"
        )
    return task


def build_network(description: Any, key: str) -> nn.Module:
    """The network that a config describes; raises ValueError, naming the key, if it cannot be built."""
    if not isinstance(description, dict) or "class_path" not in description:
        raise ValueError(
            f"{key}={description!r} has no class_path; files that a config names are filled in only in the config.yaml "
            "that a run saves: give that one as --config"
        )
    try:
        return build(description)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{key}.class_path={description['class_path']} cannot be built with the init_args of the config: {error}"
        ) from error


def build(description: Mapping[str, Any]) -> Any:
    """Call what ``class_path`` names with its ``init_args``, which are made what the signature says."""
    target = imported(description["class_path"])
    hints = get_type_hints(target.__init__ if isinstance(target, type) else target)  # type: ignore[misc]
    arguments = {**description.get("init_args", {}), **description.get("dict_kwargs", {})}
    return target(**{name: argument(value, hints.get(name)) for name, value in arguments.items()})


def argument(value: Any, hint: Any) -> Any:
    """A value of a config as its parameter wants it: an object, a builder of objects, a dataclass or a tuple."""
    if isinstance(value, dict) and "class_path" in value:
        if get_origin(hint) is Callable:
            return partial(imported(value["class_path"]), **value.get("init_args", {}))
        return build(value)
    if isinstance(value, dict) and is_dataclass(hint):
        return hint(**value)  # type: ignore[operator]
    return tuple(value) if isinstance(value, list) else value


def imported(path: str) -> Any:
    """What a dotted path names: a class or function of a module, or a method of a class."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module or "." not in module:  # a module that exists and lacks one of its own
            raise
        return getattr(imported(module), name)


def read_state(path: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint, mapped rather than read; raises ValueError for another kind of file."""
    if path.is_dir():
        return read_weights(path)
    try:
        checkpoint = read_checkpoint(path, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"--ckpt={path} is not a complete checkpoint ({error})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"--ckpt={path} has no state_dict: give a checkpoint of a run, checkpoints/step=N.ckpt")
    return checkpoint["state_dict"]


def load(network: nn.Module, state: Mapping[str, Tensor], prefix: str, source: str) -> None:
    """Load the weights of one prefix strictly; raises ValueError if there are none or they do not fit."""
    found = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
    if not found:
        prefixes = sorted({".".join(name.split(".")[:3]) for name in state})
        raise ValueError(
            f"{source}: no weights {prefix}*, which the task of the config has, but {', '.join(prefixes)}; give the "
            "config.yaml of the same run as --config"
        )
    try:
        network.load_state_dict(found)
    except RuntimeError as error:
        raise ValueError(
            f"{source}: the weights {prefix}* are those of another network than the config describes; give the "
            f"config.yaml of the same run as --config: {error}"
        ) from error


def statistics_of(state: Mapping[str, Tensor], source: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of the latents that a denoiser was trained on; raises ValueError without."""
    if not {"normalizer.mean", "normalizer.std"} <= state.keys():
        raise ValueError(f"--ckpt={source} lacks normalizer.mean and normalizer.std, the statistics of the latents")
    return state["normalizer.mean"], state["normalizer.std"]
