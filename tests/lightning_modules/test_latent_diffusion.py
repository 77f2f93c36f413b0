"""Stage 3: the training step, normalisation, averages, validation, continued runs and two processes."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from callbacks import ResumableCheckpoint
from callbacks.resilience.checkpointing import resolve_checkpoint
from datamodules import Digits, Loading, SampleLabels
from datamodules.shards import ShardError
from lightning_modules import DenoiserFrom, LatentDiffusion, Sampling
from maetok import SiT
from maetok.checkpoints.runs import InitFrom
from maetok.flow import Euler, EulerMaruyama, FlowObjective, LogitNormalTime, index_noise
from maetok.hub import write_statistics
from maetok.metrics import to_uint8
from maetok.networks import Denoiser, TransformerSize
from maetok.networks.layers.network import Recomputed
from maetok.training.ema import EMA
from tests.support.diffusion import (
    CLASSES,
    Recorder,
    denoiser,
    diffusion,
    diffusion_cache,
    latent_shards,
    optimization,
    tokenizer,
    trainer,
)
from tests.support.helpers import RecordScalars, StopAt, run_subprocess, scalars


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusion_cache(tmp_path_factory.mktemp("diffusion"))


def numbers_of(seed: int, step: int, micro_step: int, rows: int) -> Tensor:
    """Return the uniform numbers (rows, 2) that the task draws for a micro-batch."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, step, micro_step, 0]))
    return torch.from_numpy(rng.random((rows, 2), dtype=np.float32))


