"""Every YAML builds under a tiny overlay, three train two steps; the ImageNet configs say what the paper says."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules import LatentShards, Loading
from main import MAETokCLI
from tests.support.helpers import EXPERIMENTS, ROOT, printed_config, run

CONFIGS = ROOT / "configs"
ABLATIONS = sorted(path.stem for path in (CONFIGS / "ablation").glob("*.yaml"))
STAGES = ("maetok_b128", "decoder")
TOKENIZERS = ("digits_tokenizer", "imagenet256_maetok_b128", "imagenet512_maetok_b128")
TINY_DECODER, TINY_LATENTS = (
    f"--config={CONFIGS / 'overlay' / f'tiny_{name}.yaml'}" for name in ("decoder", "latents")
)
Train = Callable[[str], MAETokCLI]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, digits_root: Path) -> Train:
    """Return a function that gives the command line of stage 1 after two steps, which it takes when first asked."""
    return cache(lambda name: run("fit", name, tmp_path_factory.mktemp(name), digits_root))


@pytest.fixture
def build(tmp_path: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., MAETokCLI]:
    """Return ``run`` without the training: everything is parsed and built."""

    def built(subcommand: str, name: str, *arguments: str, **options: str) -> MAETokCLI:
        with monkeypatch.context() as patch:
            patch.setattr(MAETokCLI, "_run_subcommand", lambda *_: None)
            return run(subcommand, name, tmp_path, digits_root, *arguments, **options)

    return built


def path_of(trained: MAETokCLI) -> str:
    return f"--model.init_args.init_from.path={trained.trainer.default_root_dir}"


def assert_ran(folder: Path) -> None:
    checkpoint = torch.load(folder / "checkpoints" / "step=000000002.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert list((folder / "pictures").glob("*.png"))
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in events.Scalars("validation/psnr")] == [2]
    assert any(tag.startswith("input | reconstruction") for tag in events.Tags()["images"])


def test_all_configs_are_yaml() -> None:
    paths = sorted(CONFIGS.rglob("*.yaml"))
    assert len(paths) > 30
    assert all(isinstance(yaml.safe_load(path.read_text()), dict) for path in paths)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_build(name: str, build: Callable[..., MAETokCLI]) -> None:
    cli = build("fit", name)
    assert cli.model.model.tokenizer.image_size == cli.datamodule.image_size == (64, 64)
    assert set(cli.model.targets) == ({"hog"} if name.startswith("digits") else {"hog", "dinov2", "siglip"})
    assert (cli.model.discriminator is None) == name.startswith("digits")


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_build(name: str, build: Callable[..., MAETokCLI]) -> None:
    overlay = f"--config={CONFIGS / 'overlay' / 'tiny.yaml'}"
    cli = build("fit", "imagenet256_maetok_b128", f"--config={CONFIGS / 'ablation' / name}.yaml", overlay)
    expected = {
        "ae": set(),
        "kl_vae": set(),
        "mask_pixel": set(),
        "mask_hog": {"hog"},
        "mask_dinov2": {"dinov2"},
        "mask_siglip": {"siglip"},
    }
    assert set(cli.model.targets) == expected.get(name, {"hog", "dinov2", "siglip"})
    assert (cli.model.mask_ratio.high == 0) == (name in ("ae", "kl_vae"))
    assert type(cli.model.model.tokenizer.bottleneck).__name__ == ("KL" if "kl_vae" in name else "Plain") + "Bottleneck"
    assert cli.model.model.tokenizer.mask_mode == ("drop" if name == "mask_drop" else "replace")
    latent_tokens = 256 if name == "latent_tokens_256" else 128
    assert cli.model.model.tokenizer.latent_tokens == latent_tokens


@pytest.mark.parametrize(
    ("experiment", "arguments"),
    [
        ("digits_tokenizer", []),
        ("imagenet512_maetok_b128", [
            "--config={configs}/ablation/kl_vae_mask.yaml", "--config={configs}/ablation/mask_drop.yaml",
            "--config={configs}/overlay/tiny.yaml",
            "--trainer.precision=bf16-mixed", "--model.init_args.activation_checkpointing=true",
        ]),
        ("imagenet256_maetok_b128", [
            "--model.init_args.discriminator={configs}/discriminator/patchgan.yaml",
            "--model.init_args.tokenizer.init_args.bottleneck={configs}/bottleneck/softvq.yaml",
            "--model.init_args.objective.init_args.adversarial.form=non_saturating",
            "--model.init_args.objective.init_args.adversarial.consistency_weight=4.0",
        ]),
    ],
    ids=["digits", "variational_drop_bf16", "patchgan_softvq_non_saturating"],
)  # fmt: skip
def test_three_that_cover_the_most_train_two_steps(
    experiment: str, arguments: list[str], tmp_path: Path, digits_root: Path
) -> None:
    run("fit", experiment, tmp_path, digits_root, *(argument.format(configs=CONFIGS) for argument in arguments))
    assert_ran(tmp_path)


def tokenizer_of(name: str) -> str:
    """Return the experiment whose weights another one begins with."""
    config = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    return Path(config["shared"]["tokenizer_run"]).name


@pytest.mark.parametrize("name", ["digits_decoder", "imagenet256_decoder"])
def test_decoders_are_fine_tuned_from_the_tokenizer_that_the_config_names(
    name: str, tmp_path: Path, digits_root: Path, train: Train
) -> None:
    stage_1 = train(tokenizer_of(name))
    before = stage_1.model.averaged_model.tokenizer
    cli = run("fit", name, tmp_path, digits_root, path_of(stage_1), overlay=TINY_DECODER)
    assert_ran(tmp_path)
    assert cli.model.averaged_model.tokenizer.latents_hash() == before.latents_hash()
    assert not torch.equal(cli.model.averaged_model.tokenizer.decoder.output.weight, before.decoder.output.weight)
    assert cli.model.mask_ratio == (0.5 if name.startswith("digits") else 0.6)


def test_the_other_decoder_and_latents_build(build: Callable[..., MAETokCLI], train: Train) -> None:
    stage_1 = train("imagenet256_maetok_b128")
    assert tokenizer_of("imagenet512_decoder") == tokenizer_of("imagenet512_latents") == "imagenet512_maetok_b128"
    decoder = build("fit", "imagenet512_decoder", path_of(stage_1), overlay=TINY_DECODER)
    latents = build("predict", "imagenet512_latents", path_of(stage_1), overlay=TINY_LATENTS)
    assert decoder.model.mask_ratio == 0.6
    expected = stage_1.model.averaged_model.tokenizer.latents_hash()
    assert decoder.model.averaged_model.tokenizer.latents_hash() == latents.model.tokenizer_hash == expected


def test_validating_before_stage_2_measures_the_tokenizer_it_begins_with(
    tmp_path: Path, digits_root: Path, train: Train
) -> None:
    """One command, ``validate``, gives the metrics before stage 2, and after it with ``--ckpt_path last``."""
    stage_1 = train("digits_tokenizer")
    before = run("validate", "digits_decoder", tmp_path, digits_root, path_of(stage_1), overlay=TINY_DECODER)
    expected, found = stage_1.trainer.callback_metrics, before.trainer.callback_metrics
    names = {f"validation/{name}" for name in ("psnr", "ssim", "l1", "linear_probe")}
    assert names <= expected.keys()
    for name in names:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-6), name


def test_dropping_masked_patches_is_an_overlay_on_both_stages_of_a_tokenizer(tmp_path: Path, digits_root: Path) -> None:
    drop = f"--config={CONFIGS / 'ablation' / 'mask_drop.yaml'}"
    trained = run("fit", "digits_tokenizer", tmp_path / "tokenizer", digits_root, drop)
    stage_1 = trained.model.averaged_model.tokenizer
    assert not any(name.endswith("encoder.mask_token") for name, _ in stage_1.named_parameters())
    options = [digits_root, path_of(trained)]
    cli = run("fit", "digits_decoder", tmp_path / "decoder", *options, drop, overlay=TINY_DECODER)
    assert cli.model.model.tokenizer.mask_mode == "drop"
    assert cli.model.averaged_model.tokenizer.latents_hash() == stage_1.latents_hash()
    with pytest.raises(ValueError, match=r"(?s)init_from\.path=.*encoder\.mask_token"):
        run("fit", "digits_decoder", tmp_path / "other", *options, overlay=TINY_DECODER)


@pytest.mark.parametrize("size", [256, 512])
def test_imagenet_decoders_are_the_papers(size: int) -> None:
    """Stage 2 takes 50k steps from mask ratio 0.6, and shares losses, optimizer, data and tokenizer with stage 1."""
    first, second = (printed_config(f"--config={EXPERIMENTS}/imagenet{size}_{name}.yaml") for name in STAGES)
    stage_1, stage_2 = first["model"]["init_args"], second["model"]["init_args"]
    assert (second["trainer"]["max_steps"], stage_2["mask_ratio"], stage_2["latent_noise"]) == (50_000, 0.6, 0.0)
    assert stage_2["init_from"] == {
        "path": f"runs/imagenet{size}_maetok_b128",
        "prefix": "ema.network.tokenizer.",
    }
    for part in ("tokenizer", "autoencoder_optimization", "discriminator", "discriminator_optimization", "ema_decay"):
        assert stage_2[part] == stage_1[part], part
    started = {"discriminator_start": 0}  # the discriminator has learned in stage 1
    assert stage_2["objective"]["init_args"] == stage_1["objective"]["init_args"] | started
    assert second["data"] == first["data"]
    assert second["data"]["init_args"]["batch_size"] == 512


@pytest.mark.parametrize("name", ["digits_latents", "imagenet256_latents"])
def test_latents_of_the_tokenizer_that_the_config_names(
    name: str, tmp_path: Path, digits_root: Path, train: Train
) -> None:
    trained = train(tokenizer_of(name))
    output = f"--trainer.callbacks.output={tmp_path / 'cache'}"
    cli = run("predict", name, tmp_path, digits_root, output, path_of(trained), overlay=TINY_LATENTS)
    assert cli.model.tokenizer_hash == trained.model.averaged_model.tokenizer.latents_hash()
    cached = LatentShards(str(tmp_path / "cache"), num_classes=10, loading=Loading(num_workers=0), batch_size=100)
    images, latents = (next(iter(data.evaluation_dataloader("validation"))) for data in (cli.datamodule, cached))
    pixels = cli.datamodule.on_after_batch_transfer(images, 0)["images"][:100]
    torch.testing.assert_close(
        cached.on_after_batch_transfer(latents, 0)["latents"], trained.model.encode(pixels), atol=2e-3, rtol=2e-3
    )
    assert len(cached.index("train")) == 4000
    assert cached.index("train").variants == (1 if name.startswith("digits") else 2)


@pytest.mark.parametrize("size", [256, 512])
def test_imagenet_configs_are_the_papers(size: int) -> None:
    config = printed_config(f"--config={EXPERIMENTS}/imagenet{size}_maetok_b128.yaml")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    tokenizer = model["tokenizer"]["init_args"]
    assert tokenizer["image_size"] == data["image_size"] == size
    assert (tokenizer["patch_size"], tokenizer["latent_tokens"]) == (16, 128)
    assert tokenizer["bottleneck"]["init_args"]["channels"] == 32
    assert tokenizer["encoder"] == tokenizer["decoder"]
    assert tokenizer["encoder"] == {"width": 768, "depth": 12, "num_heads": 12, "mlp_ratio": 4.0}
    assert (data["batch_size"], trainer["max_steps"], trainer["precision"]) == (512, 500_000, "bf16-mixed")
    for name in ("autoencoder_optimization", "discriminator_optimization"):
        optimizer, schedule = model[name]["optimizer"]["init_args"], model[name]["schedule"]["init_args"]
        assert (optimizer["lr"], optimizer["weight_decay"], optimizer["betas"]) == (1e-4, 1e-4, [0.9, 0.95])
        assert (schedule["warmup_steps"], model[name]["gradient_clip"]) == (10_000, 1.0)
    objective = model["objective"]["init_args"]
    assert objective["weights"] == {"reconstruction": 1.0, "perceptual": 1.0, "adversarial": 0.4}
    assert objective["discriminator_start"] == 30_000
    assert objective["adversarial"]["init_args"]["lecam_weight"] == 0.001
    assert objective["adversarial"]["init_args"]["form"] == "hinge"
    assert model["target_weights"] == {"hog": 1.0, "dinov2": 1.0, "siglip": 1.0}
    assert "dinov2" in model["targets"]["dinov2"]["init_args"]["model_name"]
    assert "siglip" in model["targets"]["siglip"]["init_args"]["model_name"]
    assert model["mask_ratio"]["distribution"] == "uniform"
    assert model["discriminator"]["init_args"]["model_name"] == "vit_small_patch16_224.dino"
    assert (data["horizontal_flip"], data["random_crop_scale"]) == (True, None)
    assert objective["pixel_norm"] == "l2"
    assert objective["perceptual"]["init_args"] == {"net_type": "vgg", "pretrained": True, "checkpoint_path": ""}
    assert (model["mask_ratio"]["low"], model["mask_ratio"]["high"], model["auxiliary_depth"]) == (0.4, 0.6, 3)


def test_imagenet_tokenizer_has_176_million_parameters() -> None:
    """Count encoder, bottleneck and pixel decoder as the config builds them, without any pretrained network."""
    from maetok import Tokenizer

    config = printed_config(f"--config={EXPERIMENTS}/imagenet256_maetok_b128.yaml")
    parser = LightningArgumentParser()
    parser.add_class_arguments(Tokenizer, "tokenizer")
    arguments = config["model"]["init_args"]["tokenizer"]["init_args"]
    with torch.device("meta"):
        built = parser.instantiate_classes(parser.parse_object({"tokenizer": arguments}))
    parameters = sum(parameter.numel() for parameter in built.tokenizer.parameters())
    assert abs(parameters / 176e6 - 1) < 0.03


@pytest.mark.parametrize("name", ["tiny", "small", "base", "large"])
def test_sizes_are_those_of_the_published_names(name: str) -> None:
    from maetok.networks import TransformerSize
    from maetok.networks.tokenizer.published import BACKBONES

    values = yaml.safe_load((CONFIGS / "size" / f"{name}.yaml").read_text())
    assert TransformerSize(**values) == BACKBONES[name]
