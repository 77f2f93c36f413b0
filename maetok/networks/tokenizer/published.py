"""The published tokenizer format: names of tensors, flat config, and their meaning for the classes here.

The released MAETok / SoftVQ weights have this format. In their config the backbone's *name* stands for its size, and
some of their tensors are never used by the published forward pass.
"""

import re
from typing import Any

import torch
from torch import Tensor

from maetok.networks.folder import load_strictly
from maetok.networks.layers.vit import TransformerSize
from maetok.networks.tokenizer.bottlenecks import PlainBottleneck

BACKBONES = {
    "tiny": TransformerSize(192, 12, 3),
    "small": TransformerSize(384, 12, 6),
    "base": TransformerSize(768, 12, 12),
    "large": TransformerSize(1024, 24, 16),
}
"""Sizes that a published backbone name such as ``vit_base_patch14_dinov2.lvd142m`` stands for."""

REQUIRED_KEYS = (
    "encoder_model",
    "decoder_model",
    "num_latent_tokens",
    "codebook_embed_dim",
    "image_size",
    "enc_patch_size",
    "dec_patch_size",
    "enc_token_drop",
    "dec_cls_token",
    "use_ape",
    "use_rope",
    "rope_mixed",
    "rope_theta",
)
"""Keys that a config needs to determine the model."""

SIZE_OVERRIDES = {"embed_dim": "width", "depth": "depth", "num_heads": "num_heads"}

UNUSED = re.compile(
    r"(encoder|decoder)\.freqs_t_[xy]"  # plain coordinates, of the base grid where base_image_size differs
    r"|decoder\.model\.patch_embed\.proj\.(weight|bias)"  # never called
    r"|decoder\.model\.norm\.adaLN_modulation\.1\.(weight|bias)"  # acts on tokens that are cut off later
)
"""Published tensors that have no effect. ``decoder.model.pos_embed`` joins them when the decoder is rotary only."""

