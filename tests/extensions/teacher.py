"""A teacher from outside the package: a frozen convolution as feature target."""

import torch
from torch import Tensor, nn

from maetok.networks.targets.teachers import FrozenModelTarget


class EdgeModel(nn.Module):
    """Two fixed filters, with the interface of timm: horizontal and vertical differences of the first channel."""

    num_features = 2

    def __init__(self) -> None:
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}  # images in [-1, 1], as they come
        self.filters = nn.Conv2d(3, 2, 2, stride=2, bias=False)
        kernels = torch.zeros(2, 3, 2, 2)
        kernels[0, 0] = torch.tensor([[1.0, -1.0], [1.0, -1.0]])
        kernels[1, 0] = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
        self.filters.weight.data.copy_(kernels)

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2, H / 2, W / 2)."""
        return self.filters(images)


class EdgeTeacher(FrozenModelTarget):
    """Predict edges by cosine similarity."""

    def __init__(self, patch_size: int) -> None:
        super().__init__(patch_size, EdgeModel(), loss="cosine")
