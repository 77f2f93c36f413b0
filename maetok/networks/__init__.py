"""Networks of the tokenizer and of latent diffusion; classes named in configs are importable from here."""

from maetok.networks.denoiser.denoiser import Denoiser, drop_labels
from maetok.networks.denoiser.lightning_dit import LightningDiT
from maetok.networks.denoiser.sit import SiT
from maetok.networks.discriminators import DINODiscriminator, PatchGAN
from maetok.networks.layers.network import Blocks, Network
from maetok.networks.layers.vit import TransformerSize
from maetok.networks.targets.hog import HOGTarget
from maetok.networks.targets.targets import FeatureTarget
from maetok.networks.targets.teachers import EfficientNetLite0Target, TimmTarget
from maetok.networks.tokenizer.bottlenecks import Bottleneck, KLBottleneck, PlainBottleneck, SoftVQBottleneck
from maetok.networks.tokenizer.decoder import Decoder, LinearDecoder
from maetok.networks.tokenizer.encoder import Encoder
from maetok.networks.tokenizer.masked_autoencoder import MaskedAutoencoder
from maetok.networks.tokenizer.masking import MaskRatio, random_mask
from maetok.networks.tokenizer.protocol import LatentTokenizer
from maetok.networks.tokenizer.tokenizer import Tokenizer

__all__ = [
    "Blocks",
    "Bottleneck",
    "DINODiscriminator",
    "Decoder",
    "Denoiser",
    "EfficientNetLite0Target",
    "Encoder",
    "FeatureTarget",
    "HOGTarget",
    "KLBottleneck",
    "LatentTokenizer",
    "LightningDiT",
    "LinearDecoder",
    "MaskRatio",
    "MaskedAutoencoder",
    "Network",
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
