"""Published models: folders of config.json and model.safetensors, read strictly and written back bit for bit.

Each published format lies beside the network that it converts: :mod:`maetok.networks.tokenizer.published` and
:mod:`maetok.networks.denoiser.published_sit`.

``python -m maetok.hub export --ckpt runs/E/checkpoints/step=N.ckpt --output FOLDER`` makes such a folder of a run.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maetok.runtime.weights import on_meta_device

PUBLISHED_FILES = ("config.json", "model.safetensors")
STATISTICS_FILE = "latent_statistics.safetensors"  # our addition to the folder of a denoiser


def locate(path_or_repo: str | Path) -> Path:
    """Return the local folder of a published model; a hub id such as ``owner/name`` is downloaded to the hub's cache.

    Raises:
        FileNotFoundError: if there is neither such a folder nor such a repository, or a file is missing in it.
    """
    folder = Path(path_or_repo)
    if not folder.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path_or_repo)):
            raise FileNotFoundError(f"{path_or_repo}: no such folder, and not a hub id of the form owner/name")
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            folder = Path(snapshot_download(str(path_or_repo), allow_patterns=[*PUBLISHED_FILES, STATISTICS_FILE]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            message = f"{path_or_repo}: no such local folder, and the hub gave no such repository ({error})"
            raise FileNotFoundError(message) from error
    for name in PUBLISHED_FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}: a published model is config.json and model.safetensors")
    return folder


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file; raise ValueError for a truncated file or another kind of file."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); download it again") from error


def read_config(path: Path, required: Sequence[str], kind: str) -> dict[str, Any]:
    """Return the flat published config; raise ValueError if it is not JSON or lacks a key of this kind of model."""
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    missing = [key for key in required if key not in config]
    if missing:
        raise ValueError(f"{path} is not the config of a published {kind}: it lacks {', '.join(missing)}")
    return config


def load_strictly(
    module: nn.Module, published: dict[str, Tensor], published_name: Callable[[str], str], source: str, remedy: str
) -> None:
    """Copy published tensors into a module that wants exactly these; on the meta device they are only compared with it.

    Args:
        module: where to.
        published: the tensors by their published names.
        published_name: the published name for one of the module's.
        source: where the tensors are from, for the message.
        remedy: what to do if they do not fit, for the message.

    Raises:
        ValueError: if tensors are missing, unknown or of another shape, naming the first five.
    """
    state = module.state_dict()
    own = {published_name(name): name for name in state}
    problems = [f"missing {name}" for name in own if name not in published]
    problems += [f"unknown {name}" for name in published if name not in own]
    problems += [
        f"{name} has shape {tuple(tensor.shape)}, expected {tuple(state[own[name]].shape)}"
        for name, tensor in published.items()
        if name in own and tensor.shape != state[own[name]].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(f"{source}: model.safetensors does not fit its config.json: {shown}. {remedy}")
    if not on_meta_device(module):
        module.load_state_dict({own[name]: tensor for name, tensor in published.items()})


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that everybody may read: the library lets only its owner, but people share models."""
    save_file(tensors, path)
    path.chmod(0o644)


def write_folder(folder: str | Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write config.json and model.safetensors; the folder is made if it does not exist."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(copies, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def write_statistics(folder: str | Path, mean: Tensor, std: Tensor) -> None:
    """Write mean and standard deviation (C,) of the latents that the denoiser in this folder was trained on."""
    tensors = {"mean": mean.detach().cpu().contiguous(), "std": std.detach().cpu().contiguous()}
    write_tensors(tensors, Path(folder) / STATISTICS_FILE)


def published_latent_moments(path_or_repo: str | Path) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of latents for a denoiser: normalized = (latents - mean) / std.

    Args:
        path_or_repo: local folder or hub id of an exported denoiser, with ``latent_statistics.safetensors``, or of a
            released tokenizer, whose config.json gives ``vq_mean`` and ``vq_std``.

    Returns:
        float32 on the CPU, (C,), or () where a released tokenizer has one number for all channels.

    Raises:
        FileNotFoundError: if there is no such model.
        ValueError: if it brings no statistics.
    """
    folder = locate(path_or_repo)
    if (folder / STATISTICS_FILE).is_file():
        tensors = read_tensors(folder / STATISTICS_FILE)
        return tensors["mean"], tensors["std"]
    config = read_config(folder / "config.json", (), "model")
    if not {"vq_mean", "vq_std"} <= config.keys():
        raise ValueError(
            f"{folder} has neither {STATISTICS_FILE} nor vq_mean and vq_std in config.json: give the folder of an "
            "exported SiT, or for a released SiT the folder of its tokenizer"
        )
    mean, std = (torch.tensor(config[key], dtype=torch.float32) for key in ("vq_mean", "vq_std"))
    return mean, std
