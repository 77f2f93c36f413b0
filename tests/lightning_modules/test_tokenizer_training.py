"""The task of stage 1: the networks that it builds, its steps, the weights that it trains, and its logs."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_modules import ConstantWithWarmup, CosineWithWarmup, TokenizerTraining
from lightning_modules.optimization import Optimization
from maetok.networks import MaskRatio
from tests.support.tokenizer_training import Noise, fit, task


class CountBatches(Callback):
    """Counts micro-batches."""

    batches = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.batches += 1


def test_steps_are_generator_steps_whatever_the_optimizers_and_micro_batches(tmp_path: Path) -> None:
    counter = CountBatches()
    model = task(accumulate_grad_batches=3)
    trainer = fit(model, tmp_path, 4, counter)
    assert trainer.global_step == 4
    assert counter.batches == 12
    for optimizer in trainer.optimizers:
        assert {int(state["step"]) for state in optimizer.state.values()} == {4}
    assert [config.scheduler.last_epoch for config in trainer.lr_scheduler_configs] == [4, 4]


def test_discriminator_is_not_run_before_its_start_and_frozen_for_the_generator(tmp_path: Path) -> None:
    model = task(start=2)
    before = {name: value.clone() for name, value in model.discriminator.named_parameters()}
    fit(model, tmp_path, 2)
    assert model.discriminator.calls == []
    assert all(torch.equal(before[name], value) for name, value in model.discriminator.named_parameters())
    model = task(start=2)
    fit(model, tmp_path, 4)
    # for each of two steps: 4 fakes while frozen, then 8 images, real and fake, while training
    assert model.discriminator.calls == [(4, False), (8, True)] * 2


def test_a_task_can_be_trained_again_after_its_discriminator_was_frozen(tmp_path: Path) -> None:
    model = task(start=2)
    fit(model, tmp_path, 1)
    trainer = fit(model, tmp_path, 3)
    assert {int(state["step"]) for state in trainer.optimizers[1].state.values()} == {1}


def test_a_discriminator_schedule_that_needs_an_end_is_refused_without_one(tmp_path: Path) -> None:
    constant = Optimization(partial(torch.optim.AdamW, lr=1e-3), ConstantWithWarmup)
    with pytest.raises(ValueError, match="a cosine schedule needs a known number of steps, got -1"):
        fit(task(autoencoder_optimization=constant), tmp_path, -1)


def test_without_adversarial_weight_there_is_no_discriminator(tmp_path: Path) -> None:
    model = task(adversarial=0.0)
    assert model.discriminator is None
    trainer = fit(model, tmp_path, 1)
    assert len(trainer.optimizers) == 1
    assert not any("discriminator" in name for name in trainer.callback_metrics)


def test_accumulation_equals_one_large_batch(tmp_path: Path) -> None:
    """Two micro-batches of four and one of eight give the same gradients, and the same weights after a step of SGD."""

    class Pairs(Noise):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            batches = super().__iter__()
            while True:
                pair = [next(batches), next(batches)]
                yield {key: torch.cat([batch[key] for batch in pair]) for key in pair[0]}

    results = []
    for accumulate, data in ((2, Noise()), (1, Pairs())):
        # no clipping: it would hide a wrong scale of the gradient
        sgd = Optimization(partial(torch.optim.SGD, lr=0.01), ConstantWithWarmup, gradient_clip=0.0)
        options = {"autoencoder_optimization": sgd, "mask_ratio": MaskRatio(0.0, 0.0), "adversarial": 0.0}
        model = task(accumulate_grad_batches=accumulate, **options)
        trainer = Trainer(
            accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(model, DataLoader(data, batch_size=None))
        results.append(model.model.state_dict())
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=1e-6, rtol=1e-5)


def test_gradient_is_clipped_to_the_given_norm(tmp_path: Path) -> None:
    sgd = Optimization(partial(torch.optim.SGD, lr=1.0), ConstantWithWarmup, gradient_clip=1e-3)
    model = task(autoencoder_optimization=sgd, adversarial=0.0)
    before = torch.nn.utils.parameters_to_vector(model.model.parameters()).clone()
    trainer = fit(model, tmp_path, 1)
    moved = (torch.nn.utils.parameters_to_vector(model.model.parameters()) - before).norm()
    torch.testing.assert_close(moved, torch.tensor(1e-3), rtol=1e-2, atol=0)
    assert trainer.callback_metrics["gradient_norm/autoencoder"] > 1e-2  # the logged norm is the norm before clipping


def test_everything_is_logged_against_the_generator_step(tmp_path: Path) -> None:
    trainer = fit(task(), tmp_path, 3)
    expected = {
        *(
            f"train/{name}"
            for name in ("loss", "reconstruction", "adversarial", "adaptive_weight", "hog", "mask_ratio")
        ),
        *(f"discriminator/{name}" for name in ("adversarial", "lecam", "real_logits", "fake_logits")),
        *(
            f"{kind}/{network}"
            for kind in ("gradient_norm", "learning_rate")
            for network in ("autoencoder", "discriminator")
        ),
        "step",
    }
    assert expected <= trainer.callback_metrics.keys()
    assert trainer.callback_metrics["step"] == 3
    assert trainer.callback_metrics["train/mask_ratio"] == 0.5  # 2 of 4 patches


def test_loss_is_the_weighted_sum_of_its_terms(tmp_path: Path) -> None:
    trainer = fit(task(target_weights={"hog": 0.25}), tmp_path, 1)
    value = {name.removeprefix("train/"): float(number) for name, number in trainer.callback_metrics.items()}
    expected = value["reconstruction"] + 0.5 * value["adaptive_weight"] * value["adversarial"] + 0.25 * value["hog"]
    assert value["loss"] == pytest.approx(expected, rel=1e-5)


def test_average_is_used_for_reconstruction_and_follows_training(tmp_path: Path) -> None:
    model = task(ema_decay=0.5)
    images = torch.rand(2, 3, 16, 16)
    start = model.reconstruct(images)
    with torch.no_grad():
        for parameter in model.model.parameters():
            parameter.add_(0.1)
    assert torch.equal(model.reconstruct(images), start)
    fit(model, tmp_path, 2)
    assert not torch.equal(model.reconstruct(images), start)
    assert not model.ema.network.training
    assert model.encode(images).shape == (2, 2, 4)


def test_checkpoint_holds_trained_networks_and_average_only() -> None:
    parts = {name.split(".")[0] for name in task().state_dict()}
    assert parts == {"model", "ema", "discriminator", "objective"}


def test_training_reduces_the_loss_of_a_fixed_image(tmp_path: Path) -> None:
    class Fixed(Noise):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            batch = next(super().__iter__())
            while True:
                yield batch

    model = task(adversarial=0.0, mask_ratio=MaskRatio(0.0, 0.0), ema_decay=0.9)
    images = next(iter(Noise()))["images"]
    before = (model.reconstruct(images) - images).square().mean()
    trainer = Trainer(
        accelerator="cpu", max_steps=150, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, DataLoader(Fixed(), batch_size=None))
    assert (model.reconstruct(images) - images).square().mean() < 0.5 * before


def test_bfloat16_mixed_gives_nearly_the_same_loss(tmp_path: Path) -> None:
    losses = [float(fit(task(), tmp_path, 1, precision=precision).callback_metrics["train/loss"])
              for precision in ("32-true", "bf16-mixed")]  # fmt: skip
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_random_numbers_of_a_sample_do_not_depend_on_the_number_of_processes() -> None:
    def numbers(rank: int, world_size: int, samples: int) -> Tensor:
        fake = SimpleNamespace(
            trainer=SimpleNamespace(world_size=world_size), global_rank=rank, device=torch.device("cpu")
        )
        return TokenizerTraining.uniform_on_host(fake, np.random.default_rng(7), samples, 3)

    alone = numbers(0, 1, 6)
    for rank in range(3):
        assert torch.equal(numbers(rank, 3, 2), alone[rank::3])


def test_views_show_inputs_masks_and_targets() -> None:
    model = task()
    model.trainer = SimpleNamespace(world_size=1, global_rank=0)
    views = model.views(torch.ones(2, 3, 16, 16))
    assert list(views) == ["input", "reconstruction", "masked input", "from masked", "hog", "hog predicted"]
    assert (views["masked input"] == 0).sum() == 2 * 3 * 2 * 64  # two of four patches are grey
    without = task(mask_ratio=MaskRatio(0.0, 0.0))
    without.trainer = model.trainer
    assert list(without.views(torch.ones(2, 3, 16, 16))) == ["input", "reconstruction"]


class TestErrors:
    """An error refuses a config that contradicts itself, and names the keys to change."""

    def test_weight_without_target(self) -> None:
        with pytest.raises(ValueError, match=r"target_weights names \['dino'\], but targets has only \['hog'\]"):
            task(target_weights={"dino": 1.0})

    def test_adversarial_weight_without_discriminator(self) -> None:
        with pytest.raises(ValueError, match=r"weights\.adversarial=0\.5 needs model\.init_args\.discriminator"):
            task(discriminator=None)

    def test_sizes_of_data_and_tokenizer_must_agree(self) -> None:
        model = task()
        strategy, datamodule = SimpleNamespace(root_device=torch.device("cpu")), SimpleNamespace(image_size=(32, 32))
        model.trainer = SimpleNamespace(datamodule=datamodule, strategy=strategy, precision="32-true")
        with pytest.raises(ValueError, match=r"data\.init_args\.image_size=\(32, 32\) but .*image_size=\(16, 16\)"):
            model.setup("fit")

    @pytest.mark.parametrize("precision", ["16-mixed", "bf16-true", "64-true"])
    def test_precisions_that_train_wrongly(self, precision: str) -> None:
        model = task()
        model.trainer = SimpleNamespace(precision=precision)
        with pytest.raises(ValueError, match=rf"trainer\.precision={precision} is not supported"):
            model.setup("fit")

    def test_auxiliary_decoders_need_a_layer(self) -> None:
        with pytest.raises(ValueError, match=r"auxiliary_depth=0 must be at least 1"):
            task(auxiliary_depth=0)

    def test_cosine_needs_an_end(self) -> None:
        with pytest.raises(ValueError, match=r"set trainer\.max_steps"):
            CosineWithWarmup(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), -1)


def test_schedules_by_hand() -> None:
    def rates(schedule: Any, steps: int) -> list[float]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = schedule(optimizer)
        values = []
        for _ in range(steps):
            values.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return values

    cosine = rates(lambda o: CosineWithWarmup(o, 6, warmup_steps=2, final_ratio=0.2), 8)
    expected = [0.5, 1.0, 1.0, 0.2 + 0.8 * 0.5 * (1 + np.cos(np.pi / 4)), 0.6]
    assert cosine[:5] == pytest.approx(expected)
    assert cosine[6:] == pytest.approx([0.2, 0.2])
    assert rates(lambda o: ConstantWithWarmup(o, 6, warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
