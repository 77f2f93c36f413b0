"""Test that configs and commands from before the moves work, with a warning that names the new key."""

from importlib import import_module
from pathlib import Path
from shutil import copytree

import pytest

from callbacks.resilience.checkpointing import complete_checkpoints
from command_line.legacy import OLD_MODULES, modernize, modernize_flag
from main import main
from tests.conftest import STORED
from tests.support.helpers import ROOT, printed_config

OLD_RUNS = STORED / "before_the_moves"


@pytest.mark.parametrize(
    ("run", "key", "learning_rate"),
    [
        ("digits_tokenizer", "autoencoder_optimization", 0.002),
        ("digits_decoder", "autoencoder_optimization", 0.002),
        ("digits_sit", "optimization", 0.001),
    ],
)
def test_saved_configs_and_flags_with_old_keys(run: str, key: str, learning_rate: float) -> None:
    flag = "--model.init_args.generator.gradient_clip=0.25"
    with pytest.warns(FutureWarning) as warned:
        arguments = printed_config(f"--config={OLD_RUNS / run}/config.yaml", flag)["model"]["init_args"]
    messages = {str(warning.message) for warning in warned if warning.category is FutureWarning}
    assert f"model.init_args.generator is now model.init_args.{key}; the old name still works" in messages
    assert f"--model.init_args.generator is now --model.init_args.{key}; the old name still works" in messages
    assert arguments[key]["gradient_clip"] == 0.25
    assert arguments[key]["optimizer"]["init_args"]["lr"] == learning_rate


def test_a_saved_config_without_old_keys() -> None:
    config = printed_config(f"--config={OLD_RUNS}/digits_latents/config_predict.yaml", subcommand="predict")
    assert config["model"]["class_path"] == "lightning_modules.LatentEncoding"
    assert config["model"]["init_args"]["tokenizer"]["init_args"]["encoder"]["width"] == 8


def test_an_overlay_and_a_fragment_with_old_keys(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(
        "class_path: lightning_modules.LatentDiffusion\ninit_args: {generator: {gradient_clip: 0.5}}"
    )
    (tmp_path / "overlay.yaml").write_text("model: {init_args: {generator: {gradient_clip: 0.75}}}")
    experiment = f"--config={ROOT}/configs/experiment/digits_sit.yaml"
    for change in (f"--model={tmp_path}/model.yaml", f"--config={tmp_path}/overlay.yaml"):
        with pytest.warns(FutureWarning, match=r"generator is now model\.init_args\.optimization"):
            arguments = printed_config(experiment, change)["model"]["init_args"]
        assert arguments["optimization"]["gradient_clip"] == (0.5 if "model.yaml" in change else 0.75)
        assert arguments["optimization"]["optimizer"]["init_args"]["lr"] == 0.001


def test_an_old_run_continues(tmp_path: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copytree(OLD_RUNS / "digits_tokenizer", tmp_path / "runs" / "digits_tokenizer")
    monkeypatch.chdir(tmp_path)
    arguments = ["--ckpt_path=last", "--trainer.max_steps=3", f"--data.init_args.root={digits_root}"]
    with pytest.warns(FutureWarning, match="generator is now"):
        cli = main(["fit", f"--config={OLD_RUNS}/digits_tokenizer/config.yaml", *arguments])
    assert cli.trainer.global_step == 3
    assert [path.name for path in complete_checkpoints(Path("runs/digits_tokenizer"))] == ["step=000000003.ckpt"]


def test_moved_modules_exist_and_class_paths_follow() -> None:
    for module in OLD_MODULES.values():
        import_module(module)
    old = [
        "callbacks.gmm_modes.GMMModes",
        {"class_path": "maetok.networks.sit.SiT.from_pretrained"},
        "callbacks.latents.X",
    ]
    changes: set[str] = set()
    assert modernize(old, changes=changes) == [
        "callbacks.measures.gmm_modes.GMMModes",
        {"class_path": "maetok.networks.denoiser.sit.SiT.from_pretrained"},
        "callbacks.latents.X",
    ]
    assert changes == {
        "callbacks.gmm_modes.GMMModes is now callbacks.measures.gmm_modes.GMMModes",
        "maetok.networks.sit.SiT.from_pretrained is now maetok.networks.denoiser.sit.SiT.from_pretrained",
    }


def test_flags() -> None:
    def new(flag: str) -> str:
        return modernize_flag(flag, "lightning_modules.LatentDiffusion", set())

    assert new("--model.generator=x.yaml") == "--model.optimization=x.yaml"
    assert new("--model.init_args.generator.schedule") == "--model.init_args.optimization.schedule"
    assert new("--trainer.callbacks+=callbacks.throughput.Throughput") == (
        "--trainer.callbacks+=callbacks.reporting.throughput.Throughput"
    )
    assert new("callbacks.throughput.Throughput") == "callbacks.reporting.throughput.Throughput"
    assert new("--model.init_args.generators=1") == "--model.init_args.generators=1"
