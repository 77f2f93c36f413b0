"""Every task decodes with the same weights that it encodes, reconstructs and samples with."""

import torch

from lightning_modules import LatentEncoding
from tests.support.decoder_finetuning import finetuning, tokenizer
from tests.support.diffusion import diffusion
from tests.support.tokenizer_training import task


def test_decoded_latents_are_reconstructions() -> None:
    images = torch.rand(3, 3, 16, 16) * 2 - 1
    for model in (task(), finetuning(), LatentEncoding(tokenizer())):
        for parameter in (model.model if hasattr(model, "model") else model).parameters():
            parameter.data.add_(0.01)  # the moving average stays behind, and it decodes
        decoded = model.decode(model.encode(images))
        assert torch.equal(decoded, model.reconstruct(images))
        assert not decoded.requires_grad


def test_diffusion_decodes_raw_latents_with_its_tokenizer() -> None:
    model, latents = diffusion(), torch.randn(2, 3, 4)
    assert torch.equal(model.decode(latents), model.frozen_tokenizer().decode(latents))
    assert not model.decode(latents).requires_grad
