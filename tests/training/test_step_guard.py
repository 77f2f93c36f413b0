"""Skipped steps leave everything as it was, whatever the optimizer, and all processes skip together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from maetok.losses import LeCAM
from maetok.training.step_guard import StepGuard, all_finite
from tests.support.helpers import run_subprocess

NAN, INF = float("nan"), float("inf")
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "AdamW fused": (torch.optim.AdamW, {"fused": True, "weight_decay": 0.1}),
    "AdamW foreach": (torch.optim.AdamW, {"foreach": True, "weight_decay": 0.1}),
    "Adam": (torch.optim.Adam, {"foreach": False}),
    "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "SGD fused": (torch.optim.SGD, {"momentum": 0.9, "fused": True}),
}


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def guarded_steps(
    optimizer: torch.optim.Optimizer, module: nn.Module, guard: StepGuard, inputs: list[Tensor], factor: float = 1.0
) -> None:
    for values in inputs:
        loss = module(values).square().mean()
        guard.note_loss(0, loss * factor)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        guard.step(0, norm, optimizer, optimizer.step)
        optimizer.zero_grad()


def state_of(optimizer: torch.optim.Optimizer, module: nn.Module) -> list[Tensor]:
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return [value.clone() for value in [*module.parameters(), *states]]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [0, 2])
def test_a_skipped_step_is_as_if_it_had_not_been(name: str, bad: int) -> None:
    """Bit for bit: a NaN batch at the first or the third place against a run without it."""
    kind, options = OPTIMIZERS[name]
    good = [torch.randn(4, 3, generator=torch.Generator().manual_seed(number)) for number in range(4)]
    results = []
    for inputs in (good, [*good[:bad], torch.full((4, 3), NAN), *good[bad:]]):
        module = network()
        optimizer = kind(module.parameters(), lr=0.1, **options)
        guarded_steps(optimizer, module, StepGuard(), inputs)
        results.append(state_of(optimizer, module))
    assert len(results[0]) == len(results[1]) >= 4
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    assert not torch.equal(results[0][0], network().weight)


@pytest.mark.parametrize("name", ["AdamW fused", "SGD with momentum"])
def test_a_loss_is_enough_whatever_the_gradient(name: str) -> None:
    kind, options = OPTIMIZERS[name]
    module, guard = network(), StepGuard()
    optimizer = kind(module.parameters(), lr=0.1, **options)
    guarded_steps(optimizer, module, guard, [torch.ones(4, 3)], factor=INF)
    assert torch.equal(module.weight, network().weight)
    verdict = guard.verdicts[0]
    assert (verdict.skipped.item(), verdict.loss.item()) == (1.0, INF)
    assert verdict.gradient_norm.isfinite()
    guarded_steps(optimizer, module, guard, [torch.ones(4, 3)])
    assert guard.verdicts[0].skipped == 0
    assert not torch.equal(module.weight, network().weight)
    assert not hasattr(optimizer, "found_inf")


def verdict_of(autoencoder: list[float], discriminator: list[float]) -> tuple[float, float]:
    """Steps of two networks with given losses of micro-batches and gradients of ones."""
    guard, moved = StepGuard(), []
    for index, losses in enumerate((autoencoder, discriminator)):
        for loss in losses:
            guard.note_loss(index, torch.tensor(loss))
    for index in (0, 1):
        module = network()
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        guard.step(index, torch.tensor(1.0), optimizer, optimizer.step)
        moved.append(not torch.equal(module.weight, network().weight))
    skipped = tuple(guard.verdicts[index].skipped.item() for index in (0, 1))
    assert moved == [not flag for flag in skipped]
    return skipped


def test_the_discriminator_goes_with_the_generator_but_not_the_other_way_round() -> None:
    assert verdict_of([1.0, 2.0], [1.0, 1.0]) == (0, 0)
    assert verdict_of([NAN, 2.0], [1.0, 1.0]) == (1, 1)  # of the first of two micro-batches
    assert verdict_of([1.0, 2.0], [1.0, -INF]) == (0, 1)


def test_lecam_ignores_logits_that_are_not_finite() -> None:
    lecam = LeCAM(decay=0.5)
    lecam(torch.full((2, 3), 2.0), torch.full((2, 3), -4.0))
    assert (lecam.real_average.item(), lecam.fake_average.item()) == (1.0, -2.0)
    assert lecam(torch.full((2, 3), 2.0), torch.full((2, 3), NAN)).isnan()
    assert (lecam.real_average.item(), lecam.fake_average.item()) == (1.0, -2.0)


def test_all_finite_looks_at_floats_only() -> None:
    tensors = [torch.ones(2, 2), torch.tensor([2**60]), torch.zeros(0), torch.full((3,), torch.finfo().max)]
    assert all_finite(tensors)
    for value in (NAN, INF, -INF):
        assert not all_finite([*tensors, torch.tensor([1.0, value])])


PROGRAM = """
import sys
import torch.multiprocessing
from tests.training.test_step_guard import two_processes
if __name__ == "__main__":
    torch.multiprocessing.spawn(two_processes, (sys.argv[1],), nprocs=2)
"""


def two_processes(rank: int, folder: str) -> None:
    """Replicated and sharded steps whose loss is infinite on the second process, while all gradients are finite."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for name in ("AdamW fused", "SGD with momentum"):
        for sharded in (False, True):
            module = network()
            if sharded:
                fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
            kind, options = OPTIMIZERS[name]
            optimizer, guard, weights = kind(module.parameters(), lr=0.1, **options), StepGuard(), []
            for bad in (1, 0):
                loss = module(torch.ones(4, 3)).square().mean()
                guard.note_loss(0, loss * (INF if rank == bad == 1 else 1.0))
                loss.backward()
                guard.step(0, torch.tensor(1.0), optimizer, optimizer.step)
                optimizer.zero_grad()
                whole = module.weight.full_tensor() if sharded else module.weight
                weights.append(whole.detach().tolist())
            found[f"{name} {sharded}"] = [guard.verdicts[0].skipped.item(), weights]
            found[f"{name} {sharded} finite"] = all_finite(module.parameters())
            with torch.no_grad():
                module.weight.mul_(NAN if rank else 1.0)
            found[f"{name} {sharded} NaN"] = all_finite(module.parameters())
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_all_processes_skip_together_replicated_and_sharded(tmp_path: Path) -> None:
    run_subprocess(PROGRAM, tmp_path, str(tmp_path))
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for name in ("AdamW fused", "SGD with momentum"):
        for sharded in (False, True):
            skipped, (after_bad, after_good) = first[f"{name} {sharded}"]
            assert skipped == 0
            assert after_bad == network().weight.tolist()
            assert after_good != after_bad
            assert first[f"{name} {sharded} finite"]
            assert not first[f"{name} {sharded} NaN"]
