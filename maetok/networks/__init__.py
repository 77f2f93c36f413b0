"""Networks of the tokenizer and of latent diffusion; classes named in configs are importable from here."""

from maetok.networks.bottlenecks import Bottleneck, KLBottleneck, PlainBottleneck, SoftVQBottleneck
from maetok.networks.decoder import Decoder, LinearDecoder
from maetok.networks.denoiser import Denoiser, drop_labels
from maetok.networks.discriminators import DINODiscriminator, PatchGAN
from maetok.networks.encoder import Encoder
from maetok.networks.hog import HOGTarget
from maetok.networks.lightning_dit import LightningDiT
from maetok.networks.masked_autoencoder import MaskedAutoencoder
from maetok.networks.masking import MaskRatio, random_mask
from maetok.networks.sit import SiT
from maetok.networks.targets import FeatureTarget
from maetok.networks.teachers import EfficientNetLite0Target, TimmTarget
from maetok.networks.tokenizer import Tokenizer
from maetok.networks.vit import TransformerSize

__all__ = [
    "Bottleneck",
    "DINODiscriminator",
    "Decoder",
    "Denoiser",
    "EfficientNetLite0Target",
    "Encoder",
    "FeatureTarget",
    "HOGTarget",
    "KLBottleneck",
    "LightningDiT",
    "LinearDecoder",
    "MaskRatio",
    "MaskedAutoencoder",
    "PatchGAN",
    "PlainBottleneck",
    "SiT",
    "SoftVQBottleneck",
    "TimmTarget",
    "Tokenizer",
    "TransformerSize",
    "drop_labels",
    "random_mask",
]
