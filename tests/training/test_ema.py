"""The moving average follows by its formula and never trains."""

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
