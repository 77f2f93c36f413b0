"""Every shipped YAML parses and runs two steps under the tiny overlay; the ImageNet configs say what the paper says."""

from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules import LatentShards, Loading
from main import main
from tests.support.helpers import EXPERIMENTS, ROOT, run

CONFIGS = ROOT / "configs"
ABLATIONS = sorted(path.stem for path in (CONFIGS / "ablation").glob("*.yaml"))
LATENTS = sorted(path.stem for path in EXPERIMENTS.glob("*_latents.yaml"))
STAGES = ("maetok_b128", "decoder")
DECODERS = sorted(path.stem for path in EXPERIMENTS.glob("*_decoder.yaml"))
NAMES = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if "TokenizerTraining" in path.read_text())


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


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


@pytest.mark.parametrize("name", NAMES)
def test_experiments_run_two_steps(name: str, tmp_path: Path, digits_root: Path) -> None:
    run("fit", name, tmp_path, digits_root)
    assert_ran(tmp_path)


def tokenizer_of(name: str) -> str:
    """The experiment whose weights another one begins with."""
    config = yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text())
    return Path(config["model"]["init_args"]["init_from"]["path"]).name


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_are_fine_tuned_from_the_tokenizer_that_the_config_names(
    name: str, tmp_path: Path, digits_root: Path
) -> None:
    before = run("fit", tokenizer_of(name), tmp_path / "tokenizer", digits_root).model.averaged_model.tokenizer
    tiny = f"--config={CONFIGS / 'overlay' / 'tiny_decoder.yaml'}"
    init_from = f"--model.init_args.init_from.path={tmp_path / 'tokenizer'}"
    cli = run("fit", name, tmp_path / "decoder", digits_root, init_from, overlay=tiny)
    assert_ran(tmp_path / "decoder")
    assert cli.model.averaged_model.tokenizer.latents_hash() == before.latents_hash()
    assert not torch.equal(cli.model.averaged_model.tokenizer.decoder.output.weight, before.decoder.output.weight)
    assert cli.model.mask_ratio == (0.5 if name.startswith("digits") else 0.6)


def test_validating_before_stage_2_measures_the_tokenizer_it_begins_with(tmp_path: Path, digits_root: Path) -> None:
    """So metrics before and after come from one command, ``validate``, without and with ``--ckpt_path last``."""
    stage_1 = run("fit", "digits_tokenizer", tmp_path / "tokenizer", digits_root)
    tiny = f"--config={CONFIGS / 'overlay' / 'tiny_decoder.yaml'}"
    init_from = f"--model.init_args.init_from.path={tmp_path / 'tokenizer'}"
    before = run("validate", "digits_decoder", tmp_path / "before", digits_root, init_from, overlay=tiny)
    expected, found = stage_1.trainer.callback_metrics, before.trainer.callback_metrics
    names = {f"validation/{name}" for name in ("psnr", "ssim", "l1", "linear_probe")}
    assert names <= expected.keys()
    for name in names:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-6), name


def test_dropping_masked_patches_is_an_overlay_on_both_stages_of_a_tokenizer(tmp_path: Path, digits_root: Path) -> None:
    drop = f"--config={CONFIGS / 'ablation' / 'mask_drop.yaml'}"
    stage_1 = run("fit", "digits_tokenizer", tmp_path / "tokenizer", digits_root, drop).model.averaged_model.tokenizer
    assert not any(name.endswith("encoder.mask_token") for name, _ in stage_1.named_parameters())
    tiny = f"--config={CONFIGS / 'overlay' / 'tiny_decoder.yaml'}"
    init_from = f"--model.init_args.init_from.path={tmp_path / 'tokenizer'}"
    cli = run("fit", "digits_decoder", tmp_path / "decoder", digits_root, init_from, drop, overlay=tiny)
    assert cli.model.model.tokenizer.mask_mode == "drop"
    assert cli.model.averaged_model.tokenizer.latents_hash() == stage_1.latents_hash()
    with pytest.raises(ValueError, match=r"(?s)init_from\.path=.*encoder\.mask_token"):
        run("fit", "digits_decoder", tmp_path / "other", digits_root, init_from, overlay=tiny)


