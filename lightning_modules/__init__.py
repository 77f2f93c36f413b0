"""Tasks: thin wiring around maetok; classes named in configs are importable from here."""

from lightning_modules.decoder_finetuning import DecoderFinetuning
from lightning_modules.latent_diffusion import LatentDiffusion
from lightning_modules.latent_encoding import LatentEncoding
from lightning_modules.sampling import DenoiserFrom, Sampling
from lightning_modules.schedules import ConstantWithWarmup, CosineWithWarmup
from lightning_modules.tokenizer import TokenizerTraining

__all__ = [
    "ConstantWithWarmup",
    "CosineWithWarmup",
    "DecoderFinetuning",
    "DenoiserFrom",
    "LatentDiffusion",
    "LatentEncoding",
    "Sampling",
    "TokenizerTraining",
]
