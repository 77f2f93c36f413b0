"""The format of published SiT models over 1D latents: the config and the names of the tensors.

Unlike the tokenizer's config, this one gives all sizes, and every tensor of the file is used.
"""

from typing import Any

from maetok.networks.layers.vit import TransformerSize

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
"""Keys that a config must have."""

SUPPORTED = {"vae_1d": True, "patch_size": 1, "path_type": "linear"}
"""The only supported values: tokens in one dimension, one token per patch, and the velocity of the linear path."""

RENAMES = (
    ("input.", "x_embedder."),
    ("position_table", "pos_embed"),
    ("time_embedder.", "t_embedder."),
    ("label_embedder.", "y_embedder.embedding_table."),
    (".qkv.query_norm.", ".q_norm."),
    (".qkv.key_norm.", ".k_norm."),
    (".modulation.", ".adaLN_modulation.1."),
)
"""Pairs of a part of our name and the published part."""


def to_published_name(ours: str) -> str:
    """Return the published name of our parameter."""
    for name, published in RENAMES:
        ours = ours.replace(name, published)
    return ours


def sit_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of :class:`SiT` for the model of a published config.

    Raises:
        ValueError: if the config describes a model outside this family; it names the key and the value.
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


def published_config(sit: Any) -> dict[str, Any]:
    """Return the flat published config of a SiT that was not loaded from a published folder."""
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
        "class_dropout_prob": 0.1 if sit.num_classes else 0.0,  # above 0, the label table has a row for the null label
        "flash_attn": False,
        "use_cfg": True,
    }
