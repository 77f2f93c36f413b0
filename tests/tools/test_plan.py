"""Planned bytes against those of real training states and real steps; FLOPs and transfers against closed forms."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_modules.base import Task
from maetok import SiT
from maetok.networks import TransformerSize
from maetok.training.sharding import divided_dimension, placement
from tests.support.helpers import EXPERIMENTS, TINY, run_subprocess
from tests.support.tokenizer_training import fit, task
from tools.plan.__main__ import (
    gathered_bytes,
    main,
    make_plan,
    memory_column,
    parse,
    read_config,
    report,
    without_weights,
)
from tools.plan.state import StateBytes, Trained, expected_bytes, size_of, trained_networks
from tools.plan.time import MACHINES, Cluster, step_time, transfers

WIDTH, DEPTH, HEADS, TOKENS, CHANNELS = 64, 3, 4, 32, 8


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, fused=True)


def measured_state(model: Task, optimizers: list[torch.optim.Optimizer], gradients: list[int]) -> StateBytes:
    """Bytes of the tensors of a task that has trained."""
    networks = [trained.network for trained in trained_networks(model)]
    averages = [model.ema] if hasattr(model, "ema") else list(model.emas)

    def held(modules: list[nn.Module]) -> int:
        return sum(size_of(tensor) for module in modules for tensor in (*module.parameters(), *module.buffers()))

    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return StateBytes(held(networks), sum(gradients), sum(map(size_of, states)), held([a.network for a in averages]))


def test_state_of_a_trained_tokenizer_is_the_planned_one_byte_for_byte(tmp_path: Path) -> None:
    """Generator, auxiliary decoder and discriminator with two kinds of optimizer, after two steps of Lightning."""
    model, gradients = task(), []
    model.discriminator_optimization.optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    build = model.configure_optimizers

    def configure() -> Any:
        built = build()
        for optimizer in built[0]:
            optimizer.register_step_pre_hook(
                lambda o, *_: gradients.append(sum(size_of(p.grad) for g in o.param_groups for p in g["params"]))
            )
        return built

    model.configure_optimizers = configure
    fitted = fit(model, tmp_path, 2)
    planned = expected_bytes(
        trained_networks(task(discriminator_optimization=model.discriminator_optimization)), 1, "ddp"
    )
    assert planned == measured_state(model, fitted.optimizers, gradients[-2:])
    assert planned.optimizer > planned.gradients > 50_000


def test_two_averages_count_twice_and_frozen_positions_have_no_gradient() -> None:
    network = SiT(TOKENS, CHANNELS, 10, TransformerSize(WIDTH, DEPTH, HEADS))
    trainable = sum(size_of(p) for p in network.parameters() if p.requires_grad)
    table = 4 * TOKENS * WIDTH
    planned = expected_bytes([Trained("denoiser", network, adamw, averages=2)], 1, "ddp")
    tensors = sum(parameter.requires_grad for parameter in network.parameters())
    expected = StateBytes(trainable + table, trainable, 2 * trainable + 4 * tensors, 2 * (trainable + table))
    assert planned == expected


PROGRAM = """
import sys
import torch.multiprocessing
from tests.tools.test_plan import two_processes
if __name__ == "__main__":
    torch.multiprocessing.spawn(two_processes, (sys.argv[1],), nprocs=2)