@pytest.mark.parametrize("size", [256, 512])
def test_imagenet_decoders_are_the_papers(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Stage 2: 50k steps, mask ratio from 0.6, losses, optimiser, data and tokenizer of stage 1."""
    first, second = (printed_config(capsys, f"--config={EXPERIMENTS}/imagenet{size}_{name}.yaml") for name in STAGES)
    stage_1, stage_2 = first["model"]["init_args"], second["model"]["init_args"]
    assert (second["trainer"]["max_steps"], stage_2["mask_ratio"], stage_2["latent_noise"]) == (50_000, 0.6, 0.0)
    assert stage_2["init_from"] == {
        "path": f"runs/imagenet{size}_maetok_b128",
        "prefix": "ema.network.tokenizer.",
    }
    for part in ("tokenizer", "autoencoder_optimization", "discriminator", "discriminator_optimization", "ema_decay"):
        assert stage_2[part] == stage_1[part], part
    started = {"discriminator_start": 0}  # it has learned in stage 1
    assert stage_2["objective"]["init_args"] == stage_1["objective"]["init_args"] | started
    assert second["data"] == first["data"]
    assert second["data"]["init_args"]["batch_size"] == 512


@pytest.mark.parametrize("name", LATENTS)
def test_latents_of_the_tokenizer_that_the_config_names(name: str, tmp_path: Path, digits_root: Path) -> None:
    trained = run("fit", tokenizer_of(name), tmp_path / "run", digits_root)
    cli = main(
        [
            "predict",
            f"--config={EXPERIMENTS / name}.yaml",
            f"--config={CONFIGS / 'overlay' / 'tiny_latents.yaml'}",
            f"--trainer.default_root_dir={tmp_path / 'latents'}",
            f"--trainer.callbacks.output={tmp_path / 'cache'}",
            f"--data.init_args.root={digits_root}",
            f"--model.init_args.init_from.path={tmp_path / 'run'}",
        ]
    )
    assert cli.model.tokenizer_hash == trained.model.averaged_model.tokenizer.latents_hash()
    cache = LatentShards(str(tmp_path / "cache"), num_classes=10, loading=Loading(num_workers=0), batch_size=100)
    images, latents = (next(iter(data.evaluation_dataloader("validation"))) for data in (cli.datamodule, cache))
    pixels = cli.datamodule.on_after_batch_transfer(images, 0)["images"][:100]
    torch.testing.assert_close(
        cache.on_after_batch_transfer(latents, 0)["latents"], trained.model.encode(pixels), atol=2e-3, rtol=2e-3
    )
    assert len(cache.index("train")) == 4000
    assert cache.index("train").variants == (1 if name.startswith("digits") else 2)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_run_two_steps(name: str, tmp_path: Path, digits_root: Path) -> None:
    arguments = [f"--config={CONFIGS / 'ablation' / name}.yaml", f"--config={CONFIGS / 'overlay' / 'tiny.yaml'}"]
    cli = run("fit", "imagenet256_maetok_b128", tmp_path, digits_root, *arguments)
    assert_ran(tmp_path)
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
    "replaced",
    [
        ["--model.init_args.discriminator={configs}/discriminator/patchgan.yaml"],
        ["--model.init_args.tokenizer.init_args.bottleneck={configs}/bottleneck/softvq.yaml"],
        ["--model.init_args.objective.init_args.adversarial.form=non_saturating",
         "--model.init_args.objective.init_args.adversarial.consistency_weight=4.0"],
        ["--trainer.precision=bf16-mixed", "--model.init_args.activation_checkpointing=true"],
    ],
    ids=["patchgan", "softvq", "non_saturating", "bf16"],
)  # fmt: skip
def test_alternatives_run_two_steps(replaced: list[str], tmp_path: Path, digits_root: Path) -> None:
    arguments = [argument.format(configs=CONFIGS) for argument in replaced]
    run("fit", "imagenet256_maetok_b128", tmp_path, digits_root, *arguments)
    assert_ran(tmp_path)


@pytest.mark.parametrize("size", [256, 512])
def test_imagenet_configs_are_the_papers(size: int, capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, f"--config={EXPERIMENTS}/imagenet{size}_maetok_b128.yaml")
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


def test_imagenet_tokenizer_has_176_million_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    """Encoder, bottleneck and pixel decoder as the config builds them, without any pretrained network."""
    from maetok import Tokenizer

    config = printed_config(capsys, f"--config={EXPERIMENTS}/imagenet256_maetok_b128.yaml")
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