RENAMES = [
    (r"^encoder\.latent_pos_embed$", "encoder.latent_positions"),
    (r"^encoder\.freqs$", "encoder.rope.frequencies"),
    (r"^encoder\.model\.cls_token$", "encoder.class_token"),
    (r"^encoder\.model\.reg_token$", "encoder.register_tokens"),
    (r"^encoder\.model\.pos_embed$", "encoder.position_table"),
    (r"^encoder\.model\.patch_embed\.proj\.", "encoder.patch_embedding."),
    (r"^quant_conv\.", "bottleneck.projection."),
    (r"^post_quant_conv\.", "decoder.latent_projection."),
    (r"^decoder\.latent_pos_embed$", "decoder.latent_positions"),
    (r"^decoder\.freqs$", "decoder.rope.frequencies"),
    (r"^decoder\.model\.cls_token$", "decoder.class_token"),
    (r"^decoder\.model\.pos_embed$", "decoder.position_table"),
    (r"^decoder\.to_pixel\.model\.", "decoder.output."),
    (r"^(encoder|decoder)\.model\.(blocks\.\d+|norm)\.", r"\1.\2."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
]


def to_our_name(published: str) -> str:
    """Return the parameter name here for a published one."""
    for pattern, replacement in RENAMES:
        published = re.sub(pattern, replacement, published)
    return published


def to_published_name(ours: str) -> str:
    """Return the published parameter name for a name here."""
    ours = re.sub(r"\.modulation\.", ".adaLN_modulation.1.", ours)
    ours = re.sub(r"^(encoder|decoder)\.(blocks\.\d+|norm)\.", r"\1.model.\2.", ours)
    for pattern, replacement in RENAMES[:-2]:
        name, published = replacement, pattern.strip("^$").replace("\\", "")
        if ours == name or (name.endswith(".") and ours.startswith(name)):
            return published + ours[len(name) :]
    return ours


def backbone_size(name: str) -> TransformerSize:
    """Return the size that a published backbone name stands for."""
    match = re.match(r"vit_([a-z]+)_", name)
    if not match or match[1] not in BACKBONES:
        raise ValueError(f"backbone {name!r} names no known size; known are {', '.join(BACKBONES)} (vit_<size>_...)")
    return BACKBONES[match[1]]


def tokenizer_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of :class:`Tokenizer` for the model of a published config.

    Raises:
        ValueError: if the config asks for something outside this family of models, naming the key and the value.
    """
    supported = {"enc_type": ("vit",), "dec_type": ("vit",), "to_pixel": ("linear",), "repa": (False,)}
    for key, values in supported.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"{key}={config[key]!r} is not supported in a published tokenizer, only {values[0]!r}")
    if config["enc_patch_size"] != config["dec_patch_size"]:
        raise ValueError(
            f"enc_patch_size={config['enc_patch_size']} and dec_patch_size={config['dec_patch_size']} differ"
        )
    rope, absolute = config["use_rope"], config["use_ape"]
    if (rope and not config["rope_mixed"]) or not (rope or absolute):
        raise ValueError(
            f"use_rope={rope}, rope_mixed={config['rope_mixed']}, use_ape={absolute}: no such published model"
        )
    sizes = {
        part: TransformerSize(
            **{
                field: config.get(f"{part}_{key}", getattr(backbone_size(config[f"{part}_model"]), field))
                for key, field in SIZE_OVERRIDES.items()
            }
        )
        for part in ("encoder", "decoder")
    }
    return {
        "image_size": config["image_size"],
        "patch_size": config["enc_patch_size"],
        "latent_tokens": config["num_latent_tokens"],
        "bottleneck": lambda width: PlainBottleneck(width, config["codebook_embed_dim"]),
        **sizes,
        "encoder_positions": "both" if rope else "absolute",  # the published encoder always adds its table
        "decoder_positions": ("both" if rope else "absolute") if absolute else "rotary",
        "rope_theta": config["rope_theta"],
        "register_tokens": 4 if "_reg4_" in config["encoder_model"] else 0,
        "decoder_class_token": config["dec_cls_token"],
        "layer_scale": 1e-5,
        "latent_modulation": "movqv2" in config["decoder_model"],
        "mask_mode": "replace" if config["enc_token_drop"] > 0 else "drop",  # drop needs no mask token
    }


def published_config(tokenizer: Any) -> dict[str, Any]:
    """Return the flat published config of a tokenizer that was not loaded from one."""
    parts = {"encoder": tokenizer.encoder_size, "decoder": tokenizer.decoder_size}
    names = {
        part: next((name for name, known in BACKBONES.items() if known == size), "base") for part, size in parts.items()
    }
    if any(size.mlp_ratio != 4.0 for size in parts.values()):
        raise ValueError("the published format holds models with mlp_ratio=4 only")
    registers = tokenizer.encoder.register_tokens
    if registers is not None and registers.shape[1] != 4:
        raise ValueError(f"the published format holds 0 or 4 register tokens, not {registers.shape[1]}")
    modulated = not tokenizer.decoder.norm.elementwise_affine
    return {
        "image_size": tokenizer.image_size[0],
        "base_image_size": tokenizer.image_size[0],
        "enc_type": "vit",
        "dec_type": "vit",
        "encoder_model": f"vit_{names['encoder']}_patch14{'_reg4' if registers is not None else ''}_dinov2.lvd142m",
        "decoder_model": f"vit_{names['decoder']}_patch14_dinov2{'_movqv2' if modulated else '.lvd142m'}",
        "enc_patch_size": tokenizer.patch_size,
        "dec_patch_size": tokenizer.patch_size,
        "num_latent_tokens": tokenizer.latent_tokens,
        "codebook_embed_dim": tokenizer.latent_channels,
        "use_ape": tokenizer.decoder_positions != "rotary",
        "use_rope": tokenizer.decoder_positions != "absolute",
        "rope_mixed": tokenizer.decoder_positions != "absolute",
        "rope_theta": tokenizer.rope_theta,
        "dec_cls_token": tokenizer.decoder.class_token is not None,
        "enc_token_drop": 0.0 if tokenizer.encoder.mask_token is None else 0.4,
        "to_pixel": "linear",
        "repa": False,
    } | {
        f"{part}_{key}": getattr(size, field)
        for part, size in parts.items()
        for key, field in SIZE_OVERRIDES.items()
        if size not in BACKBONES.values()
    }


def unused_tensors(tokenizer: Any) -> dict[str, Tensor]:
    """Return neutral values for unused tensors that published folders hold, for a tokenizer trained here."""
    width, patch_size, patches = (
        tokenizer.decoder_size.width,
        tokenizer.patch_size,
        tokenizer.grid[0] * tokenizer.grid[1],
    )
    tensors = {
        "decoder.model.patch_embed.proj.weight": torch.zeros(width, 3, patch_size, patch_size),
        "decoder.model.patch_embed.proj.bias": torch.zeros(width),
    }
    if not tokenizer.decoder.norm.elementwise_affine:
        tensors["decoder.model.norm.adaLN_modulation.1.weight"] = torch.zeros(2 * width, tokenizer.latent_channels)
        tensors["decoder.model.norm.adaLN_modulation.1.bias"] = torch.zeros(2 * width)
    rows, columns = tokenizer.grid
    if tokenizer.decoder.rope is not None:
        x, y = torch.arange(columns).float().repeat(rows), torch.arange(rows).float().repeat_interleave(columns)
        for part in ("encoder", "decoder"):
            tensors |= {f"{part}.freqs_t_x": x.clone(), f"{part}.freqs_t_y": y.clone()}
    if tokenizer.decoder.position_table is None:
        slots = int(tokenizer.decoder.class_token is not None)
        tensors["decoder.model.pos_embed"] = torch.zeros(1, slots + patches, width)
    if tokenizer.encoder.position_table is None:
        slots = int(tokenizer.encoder.register_tokens is None)
        tensors["encoder.model.pos_embed"] = torch.zeros(1, slots + patches, tokenizer.encoder_size.width)
    return tensors


def load_published_state(tokenizer: Any, published: dict[str, Tensor], source: str) -> None:
    """Copy published tensors into a tokenizer; each must be used or known to be unused."""
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
