"""Published SiT models over 1D latents: their config, the names of their tensors, reading and writing.

Unlike the tokenizer's, this config gives all sizes, and every tensor of the file is used.
"""

from pathlib import Path
from typing import Any

from maetok.hub import load_strictly, locate, read_config, read_tensors, write_folder
from maetok.networks.sit import SiT
from maetok.networks.vit import TransformerSize

REQUIRED_KEYS = (
    "hidden_size",
    "depth",
    "num_heads",
    "mlp_ratio",
    "in_channels",
    "input_size",
    "num_classes",
    "qk_norm",
)
"""What a config must say for us to know the model."""

SUPPORTED = {"vae_1d": True, "patch_size": 1, "path_type": "linear"}
"""What it may not say otherwise: tokens in one dimension, one per patch, and the velocity of the linear path."""

RENAMES = (
    ("input.", "x_embedder."),
    ("position_table", "pos_embed"),
    ("time_embedder.", "t_embedder."),
    ("label_embedder.", "y_embedder.embedding_table."),
    (".qkv.query_norm.", ".q_norm."),
    (".qkv.key_norm.", ".k_norm."),
    (".modulation.", ".adaLN_modulation.1."),
)
"""Our part of a name, and the published one."""


def to_published_name(ours: str) -> str:
    """The published parameter name for one of ours."""
    for name, published in RENAMES:
        ours = ours.replace(name, published)
    return ours


def sit_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of :class:`SiT` that give the model of a published config.

    Raises:
        ValueError: if the config asks for something outside this family of models, naming the key and the value.
    """
    for key, value in SUPPORTED.items():
        if config.get(key, value) != value:
            raise ValueError(f"{key}={config[key]!r} is not supported in a published SiT, only {value!r}")
    return {
        "latent_tokens": config["input_size"],
        "latent_channels": config["in_channels"],
        "num_classes": config["num_classes"],
        "size": TransformerSize(config["hidden_size"], config["depth"], config["num_heads"], config["mlp_ratio"]),
        "qk_norm": config["qk_norm"],
    }


def published_config(sit: SiT) -> dict[str, Any]:
    """The flat published config of a SiT that was not loaded from one."""
    return SUPPORTED | {
        "hidden_size": sit.size.width,
        "decoder_hidden_size": sit.size.width,
        "depth": sit.size.depth,
        "num_heads": sit.size.num_heads,
        "mlp_ratio": sit.size.mlp_ratio,
        "in_channels": sit.latent_channels,
        "input_size": sit.latent_tokens,
        "num_classes": sit.num_classes,
        "qk_norm": sit.qk_norm,
        "class_dropout_prob": 0.1,  # more than 0: the label table has a row for the null label
        "flash_attn": False,
        "use_cfg": True,
    }


def load_sit(path_or_repo: str | Path) -> SiT:
    """Build a published SiT and load its weights strictly.

    With ``qk_norm`` the released code skips that normalisation in half precision with ``flash_attn``; ours never does.

    Args:
        path_or_repo: local folder or hub id.

    Returns:
        The SiT in evaluation mode, float32, on CPU.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for a truncated file, another kind of model, missing, unknown or misshapen tensors.
    """
    folder = locate(path_or_repo)
    config = read_config(folder / "config.json", REQUIRED_KEYS, "SiT")
    sit = SiT(**sit_arguments(config))
    remedy = "The two files are of different models."
    load_strictly(sit, read_tensors(folder / "model.safetensors"), to_published_name, str(folder), remedy)
    sit.published_config = config
    return sit.eval()


def save_sit(sit: SiT, folder: str | Path) -> None:
    """Write a SiT in the published format; one that was loaded from it comes out bit for bit.

    Args:
        sit: the model.
        folder: where config.json and model.safetensors are written; made if it does not exist.
    """
    tensors = {to_published_name(name): tensor for name, tensor in sit.state_dict().items()}
    write_folder(folder, tensors, sit.published_config or published_config(sit))
