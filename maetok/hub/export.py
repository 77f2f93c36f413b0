"""Export a checkpoint of a run as a published folder: tokenizers of stages 1 and 2, SiTs of stage 3.

The checkpoint, or the run's ``config.yaml``, tells how to build the network.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from maetok.checkpoints.building import build_network
from maetok.checkpoints.files import read_checkpoint, read_weights
from maetok.checkpoints.networks import LEGACY, NetworkRecord, read_records
from maetok.checkpoints.runs import locate_checkpoint
from maetok.networks.folder import PUBLISHED_FILES, STATISTICS_FILE, write_statistics


def export(ckpt: str | Path, output: str | Path, config: str | Path | None = None, weights: str = "ema") -> nn.Module:
    """Write the network of a checkpoint as a published folder.

    Args:
        ckpt: a checkpoint, or the directory of a run for its newest one.
        output: folder for ``config.json`` and ``model.safetensors``, and for ``latent_statistics.safetensors`` of a
            denoiser.
        config: config of the run; by default ``config.yaml`` in the run directory.
        weights: ``ema`` for the moving average, ``raw`` for the trained weights.

    Returns:
        The written network, in evaluation mode.

    Raises:
        FileNotFoundError: if there is no checkpoint or no config.
        FileExistsError: if the folder holds a model already.
        ValueError: if the files are of another kind, do not match, or hold something that the format cannot express.
    """
    output, ckpt = Path(output), locate_checkpoint(Path(ckpt))
    taken = [name for name in (*PUBLISHED_FILES, STATISTICS_FILE) if (output / name).exists()]
    if taken:
        raise FileExistsError(f"--output={output} holds {', '.join(taken)} already: give another folder, or remove it")
    state = read_state(ckpt)
    name, record, description = describe(ckpt, None if config is None else Path(config))
    network = build_network(description, f"model.init_args.{name}")
    save = getattr(network, "save_pretrained", None)
    if save is None:
        raise ValueError(
            f"model.init_args.{name}.class_path={description['class_path']}: only Tokenizer and SiT have a published "
            "format; keep the checkpoint, which init_from, denoiser_from and guide_from read"
        )
    load(network, state, record, weights, f"--ckpt={ckpt} --weights={weights}")
    network.eval()
    moments = statistics_of(state, str(ckpt)) if name == "denoiser" else ()
    save(output)
    if moments:
        write_statistics(output, *moments)
    return network


def describe(ckpt: Path, config: Path | None) -> tuple[str, NetworkRecord, Any]:
    """Return name and record of the network that a checkpoint trains, and its description as in a config.

    The checkpoint holds both. A config describes the network if it is given, or if the checkpoint has no record or no
    arguments.

    Raises:
        FileNotFoundError: if a config is needed and there is none.
        ValueError: if it is no config of a run, or its task trains nothing that can be published.
    """
    records = read_records(ckpt)
    if config is None and records:
        name, record = next(iter(records.items()))
        if record.init_args is not None:
            return name, record, {"class_path": record.class_path, "init_args": record.init_args}
    path = ckpt.parent.parent / "config.yaml" if config is None else config
    task = read_task(path)
    records = records or LEGACY.get(task["class_path"].rpartition(".")[2], {})
    if not records:
        raise ValueError(
            f"--config={path}: model.class_path={task['class_path']} trains nothing that can be published; give a "
            f"checkpoint of {', '.join(LEGACY)}"
        )
    name, record = next(iter(records.items()))
    return name, record, task["init_args"].get(name)


def read_task(path: Path) -> dict[str, Any]:
    """Return ``class_path`` and ``init_args`` of the task in a config.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no config of a run.
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
    return task


def read_state(path: Path) -> dict[str, Tensor]:
    """Return all weights of a checkpoint, memory-mapped; raise ValueError for another kind of file."""
    if path.is_dir():
        return read_weights(path)
    try:
        checkpoint = read_checkpoint(path, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"--ckpt={path} is not a complete checkpoint ({error})") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"--ckpt={path} has no state_dict: give a checkpoint of a run, checkpoints/step=N.ckpt")
    return checkpoint["state_dict"]


def load(network: nn.Module, state: Mapping[str, Tensor], record: NetworkRecord, weights: str, source: str) -> None:
    """Load ``ema`` or ``raw`` weights strictly; raises ValueError if there are none or they do not fit."""
    prefix = record.averaged if weights == "ema" else record.raw
    found = record.weights(state, averaged=weights == "ema")
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
            f"{source}: the weights {prefix}* belong to another network than the config describes; give the "
            f"config.yaml of the same run as --config: {error}"
        ) from error


def statistics_of(state: Mapping[str, Tensor], source: str) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (C,) of a denoiser's training latents; raise ValueError without them."""
    if not {"normalizer.mean", "normalizer.std"} <= state.keys():
        raise ValueError(f"--ckpt={source} lacks normalizer.mean and normalizer.std, the statistics of the latents")
    return state["normalizer.mean"], state["normalizer.std"]
