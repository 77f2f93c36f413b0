"""What sharding, compiling, packing, activation checkpointing and planning ask of a network: its blocks.

No mechanism knows a block by its class, so a network with blocks of its own kind gets all of them.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Blocks(nn.ModuleList):
    """The repeated blocks of a network, which are also its answer to ``blocks()``.

    A network that stores ``self.blocks = Blocks(...)`` offers ``blocks()``; its parameters are named ``blocks.0...``.
    """

    def __call__(self) -> list[nn.Module]:
        """Return the blocks in the order in which they run."""
        return list(self)


class Network(nn.Module):
    """Base of all trained networks. A subclass defines ``blocks``, as a method or as :class:`Blocks`."""

    blocks: Callable[[], list[nn.Module]]
    """Return the repeated blocks: each is sharded, compiled, packed for inference, recomputed and planned separately.

    The network calls a block as a module (``block(...)``), never its ``forward``. Blocks do not contain one another.
    """

    @property
    def compile_options(self) -> dict[str, Any]:
        """Arguments of :meth:`torch.nn.Module.compile` for each block; torch's defaults if not overridden."""
        return {}

    def parts(self) -> list[nn.Module]:
        """Return the modules that are called from outside. Sharding treats each as a whole around its blocks."""
        return [self]

    def float32_modules(self) -> list[nn.Module]:
        """Return the modules that compute in float32 in every precision of training; none by default."""
        return []

    def compile_blocks(self) -> None:
        """Compile every block in place. Names in the state dict do not change."""
        for block in self.blocks():
            block.compile(**self.compile_options)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Choose whether the backward pass recomputes the activations of each block, which saves memory."""
        for block in self.blocks():
            if enabled and not isinstance(block, Recomputed):
                block.__class__ = recomputed(type(block))  # type: ignore[arg-type]
            if isinstance(block, Recomputed):
                block.recomputes = enabled


class Recomputed(nn.Module):
    """Mixed into the class of a block, so that its activations are recomputed in the backward pass.

    It wraps the whole call, including compiled code and the hooks of FSDP2, and leaves all names as they are.
    """

    recomputes: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the block; under gradients, forget its activations until the backward pass."""
        run = partial(super().__call__, **kwargs)
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(run, *args, use_reentrant=False)
        return run(*args)


@cache
def recomputed(kind: type) -> type[nn.Module]:
    """Return the class of a block with :class:`Recomputed` mixed in, as ``fully_shard`` does with FSDPModule."""
    return cast(type[nn.Module], type(f"Recomputed{kind.__name__}", (Recomputed, kind), {}))


@runtime_checkable
class CachesWeights(Protocol):
    """A module that keeps what it has computed from its weights, and reuses it until they change."""

    def stop_caching(self) -> None:
        """Compute everything anew from now on: sharding changes weights in ways that the module cannot notice."""


def all_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of every :class:`Network` inside ``module``, each once."""
    networks = (inner for inner in module.modules() if isinstance(inner, Network))
    return list(dict.fromkeys(block for network in networks for block in network.blocks()))
