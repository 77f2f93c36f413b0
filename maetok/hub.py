"""Published models: folders of config.json and model.safetensors, read strictly and written back bit for bit.

The tokenizer is here, SiT in :mod:`maetok.published_sit`. What the published forward pass of a tokenizer never uses is
on an explicit list (:mod:`maetok.published_format`); anything else that does not fit is an error.

``python -m maetok.hub export --ckpt runs/E/checkpoints/step=N.ckpt --output FOLDER`` makes such a folder of a run.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maetok.checkpoints import on_meta_device
from maetok.networks.bottlenecks import PlainBottleneck
from maetok.networks.tokenizer import Tokenizer
from maetok.published_format import (
    REQUIRED_KEYS,
    SIZE_OVERRIDES,
    UNUSED,
    published_config,
    to_our_name,
    to_published_name,
    tokenizer_arguments,
    unused_tensors,
)

PUBLISHED_FILES = ("config.json", "model.safetensors")
STATISTICS_FILE = "latent_statistics.safetensors"  # our addition to the folder of a denoiser


def locate(path_or_repo: str | Path) -> Path:
    """The local folder of a published model; a hub id such as ``owner/name`` is downloaded to the hub's cache.

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
    """All tensors of a safetensors file; raises ValueError for a truncated file or one of another kind."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); download it again") from error


def read_config(path: Path, required: Sequence[str], kind: str) -> dict[str, Any]:
    """The flat published config; raises ValueError if it is not JSON or lacks a required key of this kind of model."""
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


def latent_statistics(path_or_repo: str | Path) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of latents, as a denoiser needs them: normalized = (latents - mean) / std.

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
            "exported SiT, or for a released SiT that of its tokenizer"
        )
    mean, std = (torch.tensor(config[key], dtype=torch.float32) for key in ("vq_mean", "vq_std"))
    return mean, std


def load_tokenizer(path_or_repo: str | Path, **overrides: Any) -> Tokenizer:
    """Build a published tokenizer and load its weights strictly.

    Args:
        path_or_repo: local folder or hub id.
        **overrides: ``embed_dim``, ``depth``, ``num_heads`` (for encoder and decoder alike) where the backbone's name
            in config.json does not give the true size, or any key of config.json.

    Returns:
        The tokenizer in evaluation mode, float32, on CPU.

    Raises:
        FileNotFoundError: if a file is missing.
        TypeError: for an override that is neither a size nor a key of config.json.
        ValueError: for a truncated file, another kind of model, missing, unknown or misshapen tensors.
    """
    folder = locate(path_or_repo)
    config = read_config(folder / "config.json", REQUIRED_KEYS, "tokenizer")
    for key, value in overrides.items():
        if key in SIZE_OVERRIDES:
            config |= {f"encoder_{key}": value, f"decoder_{key}": value}
        elif key in config:
            config[key] = value
        else:
            raise TypeError(
                f"unknown override {key!r}: neither a size ({', '.join(SIZE_OVERRIDES)}) nor in config.json"
            )
    tokenizer = Tokenizer(**tokenizer_arguments(config))
    load_published_state(tokenizer, read_tensors(folder / "model.safetensors"), str(folder))
    tokenizer.published_config = config
    return tokenizer.eval()


def load_published_state(tokenizer: Tokenizer, published: dict[str, Tensor], source: str) -> None:
    """Copy published tensors into a tokenizer; all must be used or be on the list of unused ones."""
    own = tokenizer.state_dict()
    unused = {name for name in published if UNUSED.fullmatch(name)}
    if "decoder.position_table" not in own:
        unused.add("decoder.model.pos_embed")
    used = {name: tensor for name, tensor in published.items() if name not in unused}
    for name in (name for name in ("encoder.freqs", "decoder.freqs") if name in used and to_our_name(name) in own):
        if used[name].numel() == own[to_our_name(name)].numel():
            used[name] = used[name].reshape(own[to_our_name(name)].shape)
    remedy = "If only sizes differ, pass embed_dim=, depth=, num_heads=."
    load_strictly(tokenizer, used, to_published_name, source, remedy)
    tokenizer.published_unused = {name: published[name] for name in sorted(unused & published.keys())}


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write a tokenizer in the published format; one that was loaded from it comes out bit for bit.

    Parts that the published model always has and ours may lack are written with neutral values (a zero position
    table), so the written model computes the same.

    Raises:
        ValueError: if the bottleneck is not plain, the image is not square, or only one of encoder and decoder has
            rotary embeddings: the format has no place for these.
    """
    if not isinstance(tokenizer.bottleneck, PlainBottleneck):
        raise ValueError(f"the published format holds plain autoencoders, not {type(tokenizer.bottleneck).__name__}")
    if (tokenizer.encoder.rope is None) != (tokenizer.decoder.rope is None):
        raise ValueError("the published format holds rotary embeddings in both encoder and decoder, or in neither")
    if tokenizer.image_size[0] != tokenizer.image_size[1]:
        raise ValueError(f"the published format holds square image sizes, not {tokenizer.image_size}")
    tensors = {to_published_name(name): tensor for name, tensor in tokenizer.state_dict().items()}
    for name in ("encoder.freqs", "decoder.freqs"):
        if name in tensors:
            tensors[name] = tensors[name].flatten(2)
    tensors |= tokenizer.published_unused or unused_tensors(tokenizer)
    write_folder(folder, tensors, tokenizer.published_config or published_config(tokenizer))


def main(args: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m maetok.hub", description="Published models.")
    command = parser.add_subparsers(dest="command", required=True).add_parser(
        "export", help="make a published folder of a run: its tokenizer, or its SiT and the statistics of the latents"
    )
    command.add_argument("--ckpt", required=True, type=Path, help="checkpoint, or run directory for its newest one")
    command.add_argument("--output", required=True, type=Path, help="folder for the model")
    command.add_argument("--config", type=Path, help="config of the run (default: config.yaml of the run directory)")
    command.add_argument(
        "--weights", choices=("ema", "raw"), default="ema", help="moving average (default) or the weights as trained"
    )
    given = parser.parse_args(args)
    from maetok.export import export  # it builds on this file

    network = export(given.ckpt, given.output, given.config, given.weights)
    print(f"wrote {type(network).__name__} ({given.weights} weights) to {given.output}")


if __name__ == "__main__":
    main()
