"""Observe the blocks of a network: how often they run, and which graphs the compiler traces."""

from functools import partial

import pytest
import torch

from maetok.networks.layers.network import Network


def forward_calls(network: Network) -> list[int]:
    """Return a list that counts the forward calls of each block from now on, recomputation included."""
    calls = [0] * len(network.blocks())

    def count(number: int) -> None:
        calls[number] += 1

    for number, block in enumerate(network.blocks()):
        block.register_forward_pre_hook(lambda *_, number=number: count(number))
    return calls


def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Make torch.compile trace whole graphs without generating code; return a list that receives every graph."""
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=record, fullgraph=True))
    return graphs
