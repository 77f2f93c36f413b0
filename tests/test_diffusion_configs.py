"""Test stage 3 from the command line: experiments train and sample under tiny overlays and state the paper's values."""

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules import LatentDiffusion, Sampling
from maetok import Tokenizer
from maetok.flow import Euler
from maetok.hub.export import export
from main import MAETokCLI, main
from tests.support.helpers import EXPERIMENTS, ROOT, printed_config, run

CONFIGS = ROOT / "configs"
TINY_DIFFUSION, TINY_SAMPLES = (CONFIGS / "overlay" / f"tiny_{name}.yaml" for name in ("diffusion", "samples"))


Train = Callable[[str], tuple[Path, LatentDiffusion]]
DIFFUSIONS = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if "LatentShards" in path.read_text())
TRAINED = ("digits_sit", "imagenet256_lightningdit_xl", "imagenet256_sit_xl")
"""Each network and data set once; the other experiments differ only in numbers that a test compares with the paper."""


def sampling_of(name: str) -> list[str]:
    """Return the configs that sample from an experiment, relative to ``configs`` and without suffix."""
    return ["experiment/digits_samples"] if name == "digits_sit" else [f"experiment/{name}", "overlay/samples"]


def config_of(subcommand: str, *names: str) -> dict:
    return printed_config(*(f"--config={CONFIGS / name}.yaml" for name in names), subcommand=subcommand)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Return checkpoints of untrained tokenizers of the tiny overlays, by their number of latent tokens."""
    folder, size = tmp_path_factory.mktemp("tokenizers"), {"width": 32, "depth": 1, "num_heads": 2}
    parser = LightningArgumentParser()
    parser.add_class_arguments(Tokenizer, "tokenizer")
    for name, tokens in (("digits", 16), ("maetok_b128", 128)):
        arguments = yaml.safe_load((CONFIGS / "tokenizer" / f"{name}.yaml").read_text())["init_args"]
        bottleneck = arguments["bottleneck"]
        if isinstance(bottleneck, str):
            bottleneck = yaml.safe_load((CONFIGS / "tokenizer" / bottleneck).read_text())
        arguments |= {"image_size": 64, "encoder": size, "decoder": size, "bottleneck": bottleneck}
        built = parser.instantiate_classes(parser.parse_object({"tokenizer": arguments})).tokenizer
        state = {f"ema.network.tokenizer.{key}": value for key, value in built.state_dict().items()}
        torch.save({"state_dict": state, "global_step": 0}, folder / f"{tokens}.ckpt")
    return {tokens: folder / f"{tokens}.ckpt" for tokens in (16, 128)}


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory, digits_root: Path, tokenizers: dict[int, Path]) -> Train:
    """Return a function that gives run directory and task after two steps, which it takes when first asked."""

    @cache
    def trained(name: str) -> tuple[Path, LatentDiffusion]:
        folder = tmp_path_factory.mktemp(name)
        init_from = f"--model.init_args.init_from.path={tokenizers[16 if name.startswith('digits') else 128]}"
        return folder, run("fit", name, folder, digits_root, init_from, overlay=f"--config={TINY_DIFFUSION}").model

    return trained


def predict(name: str, output: Path, denoiser: Path, tokenizer: Path, *more: str) -> LatentDiffusion:
    """Sample under the tiny overlay and return the task."""
    return main(
        [
            "predict",
            *(f"--config={CONFIGS / config}.yaml" for config in sampling_of(name)),
            f"--config={TINY_SAMPLES}",
            *more,
            f"--trainer.default_root_dir={output}",
            f"--trainer.callbacks.output={output}",
            f"--model.init_args.denoiser_from.path={denoiser}",
            f"--model.init_args.init_from.path={tokenizer}",
        ]
    ).model


@pytest.mark.parametrize("name", TRAINED)
def test_experiments_train_two_steps(name: str, train: Train) -> None:
    folder, model = train(name)
    checkpoint = torch.load(folder / "checkpoints" / "step=000000002.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    state = checkpoint["state_dict"]
    assert all(value.isfinite().all() for value in state.values())
    assert not torch.equal(state["normalizer.std"], torch.ones_like(state["normalizer.std"]))
    assert {key.split(".")[0] for key in state} == {"denoiser", "emas", "normalizer"}  # no tokenizer
    assert state["denoiser.final_layer.linear.weight"].any()  # it starts at zero
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2]
    assert [event.step for event in events.Scalars("validation/diffusion_loss")] == [2]
    assert events.Tags()["images"] == ["samples: without | with guidance"]
    assert [path.name for path in (folder / "pictures").iterdir()] == ["step=000000002.png"]
    report = json.loads((folder / "metrics.jsonl").read_text())
    assert report["validation/diffusion_loss"] > 0
    assert model.objective.cosine_weight == (1.0 if "lightningdit" in name else 0.0)


def test_the_other_experiments_build(
    tmp_path: Path, digits_root: Path, tokenizers: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MAETokCLI, "_run_subcommand", lambda *_: None)
    init_from = f"--model.init_args.init_from.path={tokenizers[128]}"
    others = set(DIFFUSIONS) - set(TRAINED)
    assert len(others) == 5
    for name in others:
        model = run("fit", name, tmp_path, digits_root, init_from, overlay=f"--config={TINY_DIFFUSION}").model
        assert model.objective.cosine_weight == (1.0 if "lightningdit" in name else 0.0)
        assert type(model.denoiser).__name__ == ("LightningDiT" if "lightningdit" in name else "SiT")
        assert model.tokenizer.network.image_size == (64, 64)


@pytest.mark.parametrize("name", TRAINED)
def test_sampling_finds_the_weights_of_its_denoiser(
    name: str, tmp_path: Path, train: Train, tokenizers: dict[int, Path]
) -> None:
    folder, trained = train(name)
    model = predict(name, tmp_path, folder, tokenizers[16 if name.startswith("digits") else 128])
    for key, value in trained.emas[0].network.state_dict().items():
        assert torch.equal(model.averaged_denoiser.state_dict()[key], value)
    assert torch.equal(model.normalizer.std, trained.normalizer.std)
    identity = json.loads((tmp_path / "sampling.json").read_text())
    assert identity["checkpoint"] == str(folder / "checkpoints" / "step=000000002.ckpt")
    npz = np.load(tmp_path / "samples.npz")
    assert (npz["arr_0"].shape, npz["arr_0"].dtype) == ((6, 64, 64, 3), np.uint8)
    assert npz["labels"].tolist() == list(range(6))
    assert len(list((tmp_path / "images").iterdir())) == 6


def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: Train, tokenizers: dict[int, Path]
) -> None:
    """Run the example word for word on the exports of a run; it generates what the task of the run samples."""
    folder, task = train("digits_sit")
    export(folder, tmp_path / "exported" / "sit")
    task.frozen_tokenizer().save_pretrained(tmp_path / "exported" / "tokenizer")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert 0 < len(code.strip().splitlines()) - len(re.findall(r"^(?:import|from) .*$", code, re.MULTILINE)) < 10
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    values: dict[str, Any] = {"images": images}
    monkeypatch.chdir(tmp_path)
    exec(code, values)
    torch.testing.assert_close(values["latents"], task.encode(images))
    assert (values["normalized"].shape, values["generated"].shape) == ((2, 16, 8), (2, 3, 64, 64))
    monkeypatch.setattr(task, "sampling", Sampling(Euler(50), 1.9, (0.0, 0.75)))
    monkeypatch.setattr("lightning_modules.latent_diffusion.index_noise", lambda *_, **__: values["noise"])
    expected = task.sample(values["labels"], torch.arange(2))
    torch.testing.assert_close(values["generated"], expected, atol=1e-5, rtol=1e-5)


def test_autoguidance_overlay_guides_by_another_checkpoint(
    tmp_path: Path, train: Train, tokenizers: dict[int, Path]
) -> None:
    folder, _ = train("imagenet256_sit_xl")
    guide, key = folder / "checkpoints" / "step=000000001.ckpt", "final_layer.linear.weight"
    more = [f"--config={CONFIGS}/overlay/autoguidance.yaml", f"--config={TINY_SAMPLES}"]
    more += [f"--model.init_args.guide_from.path={guide}"]
    model = predict("imagenet256_sit_xl", tmp_path, folder, tokenizers[128], *more)
    early = torch.load(guide, weights_only=True)["state_dict"]
    assert torch.equal(model.guide.network.state_dict()[key], early[f"emas.0.network.{key}"])
    assert not torch.equal(model.guide.network.state_dict()[key], model.averaged_denoiser.state_dict()[key])
    assert json.loads((tmp_path / "sampling.json").read_text())["guide"] == str(guide)


PAPER = {
    "imagenet256_sit_xl": ("sit", 256, 4_000_000, 1.9, 0.75),
    "imagenet512_sit_xl": ("sit", 256, 4_000_000, 1.5, 0.7),
    "imagenet256_sit_l": ("sit", 256, 400_000, 1.9, 0.75),
    "imagenet256_sit_b": ("sit", 256, 400_000, 1.9, 0.75),
    "imagenet256_lightningdit_xl": ("lightningdit", 1024, 400_000, 1.8, 0.75),
    "imagenet512_lightningdit_xl": ("lightningdit", 1024, 400_000, 1.6, 0.65),
    "imagenet256_lightningdit_b": ("lightningdit", 1024, 400_000, 1.8, 0.75),
}
SIZES = {"b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}


def assert_papers_sampling(sampling: dict, kind: str, scale: float, high: float) -> None:
    solver = "EulerMaruyama" if kind == "sit" else "Euler"
    assert (sampling["solver"]["class_path"], sampling["solver"]["init_args"]["steps"]) == (
        f"maetok.flow.{solver}",
        250,
    )
    assert (sampling["guidance_scale"], sampling["guidance_interval"]) == (scale, [0.0, high])


def test_all_imagenet_experiments_are_compared_with_the_paper() -> None:
    assert set(PAPER) | {"digits_sit"} == set(DIFFUSIONS)


@pytest.mark.parametrize("name", PAPER)
def test_imagenet_configs_are_the_papers(name: str) -> None:
    kind, batch_size, steps, scale, high = PAPER[name]
    config = config_of("fit", f"experiment/{name}")
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert (data["batch_size"], trainer["max_steps"], trainer["precision"]) == (batch_size, steps, "bf16-mixed")
    pixels = name.removeprefix("imagenet").split("_")[0]
    assert data["cache"] == f"data/imagenet{pixels}_latents"
    assert model["tokenizer"]["init_args"]["image_size"] == int(pixels)
    assert model["init_from"]["path"] == f"runs/imagenet{pixels}_decoder"
    denoiser = model["denoiser"]["init_args"]
    assert model["denoiser"]["class_path"] == {"sit": "maetok.SiT", "lightningdit": "maetok.LightningDiT"}[kind]
    size = denoiser["size"]
    assert (size["width"], size["depth"], size["num_heads"]) == SIZES[name.rsplit("_", maxsplit=1)[-1]]
    assert [denoiser[key] for key in ("latent_tokens", "latent_channels", "num_classes")] == [128, 32, 1000]
    optimizer, schedule = model["optimization"]["optimizer"], model["optimization"]["schedule"]
    assert (optimizer["class_path"], schedule["class_path"]) == (
        "torch.optim.AdamW",
        "lightning_modules.ConstantWithWarmup",
    )
    expected = (1e-4, [0.9, 0.999], 0.0) if kind == "sit" else (2e-4, [0.9, 0.95], 0.0)
    assert tuple(optimizer["init_args"][key] for key in ("lr", "betas", "weight_decay")) == expected
    assert schedule["init_args"]["warmup_steps"] == 0
    objective = model["objective"]["init_args"]
    assert objective["interpolant"]["class_path"] == "maetok.flow.LinearInterpolant"
    assert objective["time"]["class_path"] == f"maetok.flow.{'Uniform' if kind == 'sit' else 'LogitNormal'}Time"
    assert objective["cosine_weight"] == (0.0 if kind == "sit" else 1.0)
    assert (model["label_dropout"], model["accumulate_grad_batches"]) == (0.1, 1)
    assert_papers_sampling(model["sampling"], kind, scale, high)


@pytest.mark.parametrize("name", PAPER)
def test_sampling_is_the_papers(name: str) -> None:
    kind, _, _, scale, high = PAPER[name]
    overlays = ["overlay/autoguidance"] if name == "imagenet256_sit_xl" else []
    config = config_of("predict", *sampling_of(name), *overlays)
    trained = config_of("fit", f"experiment/{name}")
    data, model = config["data"]["init_args"], config["model"]["init_args"]
    assert (data["count"], data["num_classes"], data["labels"]) == (50_000, 1000, "balanced")
    assert config["return_predictions"] is False
    assert_papers_sampling(model["sampling"], kind, scale, high)
    for part in ("denoiser", "tokenizer", "init_from"):
        assert model[part] == trained["model"]["init_args"][part]
    assert model["denoiser_from"]["path"] == f"runs/{name}"
    experiment = f"{name}_{'autoguidance' if overlays else 'samples'}"
    assert config["experiment"] == experiment
    assert config["trainer"]["callbacks"][-1]["init_args"]["output"] == f"runs/{experiment}/samples"
    assert (model["guide_from"] is not None) == bool(overlays)


def test_samples_go_to_the_run_of_their_experiment() -> None:
    for arguments, name in (
        ([], "digits_samples"),
        (["--experiment=digits_samples_unguided"], "digits_samples_unguided"),
    ):
        config = printed_config(f"--config={EXPERIMENTS}/digits_samples.yaml", *arguments, subcommand="predict")
        assert config["trainer"]["callbacks"][-1]["init_args"]["output"] == f"runs/{name}/samples"
    assert config["model"]["init_args"]["denoiser_from"]["path"] == "runs/digits_sit"
