"""Published SiT models over 1D latents: their config, the names of their tensors, reading and writing.

Unlike the tokenizer's, this config gives all sizes, and every tensor of the file is used.
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


def published_config(sit: Any) -> dict[str, Any]:
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
        "class_dropout_prob": 0.1 if sit.num_classes else 0.0,  # above 0, the label table has a row for the null label
        "flash_attn": False,
        "use_cfg": True,
    }