def test_loss_of_a_step_is_the_objective_of_normalised_latents_noise_and_dropped_labels(
    cache: Path, tmp_path: Path
) -> None:
    recorder, objective = Recorder(), FlowObjective(time=LogitNormalTime(), cosine_weight=1.0)
    model = diffusion(objective=objective, label_dropout=0.5, accumulate_grad_batches=2)
    trainer(tmp_path, 3, recorder).fit(model, datamodule=latent_shards(cache))
    manifest = json.loads((cache / "manifest.json").read_text())["splits"]["train"]
    mean, std = torch.tensor(manifest["mean"]), torch.tensor(manifest["std"])
    network, dropped = denoiser(), []
    assert len(recorder.losses) == 6
    for number, (batch, state, loss) in enumerate(zip(recorder.batches, recorder.states, recorder.losses, strict=True)):
        network.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("denoiser.")})
        uniform = numbers_of(5, number // 2, number % 2, 6)
        labels = torch.where(uniform[:, 1] < 0.5, CLASSES, batch["labels"])
        dropped += (labels == CLASSES).tolist()
        noise = index_noise(5, torch.arange(6 * number, 6 * number + 6), shape=(3, 4))
        latents = (batch["latents"] - mean) / std
        losses, _ = objective.loss(network, latents, noise, uniform[:, 0], labels)
        assert losses.mean().item() == pytest.approx(loss, rel=1e-6)
    assert 8 < sum(dropped) < 28


@pytest.mark.parametrize(("probability", "shares"), [(0.0, (0.0, 0.0)), (1.0, (1.0, 1.0)), (0.1, (0.05, 0.15))])
def test_labels_are_dropped_with_the_given_probability(
    cache: Path, tmp_path: Path, probability: float, shares: tuple[float, float]
) -> None:
    model, seen = diffusion(label_dropout=probability), []
    model.denoiser.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    trainer(tmp_path, 4).fit(model, datamodule=latent_shards(cache, batch_size=100))
    share = (torch.cat(seen) == CLASSES).float().mean().item()
    assert shares[0] <= share <= shares[1]


def test_statistics_of_a_cache_are_saved_and_restored(cache: Path, tmp_path: Path) -> None:
    model = diffusion()
    fitted = trainer(tmp_path, 1)
    fitted.fit(model, datamodule=latent_shards(cache))
    fitted.save_checkpoint(tmp_path / "one.ckpt")
    data = latent_shards(cache, batch_size=20)
    stored = np.concatenate([data.index("train").mapped(shard) for shard in range(3)]).view(np.float32)
    values = stored.reshape(-1, 4).astype(np.float64)
    np.testing.assert_allclose(model.normalizer.mean, values.mean(0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(model.normalizer.std, values.std(0), rtol=1e-6)
    again = diffusion(denoiser_from=DenoiserFrom(str(tmp_path / "one.ckpt")))
    assert torch.equal(again.normalizer.mean, model.normalizer.mean)
    assert torch.equal(again.normalizer.std, model.normalizer.std)
    for name, value in model.emas[0].network.state_dict().items():
        assert torch.equal(again.averaged_denoiser.state_dict()[name], value)
        assert torch.equal(again.denoiser.state_dict()[name], value)
    validated = diffusion()
    trainer(tmp_path, 1).validate(validated, latent_shards(cache), tmp_path / "one.ckpt", verbose=False)
    assert torch.equal(validated.normalizer.std, model.normalizer.std)


def test_statistics_of_a_published_model_are_kept(cache: Path, tmp_path: Path) -> None:
    mean, std = torch.arange(4.0), torch.arange(4.0) + 1
    denoiser().save_pretrained(tmp_path / "sit")
    write_statistics(tmp_path / "sit", mean, std)
    model = diffusion(denoiser=SiT.from_pretrained(tmp_path / "sit"), statistics_from=str(tmp_path / "sit"))
    trainer(tmp_path, 1).fit(model, datamodule=latent_shards(cache))
    assert torch.equal(model.normalizer.mean, mean)
    assert torch.equal(model.normalizer.std, std)
    write_statistics(tmp_path / "sit", torch.zeros(5), torch.ones(5))
    with pytest.raises(ValueError, match=r"statistics of \(5,\) for latents of \(4,\)"):
        diffusion(statistics_from=str(tmp_path / "sit"))


def test_statistics_of_images_are_those_of_their_latents(tmp_path: Path, digits_root: Path) -> None:
    """The task measures 100 digits, in batches of 30: the last batch is smaller."""
    data = Digits(str(digits_root), 8, batch_size=4, evaluation_batch_size=30, loading=Loading(num_workers=0))
    model = diffusion(statistics_samples=100)
    trainer(tmp_path, 1, limit_val_batches=0).fit(model, datamodule=data)
    assert data.position == 4  # measuring does not advance the training position
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.evaluation_dataloader("train", 100)]
    images = torch.cat([batch["images"][batch["valid"]] for batch in batches])
    assert len(images) == 100
    values = tokenizer().eval().encode(images).detach().double().flatten(0, 1)
    torch.testing.assert_close(model.normalizer.mean, values.mean(0).float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.normalizer.std, values.std(0, correction=0).float(), rtol=1e-5, atol=0)
    latents = model.encode(images)
    normalized = model.normalizer.normalize(latents)
    torch.testing.assert_close(normalized.flatten(0, 1).mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(normalized.flatten(0, 1).std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(model.normalizer.denormalize(normalized), latents, atol=1e-6, rtol=1e-5)


def test_moving_averages_follow_their_formula(cache: Path, tmp_path: Path) -> None:
    decays, recorder = (0.0, 0.2, 0.9999), Recorder()
    model = diffusion(ema_decays=decays)
    trainer(tmp_path, 5, recorder).fit(model, datamodule=latent_shards(cache))
    trained = [*recorder.states, model.state_dict()]
    for number, decay in enumerate(decays):
        name = "blocks.0.attn.qkv.weight"
        expected = trained[0][f"denoiser.{name}"].double()
        for step, state in enumerate(trained[1:], 1):
            kept = min(decay, (1 + step) / (10 + step))
            expected = kept * expected + (1 - kept) * state[f"denoiser.{name}"].double()
            torch.testing.assert_close(state[f"emas.{number}.network.{name}"].double(), expected, rtol=1e-5, atol=1e-7)
    assert model.averaged_denoiser is model.emas[0].network


def validation(model: LatentDiffusion, cache: Path, folder: Path, batch_size: int) -> dict[str, float]:
    """Return the validation metrics of the current weights."""
    manifest = json.loads((cache / "manifest.json").read_text())["splits"]["train"]
    model.normalizer.set_statistics(torch.tensor(manifest["mean"]), torch.tensor(manifest["std"]))
    data = latent_shards(cache, evaluation_batch_size=batch_size)
    return trainer(folder, 1).validate(model, datamodule=data, verbose=False)[0]


def test_validation_loss_is_that_of_fixed_times_and_noise(cache: Path, tmp_path: Path) -> None:
    model = diffusion(validation_bins=4)
    found = validation(model, cache, tmp_path, 23)
    batch = next(iter(latent_shards(cache, evaluation_batch_size=23).val_dataloader()))
    latents = model.normalizer.normalize(batch["latents"])
    noise, bins = index_noise(0, torch.arange(23), shape=(3, 4)), torch.arange(23) % 4
    losses = FlowObjective().losses_at(model.averaged_denoiser, latents, noise, (bins + 0.5) / 4, batch["labels"])
    assert found["validation/diffusion_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    for number, time in enumerate(("0.125", "0.375", "0.625", "0.875")):
        assert found[f"validation_loss_at/{time}"] == pytest.approx(losses[bins == number].mean().item(), rel=1e-6)
    for batch_size in (1, 5):
        assert validation(model, cache, tmp_path, batch_size) == pytest.approx(found, rel=1e-6)
    with_cosine = diffusion(validation_bins=4, objective=FlowObjective(cosine_weight=1.0), seed=9)
    assert validation(with_cosine, cache, tmp_path, 4) == pytest.approx(found, rel=1e-6)  # comparable between runs
    sparse = validation(diffusion(validation_bins=50), cache, tmp_path, 23)
    assert sum(name.startswith("validation_loss_at/") for name in sparse) == 23
    assert sparse["validation/diffusion_loss"] > 0


def test_a_stopped_run_continues_bit_for_bit(cache: Path, tmp_path: Path) -> None:
    def part(folder: Path, *callbacks: Callback, last: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        model = diffusion(ema_decays=(0.5, 0.9), accumulate_grad_batches=2, label_dropout=0.3)
        fitted = trainer(folder, 6, ResumableCheckpoint(3), RecordScalars(), *callbacks, enable_checkpointing=True)
        path = resolve_checkpoint("last", folder, "fit") if last else None
        fitted.fit(model, datamodule=latent_shards(cache), ckpt_path=path)

    part(tmp_path / "whole")
    part(tmp_path / "parts", StopAt(3))
    assert not (tmp_path / "parts" / "checkpoints" / "step=000000006.ckpt").exists()
    part(tmp_path / "parts", last=True)
    whole, parts = scalars(tmp_path / "whole"), scalars(tmp_path / "parts")
    assert len(whole) == len(parts) == 12  # micro-batches
    for expected, found in zip(whole, parts, strict=True):
        common = expected.keys() & found.keys()  # some values are not logged again right after a restart
        assert {name: expected[name] for name in common} == {name: found[name] for name in common}
        assert {"train/loss", "train/velocity_mse"} <= common
    first, second = (torch.load(tmp_path / name / "checkpoints" / "step=000000006.ckpt") for name in ("whole", "parts"))
    assert {"emas.0", "emas.1"} <= {".".join(name.split(".")[:2]) for name in first["state_dict"]}
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


PROGRAM = """
import sys
from pathlib import Path
import torch
from tests.lightning_modules.test_latent_diffusion import distributed_run
distributed_run(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), 2)
"""


def distributed_run(cache: Path, digits: Path, folder: Path, devices: int) -> None:
    """Take six steps of SGD, validate and measure latents of images; the first process saves weights and metrics."""
    model = diffusion(optimization=optimization("SGD", 0.05), ema_decays=(0.5,), accumulate_grad_batches=2)
    strategy = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    fitted = trainer(folder, 6, **strategy)
    data = latent_shards(cache, evaluation_batch_size=8)
    fitted.fit(model, datamodule=data)
    metrics = fitted.validate(model, datamodule=data, verbose=False)[0]
    if fitted.is_global_zero:
        torch.save((model.state_dict(), metrics), folder / f"{devices}.pt")
    on_images = diffusion(statistics_samples=101)  # no multiple of the batch size
    data = Digits(str(digits), 8, batch_size=4, evaluation_batch_size=30, loading=Loading(num_workers=0))
    trainer(folder, 1, limit_val_batches=0, **strategy).fit(on_images, datamodule=data)
    if fitted.is_global_zero:
        torch.save(on_images.normalizer.state_dict(), folder / f"statistics_{devices}.pt")


def test_two_processes_train_and_validate_as_one(cache: Path, tmp_path: Path, digits_root: Path) -> None:
    """This uses SGD, because AdamW turns rounding noise into large steps."""
    distributed_run(cache, digits_root, tmp_path, 1)
    run_subprocess(PROGRAM, tmp_path, str(cache), str(digits_root), str(tmp_path))
    statistics = [torch.load(tmp_path / f"statistics_{devices}.pt") for devices in (1, 2)]
    for name in ("mean", "std"):
        torch.testing.assert_close(statistics[1][name], statistics[0][name], atol=1e-6, rtol=1e-6)
    (one, metrics_one), (two, metrics_two) = (torch.load(tmp_path / f"{devices}.pt") for devices in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-6, rtol=1e-6)
    assert metrics_two == pytest.approx(metrics_one, rel=1e-5)
    moved = max((one[f"denoiser.{name}"] - value).abs().max().item() for name, value in denoiser().named_parameters())
    assert moved > 1e-3  # training has moved the weights, so equality proves something


def test_switches_reach_the_denoiser_that_trains_and_the_one_that_samples() -> None:
    model = diffusion(compile=True, activation_checkpointing=True)
    model.configure_model()
    assert all(isinstance(block, Recomputed) and block.recomputes for block in model.denoiser.blocks())
    for network in (model.denoiser, model.averaged_denoiser):
        assert all(block._compiled_call_impl for block in network.blocks)


class Counting(Denoiser):
    """Counts the rows of its inputs."""

    def __init__(self) -> None:
        super().__init__(3, 4, CLASSES)
        self.scale = torch.nn.Parameter(torch.tensor(0.5))
        self.rows: list[int] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.rows.append(len(x))
        return self.scale * x


@pytest.mark.parametrize(
    ("interval", "scale", "rows"),
    [((0.0, 1.0), 1.0, 1.0), ((0.0, 1.0), 2.0, 2.0), ((0.0, 0.5), 2.0, 1.5), ((0.525, 1.0), 2.0, 1.5)],
)
@pytest.mark.parametrize("solver", ["Euler", "EulerMaruyama"])
def test_guidance_costs_no_more_rows_than_its_interval(
    interval: tuple[float, float], scale: float, rows: float, solver: str
) -> None:
    made = Euler(20) if solver == "Euler" else EulerMaruyama(20, last=0.05)
    model = diffusion(denoiser=Counting(), sampling=Sampling(made, scale, interval))
    images = model.sample(torch.arange(4), torch.arange(4))
    counted = model.averaged_denoiser.rows
    assert (images.shape, images.requires_grad, len(counted)) == ((4, 3, 8, 8), False, 20)
    assert sum(counted) == 4 * 20 * rows


def test_samples_are_decoded_from_denormalised_latents() -> None:
    """Predicts v = x / 2 without parameters, so each Euler step multiplies by 1 - 1 / (2 steps)."""
    model = diffusion(denoiser=Counting(), sampling=Sampling(Euler(4), seed=7))
    model.normalizer.set_statistics(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 1.0, 2.0, 3.0]))
    latents = index_noise(7, [3, 9], shape=(3, 4)) * (1 - 1 / 8) ** 4
    latents = latents * model.normalizer.std + model.normalizer.mean
    expected = tokenizer().eval().decode(latents)
    torch.testing.assert_close(model.sample(torch.tensor([0, 1]), torch.tensor([3, 9])), expected, atol=1e-5, rtol=0)
    batch = {
        "labels": torch.tensor([0, 1, 0]),
        "indices": torch.tensor([3, 9, -1]),
        "valid": torch.tensor([1, 1, 0]) > 0,
    }
    pixels = (expected.clamp(-1, 1) + 1) * 127.5
    assert (model.predict_step(batch, 0) - pixels.permute(0, 2, 3, 1)).abs().max() <= 0.501


@pytest.mark.parametrize("width", [16, 8])
def test_a_denoiser_of_another_size_guides(cache: Path, tmp_path: Path, width: int) -> None:
    """One Euler step from t = 1 follows v = v_guide + 2 (v - v_guide); the guide has its own weights."""
    smaller = partial(denoiser, size=TransformerSize(width, 1, 2))
    fitted = trainer(tmp_path, 2)
    fitted.fit(diffusion(denoiser=smaller()), datamodule=latent_shards(cache))
    fitted.save_checkpoint(tmp_path / "guide.ckpt")
    source, sampling = DenoiserFrom(str(tmp_path / "guide.ckpt")), Sampling(Euler(1), 2.0)
    model = diffusion(guide_from=source, guide=smaller() if width != 16 else None, sampling=sampling)
    guide = source.loaded_copy(smaller())
    labels, t, noise = torch.tensor([1, 2]), torch.ones(2), index_noise(0, [0, 1], shape=(3, 4))
    away, towards = (network(noise, t, labels) for network in (guide, model.averaged_denoiser))
    expected = model.decode(model.normalizer.denormalize(noise - (away + 2 * (towards - away))))
    torch.testing.assert_close(model.sample(labels, torch.arange(2)), expected, atol=1e-5, rtol=1e-5)
    guide.save_pretrained(tmp_path / "published")
    published = diffusion(guide=SiT.from_pretrained(tmp_path / "published"), sampling=sampling)
    torch.testing.assert_close(published.sample(labels, torch.arange(2)), expected, atol=1e-5, rtol=1e-5)


def test_a_denoiser_without_labels_trains_validates_and_samples(cache: Path, tmp_path: Path) -> None:
    recorder, network = Recorder(), denoiser(num_classes=None)
    model = diffusion(denoiser=denoiser(num_classes=None), ema_decays=(0.5,))
    trainer(tmp_path, 3, recorder).fit(model, datamodule=latent_shards(cache))
    for number, (batch, state, loss) in enumerate(zip(recorder.batches, recorder.states, recorder.losses, strict=True)):
        network.load_state_dict({k[9:]: v for k, v in state.items() if k.startswith("denoiser.")})
        noise = index_noise(5, torch.arange(6 * number, 6 * number + 6), shape=(3, 4))
        times, latents = numbers_of(5, number, 0, 6)[:, 0], model.normalizer.normalize(batch["latents"])
        losses, _ = FlowObjective().loss(network, latents, noise, times, None)
        assert losses.mean().item() == pytest.approx(loss, rel=1e-6)
    assert validation(model, cache, tmp_path, 5) == pytest.approx(validation(model, cache, tmp_path, 23), rel=1e-6)
    indices = torch.arange(3)
    images = model.sample(indices, indices)
    assert torch.equal(model.sample(None, indices), images)
    data = SampleLabels(3, num_classes=None, batch_size=2, block=2)
    model.statistics_from = "nowhere"  # pretend that the denoiser has trained weights
    found = torch.cat(trainer(tmp_path, 1).predict(model, datamodule=data))
    torch.testing.assert_close(found, to_uint8(images).permute(0, 2, 3, 1), atol=1, rtol=0)


def test_guidance_without_labels_needs_a_guide(tmp_path: Path) -> None:
    sampling, network = Sampling(Euler(2), 2.0), denoiser(num_classes=None)
    with pytest.raises(ValueError, match=r"sampling\.guidance_scale=2\.0, but the denoiser has no null condition"):
        diffusion(denoiser=network, sampling=sampling)
    model, indices = diffusion(denoiser=network, sampling=Sampling(Euler(2))), torch.arange(2)
    with pytest.raises(ValueError, match=r"num_classes: null.*set guidance_scale to 1, or give a guide"):
        model.sample(None, indices, guidance_scale=2.0)
    denoiser(num_classes=None).save_pretrained(tmp_path)
    guide = SiT.from_pretrained(tmp_path)
    with torch.no_grad():
        guide.final_layer.linear.weight.mul_(0.5)
    guided = diffusion(denoiser=network, guide=guide, sampling=sampling)
    assert not torch.equal(guided.sample(None, indices), guided.sample(None, indices, guidance_scale=1.0))
    assert torch.equal(guided.sample(None, indices, guidance_scale=1.0), model.sample(None, indices))


def test_guides_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"guide has .* = \(3, 4, 7\), but the denoiser \(3, 4, 10\)"):
        diffusion(guide=denoiser(num_classes=7))
    with pytest.raises(ValueError, match=r"\.guide has no trained weights: set model\.init_args\.guide_from"):
        diffusion(guide=denoiser())


def test_networks_that_do_not_fit_are_refused(cache: Path, tmp_path: Path, digits_root: Path) -> None:
    with pytest.raises(ValueError, match=r"denoiser has \(latent_tokens, latent_channels\) = \(5, 4\), but the tok"):
        diffusion(denoiser=denoiser(latent_tokens=5))
    with pytest.raises(ValueError, match=r"= \(3, 8\), but the tokenizer \(3, 4\): set both to one size"):
        diffusion(denoiser=denoiser(latent_channels=8))
    with pytest.raises(ShardError, match=r"was encoded by tokenizer .* but the task has tokenizer"):
        trainer(tmp_path, 1).fit(diffusion(tokenizer=tokenizer(2)), datamodule=latent_shards(cache))
    with pytest.raises(ValueError, match=r"num_classes=10, but model\.init_args\.denoiser.*=7: set both to one"):
        trainer(tmp_path, 1).fit(diffusion(denoiser=denoiser(num_classes=7)), datamodule=latent_shards(cache))
    with pytest.raises(ValueError, match=r"data\.init_args\.image_size=\(16, 16\) but .*image_size=\(8, 8\)"):
        trainer(tmp_path, 1).fit(diffusion(), datamodule=Digits(str(digits_root), 16))


def test_missing_parts_are_named(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.init_args\.optimization is missing"):
        trainer(tmp_path, 1).fit(diffusion(optimization=None), datamodule=latent_shards(cache))
    with pytest.raises(FileNotFoundError, match="train that run first"):
        diffusion(denoiser_from=DenoiserFrom(str(tmp_path / "none")))
    torch.save({"state_dict": tokenizer().state_dict()}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"prefix='emas\.0\.network\.'"):
        diffusion(guide_from=DenoiserFrom(str(tmp_path / "other.ckpt")))
    with pytest.raises(ValueError, match=r"prefix='ema\.network\.tokenizer\.'"):
        diffusion(init_from=InitFrom(str(tmp_path / "other.ckpt")))


def test_at_least_one_average_is_needed() -> None:
    with pytest.raises(ValueError, match=r"model\.init_args\.ema_decays is empty"):
        diffusion(ema_decays=())


def test_a_decoder_that_was_fine_tuned_keeps_the_cache_valid(cache: Path, tmp_path: Path) -> None:
    other = tokenizer()
    torch.nn.init.normal_(other.decoder.output.weight)
    model = diffusion(tokenizer=other)
    trainer(tmp_path, 1).fit(model, datamodule=latent_shards(cache))
    assert isinstance(model.emas[0], EMA)
    before, after = model.tokenizer.network.state_dict(), other.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
