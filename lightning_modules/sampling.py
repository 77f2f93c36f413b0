"""Settings of sampling, and the weights that samples come from."""

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
    """Settings of sampling.

    Args:
        solver: integrates from noise to data; Euler with 250 steps if not given.
        guidance_scale: at least 1; 1 disables guidance.
        guidance_interval: (low, high), the times at which guidance is active; t = 0 is data.
        seed: seed and index of a sample decide its noise.
    """

    solver: Solver | None = None
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    seed: int = 0

    @property
    def solver_or_default(self) -> Solver:
        """Return the solver, or Euler if none is given."""
        return self.solver if self.solver is not None else Euler()

    def identity(self) -> dict[str, Any]:
        """Return the settings as values that JSON can hold."""
        numbers = {name: value for name, value in vars(self.solver_or_default).items() if np.isscalar(value)}
        return {
            "solver": {"name": type(self.solver_or_default).__name__, **numbers},
            "guidance_scale": self.guidance_scale,
            "guidance_interval": list(self.guidance_interval),
            "seed": self.seed,
        }


@dataclass(frozen=True)
class DenoiserFrom(InitFrom):
    """Weights of a denoiser from a run of ``LatentDiffusion``, by default of its first moving average."""

    KEY: ClassVar[str] = "denoiser_from"

    prefix: str = "emas.0.network."

    def located(self) -> Self:
        """Return a copy whose path is the checkpoint file itself, so that later checkpoints of the run do not count."""
        return replace(self, path=str(self.locate()))

    def loaded_copy(self, denoiser: Denoiser) -> Denoiser:
        """Return a denoiser of the same architecture with these weights."""
        other = copy.deepcopy(denoiser)
        if on_meta_device(other):  # sharding will fill the denoiser, but not this copy
            other.to_empty(device="cpu")
        self.load(other)
        return other


def guiding_network(
    denoiser: Denoiser, guide: Denoiser | None, guide_from: DenoiserFrom | None
) -> UnregisteredModule | None:
    """Return the guide of autoguidance: ``guide``, or a copy of ``denoiser``, with its weights; None without guide.

    Raises:
        FileNotFoundError: if the checkpoint does not exist.
        ValueError: if weights are missing, or the guide has other latents or classes.
    """
    if guide is None and guide_from is None:
        return None
    network = denoiser if guide is None else guide
    sizes = [(net.latent_tokens, net.latent_channels, net.num_classes) for net in (denoiser, network)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"model.init_args.guide has (latent_tokens, latent_channels, num_classes) = {sizes[1]}, but the denoiser "
            f"{sizes[0]}: give a guide that was trained on the same data"
        )
    if guide_from is None and not getattr(network, "published_config", None):
        raise ValueError("model.init_args.guide has no trained weights: set model.init_args.guide_from")
    return UnregisteredModule(network if guide_from is None else guide_from.loaded_copy(network))


def check_guidance(denoiser: Denoiser, scale: float, guided: bool) -> None:
    """Raise ValueError for guidance without a null condition or a guide."""
    if scale != 1.0 and not guided and not denoiser.has_null_condition:
        raise ValueError(
            f"model.init_args.sampling.guidance_scale={scale}, but the denoiser has no null condition (num_classes: "
            "null): set guidance_scale to 1, or guide_from for autoguidance"
        )


def check_sizes(tokenizer: LatentTokenizer, denoiser: Denoiser) -> None:
    """Raise ValueError unless denoiser and tokenizer agree on the size of latents."""
    own = denoiser.latent_tokens, denoiser.latent_channels
    theirs = tokenizer.latent_tokens, tokenizer.latent_channels
    if own != theirs:
        raise ValueError(
            f"model.init_args.denoiser has (latent_tokens, latent_channels) = {own}, but the tokenizer {theirs}: set "
            "both to one size"
        )


def check_published(denoiser: Denoiser, statistics_from: str | None) -> None:
    """Warn of a denoiser without trained weights; raise ValueError for a published one without statistics."""
    if not getattr(denoiser, "published_config", None):
        rank_zero_warn("sampling from a denoiser without trained weights: set model.init_args.denoiser_from")
    elif statistics_from is None:
        raise ValueError(
            "model.init_args.statistics_from is missing: the weights of a published denoiser contain no statistics of "
            "its latents; give the folder of the exported SiT, or for a released SiT the folder of its tokenizer"
        )
