"""Another family of tokenizers is one class path in every stage, from training to samples."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule

from maetok.checkpoints.networks import read_records
from maetok.checkpoints.runs import complete_checkpoints
from maetok.formats.latent_cache import LatentCache
from maetok.hub.export import export
from maetok.networks import LatentTokenizer, MaskedAutoencoder
from maetok.training.sharding import shard
from main import MAETokCLI
from tests.extensions.tokenizer_family import ConvolutionalTokenizer
from tests.support.extended_runs import ADVERSARIAL, NO_TARGETS, moved, sample_images, train
from tests.support.helpers import TINY, run

FAMILY = "--model.init_args.tokenizer=tests.extensions.tokenizer_family.ConvolutionalTokenizer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("family")


@pytest.fixture(scope="module")
def stage_1(folder: Path, digits_root: Path) -> MAETokCLI:
    return train(folder / "tokenizer", digits_root, FAMILY, *NO_TARGETS)


@pytest.fixture(scope="module")
def stage_2(stage_1: MAETokCLI, folder: Path, digits_root: Path) -> MAETokCLI:
    optimization = TINY.parents[1] / "optimization" / "digits.yaml"
    return run(
        "fit",
        "digits_decoder",
        folder / "decoder",
        digits_root,
        FAMILY,
        f"--shared.tokenizer_run={folder / 'tokenizer'}",
        f"--model.init_args.discriminator_optimization={optimization}",
        f"{ADVERSARIAL}.adversarial=0.1",  # its weight asks for the gradient at the last layer
        overlay=f"--config={TINY.with_name('tiny_decoder.yaml')}",
    )


@pytest.fixture(scope="module")
def cache(stage_1: MAETokCLI, folder: Path, digits_root: Path) -> Path:
    run(
        "predict",
        "digits_latents",
        folder / "latents",
        digits_root,
        FAMILY,
        f"--shared.tokenizer_run={folder / 'tokenizer'}",
        f"--shared.cache={folder / 'cache'}",
        overlay=f"--config={TINY.with_name('tiny_latents.yaml')}",
    )
    return folder / "cache"


def test_it_keeps_the_contract_and_trains_masked_in_stage_1(stage_1: MAETokCLI, folder: Path) -> None:
    tokenizer, images = stage_1.model.model.tokenizer, sample_images()
    assert isinstance(tokenizer, LatentTokenizer)
    assert tokenizer.latent_grid == (8, 8)
    everything = {f"model.tokenizer.{name}" for name, _ in tokenizer.named_parameters()}
    assert moved(stage_1, folder / "tokenizer", "model.") == everything
    reconstructions = stage_1.model.reconstruct(images)
    average = stage_1.model.averaged_model.tokenizer
    assert torch.equal(reconstructions, average.decoder(average.encoder(images)))
    masked = stage_1.model.views(images)["from masked"]
    assert not torch.equal(masked, reconstructions)
    record = read_records(complete_checkpoints(folder / "tokenizer")[-1])["tokenizer"]
    assert record.class_path == "tests.extensions.tokenizer_family.ConvolutionalTokenizer"
    assert record.init_args["image_size"] == 64


def test_stage_2_trains_its_decoder_alone(stage_1: MAETokCLI, stage_2: MAETokCLI, folder: Path) -> None:
    tokenizer = stage_2.model.model.tokenizer
    decoder = {f"model.tokenizer.decoder.{name}" for name, _ in tokenizer.decoder.named_parameters()}
    assert moved(stage_2, folder / "decoder", "model.") == decoder
    first = stage_1.model.averaged_model.tokenizer
    assert tokenizer.latents_hash() == first.latents_hash()
    assert not torch.equal(tokenizer.decoder[0].weight, first.decoder[0].weight)
    assert stage_2.model.ema.network.tokenizer.encoder is tokenizer.encoder
    assert not tokenizer.encoder.training
    assert tokenizer.decoder.training


def test_its_latents_are_cached(stage_1: MAETokCLI, cache: Path) -> None:
    opened, tokenizer = LatentCache(cache), stage_1.model.averaged_model.tokenizer
    assert json.loads((cache / "manifest.json").read_text())["tokenizer_hash"] == tokenizer.latents_hash()
    batch = next(iter(stage_1.datamodule.evaluation_dataloader("validation", 4)))
    images = batch["images"][:4].float() / 127.5 - 1
    cached = opened.latents("validation", batch["indices"][:4].numpy())
    assert cached.shape == (4, 64, 4)
    np.testing.assert_allclose(cached, tokenizer.encode(images).detach().numpy(), atol=2e-3)  # float16


def test_a_denoiser_trains_and_samples_on_it(stage_2: MAETokCLI, cache: Path, folder: Path, digits_root: Path) -> None:
    cli = run(
        "fit",
        "digits_sit",
        folder / "sit",
        digits_root,
        FAMILY,
        f"--shared.decoder_run={folder / 'decoder'}",
        "--model.init_args.denoiser.init_args.latent_tokens=64",
        "--model.init_args.denoiser.init_args.latent_channels=4",
        overlay=f"--config={TINY.with_name('tiny_diffusion.yaml')}",
    )
    tokenizer = cli.model.frozen_tokenizer()
    trained = stage_2.model.averaged_model.tokenizer
    assert isinstance(tokenizer, ConvolutionalTokenizer)
    for name, value in trained.state_dict().items():  # decoder of the average, encoder of the network
        assert torch.equal(value, tokenizer.state_dict()[name]), name
    with torch.no_grad():
        images = cli.model.sample(torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert images.shape == (2, 3, 64, 64)


def test_the_hub_says_that_it_has_no_published_format(stage_2: MAETokCLI, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"ConvolutionalTokenizer: only Tokenizer and SiT have a published format"):
        export(folder / "decoder", folder / "exported")


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_its_blocks_are_sharded() -> None:
    model = MaskedAutoencoder(ConvolutionalTokenizer(), {})
    images = sample_images(32)
    expected = model(images).reconstructions
    shard(model, init_device_mesh("cpu", (1,)), torch.device("cpu"))
    units = {name for name, module in model.named_modules() if isinstance(module, FSDPModule)}
    assert units == {f"tokenizer.{name}" for name in ("encoder", "encoder.1", "decoder", "decoder.1")}
    assert torch.equal(model(images).reconstructions, expected)


def test_targets_need_an_auxiliary_decoder() -> None:
    with pytest.raises(ValueError, match=r"target_weights names \['hog'\], but ConvolutionalTokenizer offers no"):
        MaskedAutoencoder(ConvolutionalTokenizer(), {"hog": 9})
