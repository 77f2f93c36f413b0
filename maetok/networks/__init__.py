"""Networks of the tokenizer; classes named in configs are importable from here."""

from maetok.networks.bottlenecks import Bottleneck, KLBottleneck, PlainBottleneck, SoftVQBottleneck
from maetok.networks.decoder import Decoder, LinearDecoder
from maetok.networks.discriminators import DINODiscriminator, PatchGAN
from maetok.networks.encoder import Encoder
from maetok.networks.hog import HOGTarget
from maetok.networks.masked_autoencoder import MaskedAutoencoder
from maetok.networks.masking import MaskRatio, random_mask
from maetok.networks.targets import FeatureTarget
from maetok.networks.teachers import TimmTarget
from maetok.networks.tokenizer import Tokenizer
from maetok.networks.vit import TransformerSize

__all__ = [
    "Bottleneck",
    "DINODiscriminator",
    "Decoder",
    "Encoder",
    "FeatureTarget",
    "HOGTarget",
    "KLBottleneck",
    "LinearDecoder",
    "MaskRatio",
    "MaskedAutoencoder",
    "PatchGAN",
    "PlainBottleneck",
    "SoftVQBottleneck",
    "TimmTarget",
    "Tokenizer",
    "TransformerSize",
    "random_mask",
]
