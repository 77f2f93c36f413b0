"""Features of the Inception network that defines FID, sFID and Inception Score, in torch-fidelity's version."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from maetok.metrics.features import FeatureNetwork

SPATIAL_CHANNELS = 7


class InceptionFeatures(FeatureNetwork):
    """Runs InceptionV3 with the weights of 2015-12-05; it resizes images to 299 pixels by TensorFlow 1's bilinear rule.

    ``pool`` (n, 2048) is TensorFlow's ``pool_3``. ``logits`` (n, 1008) is its product with the last weights without
    bias, for the Inception Score. ``spatial`` (n, 17 * 17 * 7 = 2023) holds the first seven channels of
    ``mixed_6/conv`` (Nash et al. 2021, arXiv 2103.03841), flattened with channels last as in the moments of the ADM
    evaluation suite. TensorFlow numbers the blocks mixed, mixed_1 ... mixed_10; torch-fidelity names them Mixed_5b ...
    Mixed_5d, Mixed_6a ... Mixed_6e, Mixed_7a ... Mixed_7c. ``mixed_6/conv`` is therefore the 1 x 1 convolution at the
    start of Mixed_6d, after batch normalisation and ReLU: ``Mixed_6d.branch1x1``.

    Args:
        weights_path: torch-fidelity's file of the weights; nothing is downloaded.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file holds something else.
    """

    is_inception: ClassVar[bool] = True

    def __init__(self, weights_path: str | None = None) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        if weights_path is None or not Path(weights_path).is_file():
            raise FileNotFoundError(
                f"InceptionFeatures.weights_path={weights_path}: no such file, and nothing is downloaded. Fetch "
                f"{URL_INCEPTION_V3} on a machine with network access and set weights_path (--weights of python -m "
                "maetok.metrics) to it, or use EfficientNetLite0Features (efficientnet_lite0), whose distance is "
                "reported as FD"
            )
        try:
            # Refuses pickled code, which torch-fidelity would execute
            torch.load(weights_path, map_location="cpu", weights_only=True)
            wanted = ["2048", "logits_unbiased"]
            self.network = FeatureExtractorInceptionV3("inception", wanted, feature_extractor_weights_path=weights_path)
        except Exception as error:
            raise ValueError(
                f"InceptionFeatures.weights_path={weights_path} does not hold the weights of torch-fidelity's "
                f"InceptionV3 ({str(error)[:200]}): fetch {URL_INCEPTION_V3}"
            ) from error
        self.spatial: list[Tensor] = []
        self.network.Mixed_6d.branch1x1.register_forward_hook(self.keep_spatial)

    def extra_repr(self) -> str:
        """Return the date of the weights, the only setting."""
        return "2015-12-05"

    def keep_spatial(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        """Keep the spatial features (n, 2023) of a forward pass."""
        self.spatial = [output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float()]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return ``pool``, ``logits`` and ``spatial`` of uint8 images of any size."""
        pool, logits = self.network(images)
        return {"pool": pool, "logits": logits, "spatial": self.spatial.pop()}
