"""Stage 2 changes the pixel decoder and nothing that latents depend on."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from lightning_modules import ConstantWithWarmup
from lightning_modules.optimization import Optimization
from maetok.checkpoints.runs import InitFrom
from maetok.losses import LossWeights, ReconstructionObjective
from maetok.networks import HOGTarget, KLBottleneck, PlainBottleneck
from tests.support.decoder_finetuning import finetuning, tokenizer
from tests.support.helpers import StopAt
from tests.support.tokenizer_training import fit, task


class Ratios(Callback):
    """Records the share of masked patches in each step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        self.seen.append(float(trainer.callback_metrics.get("train/mask_ratio", 0.0)))
        trainer.callback_metrics.pop("train/mask_ratio", None)
        assert pl_module.training
        assert not pl_module.model.tokenizer.encoder.training
        assert not pl_module.model.tokenizer.bottleneck.training
        assert pl_module.model.tokenizer.decoder.training


@pytest.mark.parametrize(
    ("bottleneck", "mask_mode"), [(PlainBottleneck, "replace"), (PlainBottleneck, "drop"), (KLBottleneck, "replace")]
)
def test_latents_stay_bit_identical_while_the_decoder_learns(tmp_path: Path, bottleneck, mask_mode: str) -> None:
    images = torch.rand(4, 3, 16, 16) * 2 - 1
    start = tokenizer(bottleneck, mask_mode=mask_mode)
    model = finetuning(adversarial=0.5, tokenizer=copy.deepcopy(start), latent_noise=0.1)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all(name.startswith(("model.tokenizer.decoder.", "discriminator.")) for name in trained)
    before, first = model.encode(images), model.reconstruct(images)
    model.model.tokenizer.eval()
    raw, state = model.model.tokenizer.encode(images), start.state_dict()
    fit(model, tmp_path, 5)
    assert torch.equal(model.encode(images), before)
    model.model.tokenizer.eval()
    assert torch.equal(model.model.tokenizer.encode(images), raw)
    assert model.averaged_model.tokenizer.latents_hash() == start.latents_hash()
    assert not torch.allclose(model.reconstruct(images), first, atol=1e-3)
    for name, value in model.model.tokenizer.state_dict().items():
        moved = not torch.equal(value, state[name])
        assert moved == name.startswith("decoder."), name


def test_masking_falls_linearly_to_nothing(tmp_path: Path) -> None:
    ratios = Ratios()
    fit(finetuning(mask_ratio=0.75), tmp_path, 4, ratios)
    assert ratios.seen == [0.75, 0.5, 0.25, 0.0]  # sixteen patches
    ratios = Ratios()
    fit(finetuning(mask_ratio=0.0), tmp_path, 2, ratios)
    assert ratios.seen == [0.0, 0.0]


def test_annealing_needs_an_end(tmp_path: Path) -> None:
    endless = Optimization(partial(torch.optim.SGD, lr=0.1), ConstantWithWarmup)
    with pytest.raises(
        ValueError, match=r"trainer\.max_steps=-1, but model\.init_args\.mask_ratio=0\.6 falls to 0 over"
    ):
        fit(finetuning(autoencoder_optimization=endless), tmp_path, -1, StopAt(2))


@pytest.mark.parametrize("mask_mode", ["replace", "drop"])
def test_the_decoder_gets_latents_of_masked_images_with_noise(mask_mode: str) -> None:
    """The decoder's input is the frozen encoder's output for the mask, plus Gaussian noise of the given deviation."""
    images = torch.rand(64, 3, 16, 16) * 2 - 1
    mask = torch.rand(64, 16) < 0.5
    for deviation in (0.0, 0.3):
        model, seen = finetuning(latent_noise=deviation, tokenizer=tokenizer(mask_mode=mask_mode)), []
        model.model.tokenizer.decoder.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        model.reconstruct_masked(images, mask)
        tokenizer_ = model.model.tokenizer
        latents, unmasked = tokenizer_.encode(images, mask), tokenizer_.encode(images)
        assert (latents - unmasked).abs().max() > 1e-3
        noise = seen[0] - latents
        if deviation == 0.0:
            assert torch.equal(seen[0], latents)
            continue
        assert noise.numel() == 512
        assert noise.std().item() == pytest.approx(deviation, rel=0.15)  # five standard deviations
        assert noise.mean().item() == pytest.approx(0.0, abs=0.07)


def test_it_begins_with_stage_1_without_its_auxiliary_decoders(tmp_path: Path) -> None:
    targets = {"hog": partial(HOGTarget, cell_size=4)}
    objective = ReconstructionObjective(LossWeights(1.0, 0.0, 0.5), discriminator_start=0)
    stage_1 = task(tokenizer=tokenizer(), objective=objective, targets=targets)
    trainer = fit(stage_1, tmp_path, 3)
    trainer.save_checkpoint(tmp_path / "stage1.ckpt")
    model = finetuning(InitFrom(str(tmp_path / "stage1.ckpt")), adversarial=0.5)
    averaged = stage_1.averaged_model.tokenizer.state_dict()
    for name, value in model.model.tokenizer.state_dict().items():
        assert torch.equal(value, averaged[name])
        assert torch.equal(model.averaged_model.tokenizer.state_dict()[name], averaged[name])
    for name, value in model.discriminator.state_dict().items():
        assert torch.equal(value, stage_1.discriminator.state_dict()[name])
    assert any("auxiliary" in name for name in stage_1.state_dict())
    assert not any("auxiliary" in name for name in model.state_dict())
    plain = task(tokenizer=tokenizer(), adversarial=0.0, targets=targets)
    fit(plain, tmp_path, 1).save_checkpoint(tmp_path / "plain.ckpt")
    finetuning(InitFrom(str(tmp_path / "plain.ckpt")), adversarial=0.5)  # the checkpoint need not hold a discriminator
    raw = finetuning(InitFrom(str(tmp_path / "stage1.ckpt"), "model.tokenizer."))
    assert torch.equal(raw.model.tokenizer.decoder.output.weight, stage_1.model.tokenizer.decoder.output.weight)


def test_a_stage_2_checkpoint_can_be_begun_with_as_well(tmp_path: Path) -> None:
    model = finetuning()
    fit(model, tmp_path, 2).save_checkpoint(tmp_path / "stage2.ckpt")
    again = tokenizer()
    InitFrom(str(tmp_path / "stage2.ckpt")).load(again)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), model.reconstruct(images))