"""


def odd_network() -> nn.Module:
    """Sizes that two processes cannot share evenly, a row that one of them gets nothing of, and a buffer."""
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 1))


def two_processes(rank: int, folder: str) -> None:
    """A step of a network sharded by FSDP2."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    network = odd_network()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(network, mesh=mesh, shard_placement_fn=placement(mesh))
    optimizer = adamw(network.parameters())
    network(torch.randn(4, 5)).sum().backward()
    parameters = list(network.parameters())
    gradients = sum(size_of(p.grad.to_local()) for p in parameters)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = sum(size_of(p.to_local()) for p in parameters) + sum(size_of(b) for b in network.buffers())
    local = [value.to_local() if hasattr(value, "to_local") else value for value in states]
    torch.save([held, gradients, sum(map(size_of, local)), 0], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_shards_of_two_processes_are_the_planned_ones_byte_for_byte(tmp_path: Path) -> None:
    run_subprocess(PROGRAM, tmp_path, str(tmp_path))
    networks = [Trained("odd", odd_network(), adamw)]
    sizes = []
    for rank in (0, 1):
        planned = expected_bytes(networks, 2, "fsdp", rank=rank)
        assert planned == StateBytes(*torch.load(tmp_path / f"{rank}.pt"))
        sizes.append(planned.parameters)
    assert sizes[0] - sizes[1] == 4 * (5 + 1 + 1 + 1 + 7 + 1)  # one row more of everything
    assert expected_bytes(networks, 4, "hsdp", nodes=2) == expected_bytes(networks, 2, "fsdp")
    replicated = [Trained("odd", odd_network(), adamw, sharded=False)]
    assert expected_bytes(replicated, 2, "fsdp") == expected_bytes(networks, 2, "ddp")


class TestTransfers:
    """Bytes sent by ring algorithms and what becomes of them."""

    network = nn.Linear(100, 10, bias=False)  # 1000 parameters
    networks = (Trained("main", network, adamw), Trained("critic", network, adamw, sharded=False))

    def sent(self, cluster: Cluster, strategy: Any, **options: Any) -> list[tuple[float, bool]]:
        found = transfers(self.networks, cluster, strategy, 2, **options)
        return [(pytest.approx(transfer.sent), transfer.between_nodes) for transfer in found]

    def test_by_hand(self) -> None:
        assert self.sent(Cluster(1, 4), "ddp") == [(2 * 0.75 * 4000, False)] * 2
        assert self.sent(Cluster(1, 4), "fsdp", micro_batches=3) == [
            (3 * 2 * 0.75 * 2000, False), (0.75 * 4000, False), (2 * 0.75 * 4000, False)
        ]  # fmt: skip
        assert self.sent(Cluster(2, 4), "hsdp") == [
            (2 * 0.75 * 2000, False), (0.75 * 4000, False), (2 * 0.5 * 1000, True), (2 * 7 / 8 * 4000, True)
        ]  # fmt: skip
        assert all(size == 0 for size, _ in [(t.sent, 0) for t in transfers(self.networks, Cluster(1, 1), "fsdp", 2)])

    def test_time_is_rates_and_bytes(self) -> None:
        sent = transfers(self.networks, Cluster(2, 4), "ddp", 2)
        state = StateBytes(gradients=10**9, averages=10**9)
        time = step_time(989e12, state, sent, MACHINES["h100"], "bf16-mixed", 0.5, 1.0)
        assert time.compute == 2.0
        assert time.update == pytest.approx(10e9 / 3.35e12)
        assert time.communication == pytest.approx(2 * 2 * 7 / 8 * 4000 / 50e9)
        assert time.overlapped == pytest.approx(2.0 + time.update)
        assert time.serial == pytest.approx(2.0 + time.update + time.communication)
        assert step_time(67e12, state, [], MACHINES["h100"], "32-true", 1.0, 1.0).compute == 1.0

    def test_gathered_blocks(self) -> None:
        network = SiT(TOKENS, CHANNELS, 10, TransformerSize(WIDTH, DEPTH, HEADS))
        block = sum(parameter.numel() for parameter in network.blocks[0].parameters())
        everything = sum(parameter.numel() for parameter in network.parameters())
        expected = 2 * (everything - DEPTH * block + 2 * block) + 6 * block
        assert gathered_bytes([Trained("denoiser", network, adamw)], 2) == expected


def test_nothing_that_names_weights_is_left_in_a_config() -> None:
    config = {"pretrained": True, "targets": [{"checkpoint_path": "a.pt", "depth": 3}], "init_from": {"path": "runs/a"}}
    assert without_weights(config) == {
        "pretrained": False, "targets": [{"checkpoint_path": "", "depth": 3}], "init_from": None
    }  # fmt: skip


@pytest.mark.parametrize(("experiment", "overlay", "frozen"), [
    ("imagenet256_maetok_b128", TINY, 4),  # two teachers, perceptual loss, the discriminator's backbone
    ("imagenet256_sit_xl", TINY.with_name("tiny_diffusion.yaml"), 1),
])  # fmt: skip
def test_the_command_plans_every_kind_of_experiment(experiment: str, overlay: Path, frozen: int) -> None:
    configs = [f"--config={EXPERIMENTS / experiment}.yaml", f"--config={overlay}"]
    plan = make_plan(read_config(configs), 4)
    assert (plan.samples, plan.micro_batches, plan.precision) == (1, 1, "32-true")
    cluster = Cluster(2, 2)
    columns = {
        (strategy, checkpointing): memory_column(plan, cluster, strategy, checkpointing)
        for strategy in ("ddp", "fsdp", "hsdp")
        for checkpointing in (False, True)
    }
    for (strategy, checkpointing), column in columns.items():
        state, cost = expected_bytes(plan.networks, 4, strategy, nodes=2), plan.costs[checkpointing]
        held = state.total + cost.peak + column["frozen networks"] + column["communication buffers"]
        assert column["total"] == held  # float32 has no copies of weights
    assert columns["ddp", False]["communication buffers"] == columns["ddp", False]["gradients"]
    parameters = [columns[strategy, False]["parameters"] for strategy in ("ddp", "hsdp", "fsdp")]
    for strategy, shards in ((1, 2), (2, 4)):
        weights = list(plan.networks[0].network.parameters())
        saved = sum(
            4 * (weight.numel() - weight.chunk(shards, divided_dimension(weight.shape, shards))[0].numel())
            for weight in weights
        )
        assert parameters[0] - parameters[strategy] == saved > 0.8 * (1 - 1 / shards) * sum(map(size_of, weights))
    assert len(plan.frozen) == frozen
    lines = report("name", plan, cluster, parse(["--memory=0.001"]))
    assert next(line for line in lines if line.startswith("fits")).split()[-6:] == ["no"] * 6
    numbers = next(line for line in lines if line.startswith("GB sent")).split()[2:]
    sent = sum(transfer.sent for transfer in transfers(plan.networks, cluster, "ddp", 4)) / 1e9
    assert float(numbers[0]) == pytest.approx(sent, abs=6e-4)
    with pytest.raises(SystemExit, match="batch_size=4 is not divisible by 24 GPUs"):
        main([*configs, "--nodes=3"])


def test_number_of_rows_of_a_shard() -> None:
    """As torch.chunk deals them out."""
    for rows in (1, 2, 3, 7, 8):
        for shards in (2, 3, 4):
            linear = nn.Linear(5, rows, bias=False)
            sizes = [
                expected_bytes([Trained("x", linear, adamw)], shards, "fsdp", rank=r).gradients for r in range(shards)
            ]
            chunks = [chunk.numel() * 4 for chunk in linear.weight.chunk(shards)]
            assert sizes == chunks + [0] * (shards - len(chunks))
            assert sizes[0] == 20 * math.ceil(rows / shards)
