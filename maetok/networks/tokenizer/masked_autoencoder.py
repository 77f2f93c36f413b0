"""The autoencoder that stage 1 trains: the tokenizer and its auxiliary decoders."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from maetok.networks.layers.network import Network
from maetok.networks.layers.patches import grid_of
from maetok.networks.tokenizer.protocol import LatentTokenizer


@dataclass
class MaskedAutoencoderOutput:
    """Result of one training forward pass."""

    reconstructions: Tensor
    """(B, 3, H, W), about [-1, 1]."""
    predictions: dict[str, Tensor]
    """Per target (B, N, dim), dim as the target has."""
    losses: dict[str, Tensor]
    """Named, weighted losses of the bottleneck."""


class MaskedAutoencoder(Network):
    """A tokenizer plus one shallow auxiliary decoder per feature target, dropped after stage 1 (paper section 3.2).

    Args:
        tokenizer: the autoencoder. With targets it also offers ``auxiliary_decoder(dim, depth)``, as
            :class:`maetok.Tokenizer` does.
        target_dims: values per patch of each target, by name.
        depth: layers of an auxiliary decoder (paper: 3), or ``"linear"`` for a linear map.

    Raises:
        ValueError: if ``depth`` is less than 1, since predictions would not depend on the latents, or if there are
            targets and the tokenizer offers no auxiliary decoder.
    """

    def __init__(
        self, tokenizer: LatentTokenizer, target_dims: dict[str, int], depth: int | Literal["linear"] = 3
    ) -> None:
        super().__init__()
        if depth != "linear" and depth < 1:
            raise ValueError(f"model.init_args.auxiliary_depth={depth} must be at least 1, or linear")
        if target_dims and not hasattr(tokenizer, "auxiliary_decoder"):
            raise ValueError(
                f"model.init_args.target_weights names {sorted(target_dims)}, but {type(tokenizer).__name__} offers no "
                "auxiliary_decoder(dim, depth): remove the targets, or add the method"
            )
        network: Any = tokenizer  # also a Network: Python has no type for both
        self.tokenizer = network
        with next(network.parameters()).device:  # the meta device too
            decoders = {name: network.auxiliary_decoder(dim, depth) for name, dim in target_dims.items()}
        self.auxiliary_decoders = nn.ModuleDict(decoders)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> MaskedAutoencoderOutput:
        """Encode masked images (B, 3, H, W) in [-1, 1] with mask (B, N), reconstruct pixels and predict all targets."""
        latents, losses = self.tokenizer.encode_with_losses(images, mask)
        grid = grid_of(images, self.tokenizer.patch_size)
        reconstructions = self.tokenizer.decode(latents, (images.shape[2], images.shape[3]))
        predictions = {name: decoder(latents, grid) for name, decoder in self.auxiliary_decoders.items()}
        return MaskedAutoencoderOutput(reconstructions, predictions, losses)

    @property
    def networks(self) -> list[Network]:
        """Return the tokenizer and the auxiliary decoders."""
        return [self.tokenizer, *cast(Iterable[Network], self.auxiliary_decoders.values())]

    def blocks(self) -> list[nn.Module]:
        """Return the blocks of all networks."""
        return [block for network in self.networks for block in network.blocks()]

    def parts(self) -> list[nn.Module]:
        """Return the parts of all networks."""
        return [part for network in self.networks for part in network.parts()]

    def float32_modules(self) -> list[nn.Module]:
        """Return the float32 modules of all networks."""
        return [module for network in self.networks for module in network.float32_modules()]

    @property
    def compile_options(self) -> dict[str, Any]:
        """Compile all blocks as the tokenizer wants its own compiled."""
        return self.tokenizer.compile_options
