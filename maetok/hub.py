"""Published tokenizers: folders of config.json and model.safetensors, read strictly and written back bit for bit.

What the published forward pass never uses is on an explicit list (:mod:`maetok.published_format`); anything else that
does not fit is an error.
"""

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

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
            folder = Path(snapshot_download(str(path_or_repo), allow_patterns=["config.json", "model.safetensors"]))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            message = f"{path_or_repo}: no such local folder, and the hub gave no such repository ({error})"
            raise FileNotFoundError(message) from error
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} lacks {name}: a published model is config.json and model.safetensors")
    return folder


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file; raises ValueError for a truncated file or one of another kind."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}); download it again") from error


def read_config(path: Path) -> dict[str, Any]:
    """The flat published config; raises ValueError if it is not JSON or not a tokenizer's."""
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    missing = [key for key in REQUIRED_KEYS if key not in config]
    if missing:
        raise ValueError(f"{path} is not the config of a published tokenizer: it lacks {', '.join(missing)}")
    return config


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
    config = read_config(folder / "config.json")
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
    given = {to_our_name(name): tensor for name, tensor in published.items() if name not in unused}
    for name in [name for name in given if name.endswith("rope.frequencies") and name in own]:
        if given[name].numel() == own[name].numel():
            given[name] = given[name].reshape(own[name].shape)
    problems = [f"missing {to_published_name(name)}" for name in own if name not in given]
    problems += [f"unknown {to_published_name(name)}" for name in given if name not in own]
    problems += [
        f"{to_published_name(name)} has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
        for name, tensor in given.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        remedy = "If only sizes differ, pass embed_dim=, depth=, num_heads=."
        raise ValueError(f"{source}: model.safetensors does not fit its config.json: {shown}. {remedy}")
    tokenizer.load_state_dict(given)
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
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {to_published_name(name): tensor for name, tensor in tokenizer.state_dict().items()}
    for name in ("encoder.freqs", "decoder.freqs"):
        if name in tensors:
            tensors[name] = tensors[name].flatten(2)
    tensors |= tokenizer.published_unused or unused_tensors(tokenizer)
    config = tokenizer.published_config or published_config(tokenizer)
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
