"""A denoiser whose blocks the package has never seen is sharded, compiled, packed, recomputed and planned by them."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lightning_modules import Sampling
from maetok.flow import Euler, index_noise
from maetok.networks.inference import PackedLinear, multiplied_by_onednn, prepare_for_inference
from maetok.training.sharding import shard
from tests.extensions.denoiser import MixerDenoiser, SummaryDenoiser
from tests.support.blocks import compiled_graphs, forward_calls
from tests.support.diffusion import diffusion, diffusion_cache, latent_shards, optimization, trainer
from tests.support.helpers import EXPERIMENTS, TINY
from tools.plan.__main__ import count, gathered_bytes, make_plan, read_config

DEPTH = 3
LINEAR_LAYERS = 4 * DEPTH  # scale, across tokens, two of the MLP


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(5, 3, 4), torch.rand(5), torch.arange(5)


@pytest.fixture
def one_process() -> Iterator[None]:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sharding_divides_its_blocks(dtype: torch.dtype | None) -> None:
    plain = MixerDenoiser()
    sharded, arguments, seen = copy.deepcopy(plain), inputs(), []
    shard(sharded, init_device_mesh("cpu", (1,)), torch.device("cpu"), dtype)
    units = {name for name, module in sharded.named_modules() if isinstance(module, FSDPModule)}
    assert units == {"", "time", "layers.0", "layers.1", "layers.2"}
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    assert not sharded.time.caching
    sharded.layers[1].scale.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    sharded.time.register_forward_pre_hook(lambda module, _: seen.append(module.frequencies.dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        losses = [network(*arguments).square().mean() for network in (plain, sharded)]
        assert torch.equal(*losses) or dtype is not None
    assert seen == [torch.float32, dtype or torch.float32]
    for loss in losses:
        loss.backward()
    for (name, ours), expected in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad.dtype == torch.float32
        tolerance = 0.0 if dtype is None else 0.1 * expected.grad.abs().max().item()
        torch.testing.assert_close(ours.grad.full_tensor(), expected.grad, atol=tolerance, rtol=0, msg=name)


@pytest.mark.usefixtures("one_process")
def test_blocks_outside_of_all_parts_are_refused_by_sharding() -> None:
    network, stranger = MixerDenoiser(), nn.Linear(1, 1)
    network.blocks = lambda: [*network.layers, stranger]
    with pytest.raises(ValueError, match=r"MixerDenoiser: blocks\(\) or float32_modules\(\) .* no part contains"):
        shard(network, init_device_mesh("cpu", (1,)), torch.device("cpu"))


def test_compiling_compiles_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    network, arguments = MixerDenoiser(), inputs()
    expected, names = network(*arguments), list(network.state_dict())
    graphs = compiled_graphs(monkeypatch)
    network.compile_blocks()
    torch.testing.assert_close(network(*arguments), expected)
    assert len(graphs) == 1  # all blocks share one
    assert all(block._compiled_call_impl for block in network.layers)
    assert list(network.state_dict()) == names


@torch.no_grad()
def test_packing_prepares_its_blocks() -> None:
    network, arguments = MixerDenoiser(), inputs()
    before = copy.deepcopy(network.state_dict())
    packs = multiplied_by_onednn(torch.zeros(4, 4, dtype=torch.bfloat16))
    exact = network(*arguments)
    undo = prepare_for_inference(network, bfloat16=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert (network(*arguments) - exact).abs().max() < 0.05 * exact.abs().max()
    packed = [module for module in network.layers.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == (LINEAR_LAYERS if packs else 0)
    weights = [module.weight for module in network.layers.modules() if isinstance(module, nn.Linear)]
    assert {weight.dtype for weight in (*weights, *(layer.packed_weight for layer in packed))} == {torch.bfloat16}
    assert network.input.weight.dtype == network.time.frequencies.dtype == torch.float32
    undo()
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


def test_activation_checkpointing_recomputes_its_blocks() -> None:
    plain = MixerDenoiser()
    saving, arguments = copy.deepcopy(plain), inputs()
    names = list(saving.state_dict())
    saving.set_activation_checkpointing(True)
    calls = forward_calls(saving)
    velocities = [network(*arguments) for network in (plain, saving)]
    assert torch.equal(*velocities)
    assert calls == [1] * DEPTH
    for velocity in velocities:
        velocity.square().mean().backward()
    assert calls == [2] * DEPTH
    for ours, expected in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, expected.grad)
    assert list(saving.state_dict()) == names
    with torch.no_grad():
        saving(*arguments)
    saving.set_activation_checkpointing(False)
    saving(*arguments).square().mean().backward()
    assert calls == [4] * DEPTH


def test_planning_counts_its_blocks() -> None:
    """Two blocks are gathered at a time, and a block keeps its input only if it is recomputed."""
    denoiser = "--model.init_args.denoiser=tests.extensions.denoiser.MixerDenoiser"
    overlay = TINY.with_name("tiny_diffusion.yaml")
    sizes = [f"--model.init_args.denoiser.init_args.{name}" for name in ("depth=6", "width=64", "latent_tokens=128")]
    config = read_config(
        [f"--config={EXPERIMENTS / 'imagenet256_sit_xl.yaml'}", f"--config={overlay}", denoiser, *sizes]
    )
    plan = make_plan(config, 4)
    (trained,) = plan.networks
    assert isinstance(trained.network, MixerDenoiser)
    block = count(trained.network.layers[0])
    outside = count(trained.network) - 6 * block
    assert gathered_bytes(plan.networks, 2) == 2 * (outside + 2 * block) + (2 + 4) * block
    assert plan.costs[True].saved < 0.5 * plan.costs[False].saved
    forward = 2 * 64 * 64 + 2 * 128 * 128 * 64 + 2 * 128 * 64 * 256  # products up to the last one, which none needs
    assert plan.costs[True].flops - plan.costs[False].flops == 6 * forward


@pytest.mark.parametrize("num_classes", [10, None])
def test_it_trains_and_samples_in_latent_diffusion(tmp_path: Path, num_classes: int | None) -> None:
    cache = diffusion_cache(tmp_path)
    torch.manual_seed(0)
    network = MixerDenoiser(num_classes=num_classes)
    before = copy.deepcopy(network.state_dict())
    model = diffusion(denoiser=network, optimization=optimization(), activation_checkpointing=True)
    fitted = trainer(tmp_path, 8)
    fitted.fit(model, datamodule=latent_shards(cache))
    moved = {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == before.keys()
    metrics = fitted.validate(model, datamodule=latent_shards(cache), verbose=False)[0]
    assert 0 < metrics["validation/diffusion_loss"] < 10
    images = model.sample(torch.arange(2), torch.zeros(2, dtype=torch.long))
    assert images.shape == (2, 3, 8, 8)
    assert torch.equal(images[0], images[1]) == (num_classes is None)  # of the same noise


def test_a_condition_of_another_kind_is_passed_on_unread(tmp_path: Path) -> None:
    """In training with dropout, in validation of valid rows only, and in guided samples."""
    cache, seen = diffusion_cache(tmp_path), []
    model = diffusion(denoiser=SummaryDenoiser(), label_dropout=0.5, sampling=Sampling(Euler(1), 2.0))
    hook = model.denoiser.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]["summary"]))
    fitted = trainer(tmp_path, 4)
    fitted.fit(model, datamodule=latent_shards(cache))
    dropped = torch.cat(seen).eq(0).all(1)
    assert 4 < dropped.sum() < 20  # of 24
    hook.remove()
    metrics = fitted.validate(model, datamodule=latent_shards(cache, evaluation_batch_size=20), verbose=False)[0]
    assert 0 < metrics["validation/diffusion_loss"] < 10
    condition, indices = {"summary": torch.randn(2, 4)}, torch.arange(2)
    noise, network = index_noise(0, indices, shape=(3, 4)), model.averaged_denoiser
    away, towards = (network(noise, torch.ones(2), it) for it in (network.without_condition(condition), condition))
    expected = model.decode(model.normalizer.denormalize(noise - (away + 2 * (towards - away))))
    torch.testing.assert_close(model.sample(condition, indices), expected, atol=1e-5, rtol=1e-5)
