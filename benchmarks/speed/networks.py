"""Cases of the networks: the suite beside the plain version (:mod:`benchmarks.speed.reference`), same weights."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.harness import Numbers
from benchmarks.speed import reference
from benchmarks.speed.variants import REFERENCE, SUITE, Precision, autocast, measure, settings_of
from maetok import SiT, Tokenizer
from maetok.flow import Euler, sample
from maetok.networks import MaskedAutoencoder, MaskRatio, random_mask
from maetok.networks.denoiser.transformer import SIZES
from maetok.networks.inference import prepare_for_inference
from maetok.training.ema import EMA

Call = Callable[[], object]
Network = TypeVar("Network", bound=nn.Module)
ARRANGEMENTS = {128: (128, 32), 1024: (1024, 16)}
"""Latent tokens and channels of MAETok, and of a VAE with stride 8 at 512 px under patches of 2 x 2."""
SCALE, INTERVAL = 1.5, (0.0, 1.0)


class Training:
    """A network with optimizer and moving average, which steps as tasks do, or plainly.

    Without ``updates`` a step is a forward and a backward pass only.
    """

    def __init__(self, network: nn.Module, updates: bool = True) -> None:
        self.network, self.updates = network, updates
        if updates:
            trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
            self.ema, self.optimizer = EMA(network, 0.9999), torch.optim.AdamW(trained, 1e-4, fused=True)

    def reference_step(self, loss: Callable[[], Tensor], precision: Precision) -> None:
        """Run forward, backward and the update, parameter by parameter."""
        self.differentiate(loss, precision)
        if self.updates:
            self.optimizer.param_groups[0].update(fused=False, foreach=False)
            reference.update(self.network, self.optimizer, self.ema.network, 0.9999)
        self.network.zero_grad(set_to_none=True)

    def suite_step(self, loss: Callable[[], Tensor], precision: Precision) -> None:
        """Run forward, backward and the update of :class:`lightning_modules.base.Task`."""
        self.differentiate(loss, precision)
        if self.updates:
            nn.utils.clip_grad_norm_(self.network.parameters(), 1.0, foreach=True)
            self.optimizer.param_groups[0].update(fused=True, foreach=None)
            self.optimizer.step()
            self.ema.update(self.network, 10**6)
        self.network.zero_grad(set_to_none=True)

    def differentiate(self, loss: Callable[[], Tensor], precision: Precision) -> None:
        """Run a forward and a backward pass."""
        with autocast(precision):
            value = loss()
        value.backward()


def prepare(network: Network, precision: Precision) -> Network:
    """Prepare the network as tasks do before they predict."""
    with settings_of(SUITE):
        prepare_for_inference(network, bfloat16=precision == "bfloat16")
    return network


def base_tokenizer(side: int, modulated: bool = True) -> Tokenizer:
    """Build MAETok-B/16 with 128 latent tokens as published, with modulated decoder blocks."""
    return Tokenizer(side, latent_modulation=modulated)


def tokenizer_inference(part: Literal["encode", "decode"], precision: Precision, images: int, rounds: int) -> Numbers:
    """Encode or decode at 256 px, without gradients."""
    tokenizer = base_tokenizer(256).eval()
    inputs = torch.rand(images, 3, 256, 256) * 2 - 1 if part == "encode" else torch.randn(images, 128, 32)
    prepared = prepare(copy.deepcopy(tokenizer), precision)

    def run(call: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad(), autocast(precision):
            return call(inputs)

    plain = reference.encode if part == "encode" else reference.decode
    variants: dict[str, Call] = {
        REFERENCE: lambda: run(lambda x: plain(tokenizer, x)),
        SUITE: lambda: run(getattr(prepared, part)),
    }
    return measure(variants, precision, images, rounds)


def tokenizer_step(precision: Precision, images: int, rounds: int, side: int = 256, compiled: bool = True) -> Numbers:
    """Train on pixels with masks of 40 to 60 %. Everything else in stage 1 is the same in both variants."""
    model = MaskedAutoencoder(base_tokenizer(side), {})
    inputs, training = torch.rand(images, 3, side, side) * 2 - 1, Training(model)
    mask = random_mask(MaskRatio()(torch.rand(images)), torch.rand(images, (side // 16) ** 2))

    def plain_loss() -> Tensor:
        return (reference.autoencode(model, inputs, mask).float() - inputs).square().mean()

    def own_loss(network: MaskedAutoencoder = model) -> Tensor:
        return (network(inputs, mask).reconstructions.float() - inputs).square().mean()

    variants: dict[str, Call] = {
        REFERENCE: lambda: training.reference_step(plain_loss, precision),
        SUITE: lambda: training.suite_step(own_loss, precision),
    }
    if compiled:
        other = copy.deepcopy(model)
        other.compile_blocks()
        other_training = Training(other)
        variants["suite, compiled"] = lambda: other_training.suite_step(lambda: own_loss(other), precision)
    return measure(variants, precision, images, rounds)


def mask_modes(images: int, rounds: int, side: int) -> Numbers:
    """Train in float32 with half of the patches masked: replaced by a token, or dropped."""
    mask = random_mask(torch.full((images,), 0.5), torch.rand(images, (side // 16) ** 2))
    inputs = torch.rand(images, 3, side, side) * 2 - 1
    variants: dict[str, Call] = {}
    for mode in ("replace", "drop"):
        model = MaskedAutoencoder(Tokenizer(side, latent_modulation=True, mask_mode=mode), {})
        variants[f"suite, {mode}"] = partial(masked_step, Training(model), inputs, mask)
    return measure(variants, "float32", images, rounds, baseline="suite, replace")


def masked_step(training: Training, images: Tensor, mask: Tensor) -> None:
    """Run a training step on pixels."""
    training.suite_step(lambda: (training.network(images, mask).reconstructions - images).square().mean(), "float32")


def sit(size: str, tokens: int) -> SiT:
    """Build SiT of a size with open gates, so that no gradient vanishes."""
    latent_tokens, channels = ARRANGEMENTS[tokens]
    model = SiT(latent_tokens, channels, size=SIZES[size])
    for name, parameter in model.named_parameters():
        if ".modulation." in name or name.startswith("final_layer.linear."):
            nn.init.normal_(parameter, std=0.02)
    return model


def sit_inputs(model: SiT, images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return noisy latents, times and labels."""
    x = torch.randn(images, model.latent_tokens, model.latent_channels)
    return x, torch.rand(images), torch.arange(images) % model.num_classes


