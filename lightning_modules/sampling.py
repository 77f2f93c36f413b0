"""Settings of sampling: how images are made, and by which weights."""

import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from maetok.checkpoints.runs import InitFrom
from maetok.flow import Euler, Solver
from maetok.networks import Denoiser, LatentTokenizer
from maetok.runtime.pretrained import UnregisteredModule
from maetok.runtime.weights import on_meta_device


@dataclass(frozen=True)
class Sampling:
    """How images are made.

    Args:
        solver: integrates from noise to data; Euler with 250 steps if not given.
        guidance_scale: 1 for no guidance.
        guidance_interval: (low, high) in which guidance is active; t = 0 is data.
        seed: with the index of a sample it decides its noise.
    """

    solver: Solver | None = None
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    @property
    def solver_or_default(self) -> Solver:
        """The solver, which is Euler if none is given."""
        return self.solver if self.solver is not None else Euler()

    def identity(self) -> dict[str, Any]:
        """The settings as JSON can hold them."""
        numbers = {name: value for name, value in vars(self.solver_or_default).items() if np.isscalar(value)}
        return {
            "solver": {"name": type(self.solver_or_default).__name__, **numbers},
            "guidance_scale": self.guidance_scale,
            "guidance_interval": list(self.guidance_interval),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class DenoiserFrom(InitFrom):
    """Weights of a denoiser from a run of ``LatentDiffusion``; those of its first moving average by default."""

    KEY: ClassVar[str] = "denoiser_from"

    prefix: str = "emas.0.network."

    def located(self) -> Self:
        """The same with the checkpoint file itself as path, whatever the run writes from now on."""
        return replace(self, path=str(self.locate()))

    def loaded_copy(self, denoiser: Denoiser) -> Denoiser:
        """A denoiser of the same architecture with these weights."""
        other = copy.deepcopy(denoiser)
        if on_meta_device(other):  # the denoiser will be sharded, but not this one
            other.to_empty(device="cpu")
        self.load(other)
        return other


def guiding_network(
    denoiser: Denoiser, guide: Denoiser | None, guide_from: DenoiserFrom | None
) -> UnregisteredModule | None:
    """The denoiser of autoguidance, like ``denoiser`` or given; None if there is none.

    Raises:
        FileNotFoundError: if there is no such checkpoint.
        ValueError: if weights are missing, or it is one of other latents or classes.
    """
    if guide is None and guide_from is None:
        return None
    network = denoiser if guide is None else guide
    sizes = [(net.latent_tokens, net.latent_channels, net.num_classes) for net in (denoiser, network)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"model.init_args.guide has (latent_tokens, latent_channels, num_classes) = {sizes[1]}, but the denoiser "
            f"{sizes[0]}: a guide is of the same data"
        )
    if guide_from is None and not getattr(network, "published_config", None):
        raise ValueError("model.init_args.guide was not trained: set model.init_args.guide_from")
    return UnregisteredModule(network if guide_from is None else guide_from.loaded_copy(network))


def check_guidance(denoiser: Denoiser, scale: float, guided: bool) -> None:
    """Raise ValueError for guidance without a null condition or a guide."""
    if scale != 1.0 and not guided and not denoiser.has_null_condition:
        raise ValueError(
            f"model.init_args.sampling.guidance_scale={scale}, but the denoiser has no null condition (num_classes: "
            "null): set guidance_scale to 1, or guide_from for autoguidance"
        )


def check_sizes(tokenizer: LatentTokenizer, denoiser: Denoiser) -> None:
    """Raise ValueError unless the denoiser's latents are those of the tokenizer."""
    own = denoiser.latent_tokens, denoiser.latent_channels
    theirs = tokenizer.latent_tokens, tokenizer.latent_channels
    if own != theirs:
        raise ValueError(
            f"model.init_args.denoiser has (latent_tokens, latent_channels) = {own}, but the tokenizer {theirs}: set "
            "both to one size"
        )


def check_published(denoiser: Denoiser, statistics_from: str | None) -> None:
    """Warn of a denoiser without weights to sample from; raise ValueError for a published one without statistics."""
    if not getattr(denoiser, "published_config", None):
        rank_zero_warn("sampling from a denoiser that was not trained: set model.init_args.denoiser_from")
    elif statistics_from is None:
        raise ValueError(
            "model.init_args.statistics_from is missing: the weights of a published denoiser bring no statistics of "
            "its latents; give the folder of the exported SiT, for a released one that of its tokenizer"
        )
