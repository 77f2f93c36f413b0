"""Networks that are not trained any more, made ready for sampling and encoding."""

from collections.abc import Callable

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from maetok.networks.layers.attention import CPU_HAS_BFLOAT16
from maetok.networks.layers.network import all_blocks

Replace = Callable[[nn.Module, str, nn.Module | nn.Parameter], None]
"""Sets an attribute of a module, and remembers what it was."""


class PackedLinear(nn.Module):
    """A linear layer on the CPU whose weight lies in memory as oneDNN's kernels read it.

    :class:`torch.nn.Linear` rearranges its weight in every call, which takes 5 to 10 % of the time of a network. The
    outputs are the same bit for bit. The layer knows no gradients, and a state dict holds none of its weight.

    Args:
        linear: the layer it stands for; weight and bias are bfloat16, or float32.
        gelu: applied to the outputs before they are rounded to their dtype, while they are in the cache.
    """

    def __init__(self, linear: nn.Linear, gelu: nn.GELU | None = None) -> None:
        super().__init__()
        self.packed_weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = linear.bias
        self.activation = ("none", "") if gelu is None else ("gelu", gelu.approximate)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in the dtype of the weight."""
        activation, approximation = self.activation
        input = input.to(self.packed_weight.dtype)
        return torch.ops.mkldnn._linear_pointwise(input, self.packed_weight, self.bias, activation, [], approximation)


def prepare_for_inference(network: nn.Module, bfloat16: bool) -> Callable[[], None]:
    """Make the linear layers of all transformer blocks faster, in place.

    With ``bfloat16`` they hold their weights in that dtype. Autocast converts float32 weights anew in every call, which
    takes a third of the time of a small batch. Outputs are the same bit for bit: products are those of autocast, and
    sums of residual branches and normalisations stay float32.

    On a CPU weights are packed (:class:`PackedLinear`), but for blocks that are compiled. A GELU then sees the numbers
    before they are rounded, which makes the outputs a little more precise.

    Args:
        network: any module; the blocks of every network inside it are prepared. It can neither be trained nor saved
            until this is undone.
        bfloat16: the network will run under autocast to bfloat16, and only so.

    Returns:
        A function that undoes it. It holds the weights; drop it to free their memory.
    """
    replaced: list[tuple[nn.Module, str, nn.Module | nn.Parameter]] = []

    def replace(owner: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
        replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo() -> None:
        for owner, name, original in reversed(replaced):
            setattr(owner, name, original)

    for block in all_blocks(network):
        if bfloat16:
            lower_weights(block, replace)
        if block._compiled_call_impl is None:  # the compiler cannot handle packed weights
            pack_weights(block, replace)
    return undo


def lower_weights(block: nn.Module, replace: Replace) -> None:
    """Keep weights and biases of all linear layers in bfloat16."""
    for module in block.modules():
        if isinstance(module, nn.Linear):
            for name in ("weight", "bias"):
                value = getattr(module, name)
                if value is not None:
                    replace(module, name, nn.Parameter(value.detach().to(torch.bfloat16), requires_grad=False))


def pack_weights(block: nn.Module, replace: Replace) -> None:
    """Replace the plain linear layers whose products oneDNN computes, and the GELU that follows one."""
    for module in list(block.modules()):
        if isinstance(module, Mlp) and isinstance(module.act, nn.GELU) and multiplied_by_onednn(module.fc1.weight):
            replace(module, "fc1", PackedLinear(module.fc1, module.act))
            replace(module, "act", nn.Identity())
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and multiplied_by_onednn(child.weight):
                replace(module, name, PackedLinear(child))


def multiplied_by_onednn(weight: Tensor) -> bool:
    """Whether PyTorch leaves products with this weight to oneDNN; see :func:`maetok.runtime.cpu.use_fast_float32`."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.float32:
        return torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined] # set at run time
    return weight.dtype == torch.bfloat16 and CPU_HAS_BFLOAT16