def sit_forward(size: str, tokens: int, precision: Precision, images: int, rounds: int) -> Numbers:
    """Predict a velocity, without gradients."""
    model = sit(size, tokens).eval()
    inputs, prepared = sit_inputs(model, images), prepare(copy.deepcopy(model), precision)

    def run(call: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad(), autocast(precision):
            return call(*inputs)

    variants: dict[str, Call] = {
        REFERENCE: lambda: run(lambda *given: reference.velocity(model, *given)),
        SUITE: lambda: run(prepared),
    }
    return measure(variants, precision, images, rounds)


def sit_step(size: str, tokens: int, precision: Precision, images: int, rounds: int) -> Numbers:
    """Train on velocities; XL skips the update, because its optimizer state alone has 5.4 GB."""
    model = sit(size, tokens)
    compiled = copy.deepcopy(model)
    compiled.compile_blocks()
    training, other = (Training(it, updates=size != "XL") for it in (model, compiled))
    inputs, target = sit_inputs(model, images), torch.randn(images, *ARRANGEMENTS[tokens])

    def loss(velocity: Callable[..., Tensor]) -> Tensor:
        return (velocity(*inputs).float() - target).square().mean()

    variants: dict[str, Call] = {
        REFERENCE: lambda: training.reference_step(lambda: loss(partial(reference.velocity, model)), precision),
        SUITE: lambda: training.suite_step(lambda: loss(model), precision),
        "suite, compiled": lambda: other.suite_step(lambda: loss(compiled), precision),
    }
    return measure(variants, precision, images, rounds)


def guided_sampling(size: str, precision: Precision, images: int, rounds: int, steps: int = 4) -> Numbers:
    """Sample with Euler steps, all of them guided; a further variant has no guidance."""
    model = sit(size, 128).eval()
    prepared = prepare(copy.deepcopy(model), precision)
    labels, noise = torch.arange(images), torch.randn(images, *ARRANGEMENTS[128])

    def plain() -> None:
        with autocast(precision):
            reference.sample(model, labels, noise, steps, SCALE, INTERVAL)

    def own(scale: float) -> None:
        with autocast(precision):
            sample(prepared, labels, noise, Euler(steps), guidance_scale=scale, guidance_interval=INTERVAL)

    variants: dict[str, Call] = {
        REFERENCE: plain,
        SUITE: lambda: own(SCALE),
        "suite, without guidance": lambda: own(1.0),
    }
    return measure(variants, precision, images, rounds)
