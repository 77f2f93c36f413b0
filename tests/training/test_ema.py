"""The moving average follows by its formula and never trains."""

import copy

import pytest
import torch
from torch import nn

from maetok.training.ema import EMA


def test_update_is_the_formula_with_warm_up() -> None:
    network = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        network.weight.fill_(0.0)
    ema = EMA(network, decay=0.9)
    with torch.no_grad():
        network.weight.fill_(1.0)
    ema.update(network, step=1)  # decay (1 + 1) / (10 + 1)
    torch.testing.assert_close(ema.network.weight, torch.full((1, 2), 1 - 2 / 11))
    before = ema.network.weight.clone()
    ema.update(network, step=1000)
    torch.testing.assert_close(ema.network.weight, 0.9 * before + 0.1)


def test_buffers_are_copied_and_the_copy_stays_in_evaluation_mode() -> None:
    network = nn.BatchNorm1d(3)
    ema = EMA(network)
    network(torch.randn(8, 3))
    ema.train()
    ema.update(network, 1)
    assert torch.equal(ema.network.running_mean, network.running_mean)
    assert not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.parameters())


def test_decay_must_be_a_share() -> None:
    with pytest.raises(ValueError, match=r"ema_decay=1\.0"):
        EMA(nn.Linear(1, 1), 1.0)


def test_what_is_not_trained_is_shared_and_stored_once() -> None:
    """Stage 2: the average holds the frozen encoder itself; an old checkpoint with a second copy of it loads too."""
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    network[0].requires_grad_(False)
    owner = nn.ModuleDict({"network": network, "average": EMA(network, 0.5)})
    average = owner["average"].network
    assert average[0] is network[0]
    assert average[1] is not network[1]
    assert average[1][0].weight is not network[1][0].weight
    names = [name for name in owner.state_dict() if name.startswith("average.")]
    assert names == [f"average.network.1.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")]
    with torch.no_grad():
        network[1][0].weight.add_(1.0)
    owner["average"].update(network, 100)
    torch.testing.assert_close(average[1][0].weight, network[1][0].weight - 0.5)

    other = copy.deepcopy(owner)
    state = owner.state_dict()
    second = {f"average.{name}": torch.full_like(value, 9.0) for name, value in state.items() if "network.0." in name}
    old = state | second
    for stored in (state, old):
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(stored)
        assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
        assert other["average"].network[0] is other["network"][0]
        assert torch.equal(other["average"].network[0].weight, state["network.0.weight"])
