"""Networks that are not trained any more, made ready for sampling and encoding in bfloat16."""

import torch
from torch import nn

from maetok.networks.denoiser import ConditionedBlock
from maetok.networks.vit import Block, ModulatedBlock


def keep_bfloat16_weights(network: nn.Module) -> None:
    """Keep the linear layers of all transformer blocks in bfloat16, in place, for use under autocast only.

    Autocast converts float32 weights anew in every call, which takes a third of the time of a small batch. The outputs
    are the same bit for bit: products are those of autocast, and sums of residual branches and normalisations stay
    float32. The network holds half the memory and cannot be trained.

    Args:
        network: any tokenizer or denoiser of the suite; its parameters are replaced and need no gradient from then on.
    """
    for block in network.modules():
        if isinstance(block, Block | ModulatedBlock | ConditionedBlock):
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    for name in ("weight", "bias"):
                        value = getattr(module, name)
                        if value is not None:
                            lowered = nn.Parameter(value.detach().to(torch.bfloat16), requires_grad=False)
                            setattr(module, name, lowered)
