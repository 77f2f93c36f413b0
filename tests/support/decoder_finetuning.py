"""Build a small task of stage 2 and the tokenizer that it starts from."""

from functools import partial

import torch

from lightning_modules import DecoderFinetuning
from maetok import Tokenizer
from maetok.checkpoints.runs import InitFrom
from maetok.losses import LossWeights, ReconstructionObjective
from maetok.networks import PlainBottleneck
from tests.support.tokenizer_training import SIZE, CountingDiscriminator, optimization


def tokenizer(bottleneck=PlainBottleneck, **options) -> Tokenizer:
    torch.manual_seed(1)
    return Tokenizer(16, 4, 2, partial(bottleneck, channels=4), SIZE, SIZE, **options)


def finetuning(init_from: InitFrom | None = None, adversarial: float = 0.0, **options) -> DecoderFinetuning:
    torch.manual_seed(2)
    defaults = {
        "tokenizer": tokenizer(),
        "init_from": init_from,
        "autoencoder_optimization": optimization(),
        "objective": ReconstructionObjective(LossWeights(1.0, 0.0, adversarial), discriminator_start=0),
        "discriminator": CountingDiscriminator,
        "discriminator_optimization": optimization(),
        "ema_decay": 0.5,
    }
    return DecoderFinetuning(**(defaults | options))
