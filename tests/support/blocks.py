"""What happens to the blocks of a network: how often they run, and what the compiler makes of them."""

from functools import partial

import pytest
import torch

from maetok.networks.layers.network import Network


def forward_calls(network: Network) -> list[int]:
    """Count from now on how often each block runs forward, recomputation included; the list is updated in place."""
    calls = [0] * len(network.blocks())

    def count(number: int) -> None:
        calls[number] += 1

    for number, block in enumerate(network.blocks()):
        block.register_forward_pre_hook(lambda *_, number=number: count(number))
    return calls


def compiled_graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """Let torch.compile trace whole graphs but generate no code; the list gets every graph."""
    graphs: list[torch.fx.GraphModule] = []

    def record(graph: torch.fx.GraphModule, _: list) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=record, fullgraph=True))
    return graphs
