"""Test the command line: run directories, restarts, errors, and traps of LightningCLI."""

import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from callbacks.resilience.checkpointing import complete_checkpoints, resolve_checkpoint
from main import MAETokCLI, main
from tests.support.helpers import EXPERIMENTS, ROOT, TINY, printed_config, run

DIGITS = f"--config={EXPERIMENTS / 'digits_tokenizer.yaml'}"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments])
    assert stop.value.code != 0
    return capsys.readouterr().err


class TestRun:
    """A run has one directory, restarts from it, and serves the other subcommands."""

    def test_directory_and_rerun_from_the_saved_config(
        self, tmp_path: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        main(["fit", DIGITS, f"--config={TINY}", f"--data.init_args.root={digits_root}"])
        folder = tmp_path / "runs" / "tiny"
        assert {path.name for path in folder.iterdir()} >= {"config.yaml", "checkpoints", "pictures", "metrics.jsonl"}
        first = torch.load(folder / "checkpoints" / "step=000000002.ckpt", weights_only=True)["state_dict"]
        saved = folder / "config.yaml"
        main(["fit", f"--config={saved}", "--trainer.default_root_dir=again"])
        second = torch.load("again/checkpoints/step=000000002.ckpt", weights_only=True)["state_dict"]
        assert all(torch.equal(first[name], second[name]) for name in first)  # the same seed gives the same weights
        assert (
            yaml.safe_load(Path("again/config.yaml").read_text())["model"] == yaml.safe_load(saved.read_text())["model"]
        )

    def test_restart_validate_and_test(self, tmp_path: Path, digits_root: Path) -> None:
        run("fit", "digits_tokenizer", tmp_path, digits_root, "--ckpt_path=last")  # no checkpoint yet: step 0
        config = (tmp_path / "config.yaml").read_text()
        cli = run("fit", "digits_tokenizer", tmp_path, digits_root, "--ckpt_path=last", "--trainer.max_steps=4")
        assert cli.trainer.global_step == 4
        assert cli.datamodule.position == 16  # it read four batches of four images, none of them twice
        assert [path.name for path in complete_checkpoints(tmp_path)] == ["step=000000003.ckpt", "step=000000004.ckpt"]
        for subcommand in ("validate", "test"):
            cli = run(subcommand, "digits_tokenizer", tmp_path, digits_root, "--ckpt_path=last")
            assert 0 < cli.trainer.callback_metrics["validation/psnr"] < 40
            record = json.loads((tmp_path / f"metrics_{subcommand}.jsonl").read_text())
            assert record["step"] == 4  # the step of the checkpoint
            assert ("validation/linear_probe" in record) == (subcommand == "validate")
        written = yaml.safe_load((tmp_path / "config.yaml").read_text())
        assert written["trainer"]["max_steps"] == 4  # the last fit wrote it; validate did not replace it
        assert written["model"] == yaml.safe_load(config)["model"]

    def test_run_directory_is_not_frozen_into_the_config(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert printed_config(DIGITS)["trainer"]["default_root_dir"] is None

    def test_a_new_run_does_not_mix_with_an_old_one(self, tmp_path: Path, digits_root: Path) -> None:
        run("fit", "digits_tokenizer", tmp_path, digits_root)
        config = (tmp_path / "config.yaml").read_text()
        with pytest.raises(FileExistsError, match=r"up to step=000000002\.ckpt.*--ckpt_path last"):
            run("fit", "digits_tokenizer", tmp_path, digits_root, "--trainer.max_steps=3")
        assert (tmp_path / "config.yaml").read_text() == config

    def test_last_without_checkpoint_is_an_error_where_one_is_needed(self, tmp_path: Path) -> None:
        assert resolve_checkpoint("last", tmp_path, "fit") is None
        assert resolve_checkpoint(None, tmp_path, "validate") is None
        assert resolve_checkpoint("other.ckpt", tmp_path, "fit") == "other.ckpt"
        with pytest.raises(FileNotFoundError, match=r"--ckpt_path last: there is no checkpoint"):
            resolve_checkpoint("last", tmp_path, "validate")

    def test_unfinished_and_foreign_files_are_no_checkpoints(self, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoints"
        folder.mkdir()
        for name in ("step=000000009.ckpt", "step=000000010.ckpt", ".step=000000011.ckpt.partial", "best.ckpt"):
            (folder / name).touch()
        assert resolve_checkpoint("last", tmp_path, "test") == str(folder / "step=000000010.ckpt")

    def test_checkpoint_of_another_model_is_refused(self, tmp_path: Path, digits_root: Path) -> None:
        run("fit", "digits_tokenizer", tmp_path, digits_root)
        wider = "--model.init_args.tokenizer.init_args.encoder.width=64"
        with pytest.raises(RuntimeError, match="size mismatch"):
            run("fit", "digits_tokenizer", tmp_path, digits_root, wider, "--ckpt_path=last", "--trainer.max_steps=3")


class TestErrors:
    """An error names the mistake in the config."""

    def test_misspelt_keys(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        assert "precison" in error_of(capsys, DIGITS, "--trainer.precison=32")
        assert "widht" in error_of(capsys, DIGITS, "--model.init_args.tokenizer.init_args.encoder.widht=64")
        path = tmp_path / "typo.yaml"
        for text, word in (
            ("trainer: {max_stepz: 3}", "max_stepz"),
            ("model: {init_args: {mask_ratoi: {low: 0.1}}}", "mask_ratoi"),
            ("model: {init_args: {mask_ratio: {lo: 0.1}}}", "lo"),
            ("data: {init_args: {batchsize: 3}}", "batchsize"),
        ):
            path.write_text(text)
            assert word in error_of(capsys, DIGITS, f"--config={path}")

    @pytest.mark.parametrize(
        ("experiment", "key"),
        [
            ("digits_tokenizer", "compil"),
            ("digits_tokenizer", "ema_decya"),
            ("digits_decoder", "objectve"),
            ("digits_decoder", "accumulate_grad_batch"),
            ("digits_sit", "sede"),
        ],
    )
    def test_misspelt_arguments_of_the_base_of_a_task(
        self, experiment: str, key: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = f"--config={EXPERIMENTS / experiment}.yaml"
        message = error_of(capsys, config, f"--model.init_args.{key}=1")
        assert f"Option '{key}' is not accepted" in message
        assert printed_config(config)["model"]["init_args"]["accumulate_grad_batches"] == 1  # known without being set

    @pytest.mark.parametrize(
        ("experiment", "argument", "limit"),
        [
            ("digits_tokenizer", "model.init_args.accumulate_grad_batches=0", "v>0"),
            ("digits_decoder", "model.init_args.mask_ratio=1.0", "v>=0 and v<1"),
            ("digits_decoder", "model.init_args.mask_ratio=-0.1", "v>=0 and v<1"),
            ("digits_decoder", "model.init_args.latent_noise=-1", "v>=0"),
            ("digits_sit", "model.init_args.label_dropout=1.1", "v>=0 and v<=1"),
            ("digits_sit", "model.init_args.validation_bins=0", "v>0"),
            ("digits_sit", "model.init_args.statistics_samples=0", "v>0"),
            ("digits_tokenizer", "trainer.callbacks.keep_every_n_steps=-1", "v>=0"),
            ("digits_tokenizer", "trainer.callbacks.keep_last=-2", "v>0"),
            ("digits_tokenizer", "trainer.callbacks.keep_last=0", "v>0"),
            ("digits_tokenizer", "trainer.strategy.init_args.replicate=0", "v>0"),
            ("digits_tokenizer", "trainer.strategy.init_args.timeout_minutes=0", "v>0"),
        ],
    )
    def test_numbers_out_of_range(
        self, experiment: str, argument: str, limit: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = [f"--config={EXPERIMENTS / experiment}.yaml"]
        if "strategy" in argument:
            files += [f"--config={ROOT / 'configs' / 'overlay' / 'fsdp.yaml'}"]
        key, value = argument.split("=")
        message = error_of(capsys, *files, f"--{argument}")
        assert f'Parser key "{key.split(".")[-1]}"' in message
        assert f"Given value: {value}\n" in message or f"{value} does not conform" in message
        assert f"does not conform to restriction {limit}\n" in message

    def test_wrong_class_and_missing_file(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "TokenizerTrainig" in error_of(capsys, "--model=lightning_modules.TokenizerTrainig")
        assert "nowhere.yaml" in error_of(capsys, "--config=nowhere.yaml")

    def test_help_needs_no_model_code(self) -> None:
        code = "import sys, main\ntry:\n main.main(['--help'])\nexcept SystemExit: pass\n"
        code += "print([m for m in ('timm', 'sklearn', 'webdataset', 'mlxtend', 'omegaconf') if m in sys.modules])"
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        assert result.stdout.strip().endswith("[]"), result.stdout[-200:]


class TestTraps:
    """Our configs rely on this behaviour of LightningCLI and jsonargparse, or work around it."""

    def test_later_configs_win_key_by_key(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "later.yaml").write_text("model: {init_args: {mask_ratio: {high: 0.9}}}")
        config = printed_config(DIGITS, f"--config={tmp_path / 'later.yaml'}", "--trainer.max_steps=7")
        assert config["model"]["init_args"]["mask_ratio"]["high"] == 0.9
        assert config["model"]["init_args"]["mask_ratio"]["low"] == 0.0
        assert config["trainer"]["max_steps"] == 7
        assert config["seed_everything"] == 0

    def test_lists_and_dicts_are_replaced_and_plus_appends(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        path = tmp_path / "later.yaml"
        before = printed_config(DIGITS)["trainer"]["callbacks"]
        path.write_text("trainer: {callbacks+: [callbacks.Throughput]}")
        assert len(printed_config(DIGITS, f"--config={path}")["trainer"]["callbacks"]) == len(before) + 1
        path.write_text("trainer: {callbacks: [callbacks.Throughput]}\nmodel: {init_args: {target_weights: {}}}")
        config = printed_config(DIGITS, f"--config={path}")
        assert len(config["trainer"]["callbacks"]) == 1
        assert config["model"]["init_args"]["target_weights"] == {}

    def test_another_class_keeps_arguments_of_the_same_name(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """This is why fragments state every argument that matters."""
        (tmp_path / "sgd.yaml").write_text(
            "model: {init_args: {autoencoder_optimization: {optimizer: {class_path: torch.optim.SGD}}}}"
        )
        config = printed_config(DIGITS, f"--config={tmp_path / 'sgd.yaml'}")
        optimizer = config["model"]["init_args"]["autoencoder_optimization"]["optimizer"]
        assert optimizer["class_path"] == "torch.optim.SGD"
        assert optimizer["init_args"]["weight_decay"] == 0.0001
        assert "betas" not in optimizer["init_args"]

    def test_fragments_are_relative_to_the_file_that_names_them(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        config = printed_config(DIGITS)
        assert (
            config["model"]["init_args"]["autoencoder_optimization"]["optimizer"]["class_path"] == "torch.optim.AdamW"
        )

    def test_the_private_hook_that_keeps_checkpoints_from_changing_the_config_still_exists(self) -> None:
        assert hasattr(LightningCLI, "_parse_ckpt_path")
        assert hasattr(LightningCLI, "_prepare_subcommand_kwargs")
        assert MAETokCLI._parse_ckpt_path is not LightningCLI._parse_ckpt_path

    def test_hyper_parameters_in_a_checkpoint_do_not_change_the_config(self, tmp_path: Path, digits_root: Path) -> None:
        """LightningCLI would build what the checkpoint stores, even another class."""
        run("fit", "digits_tokenizer", tmp_path, digits_root)
        path = tmp_path / "checkpoints" / "step=000000002.ckpt"
        stored = {"_class_path": "lightning_modules.TokenizerTraining", "ema_decay": 0.25}
        torch.save(torch.load(path, weights_only=True) | {"hyper_parameters": stored}, path)
        more = ["--trainer.max_steps=3", f"--ckpt_path={path}"]
        cli = run("fit", "digits_tokenizer", tmp_path, digits_root, *more)
        assert (cli.trainer.global_step, cli.model.ema.decay) == (3, 0.995)

    def test_sizes_that_disagree_are_an_error_instead_of_a_link(self, tmp_path: Path, digits_root: Path) -> None:
        with pytest.raises(ValueError, match=r"data\.init_args\.image_size=\(32, 32\) but .*image_size=\(64, 64\)"):
            run("fit", "digits_tokenizer", tmp_path, digits_root, "--data.init_args.image_size=32")

    def test_an_overlay_needs_an_experiment_before_it(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        (tmp_path / "overlay.yaml").write_text("model: {init_args: {auxiliary_depth: 2}}")
        assert "model" in error_of(capsys, f"--config={tmp_path}/overlay.yaml", DIGITS)
        config = printed_config(DIGITS, f"--config={tmp_path}/overlay.yaml")
        assert config["model"]["init_args"]["auxiliary_depth"] == 2

    def test_the_package_requires_what_lightning_does_not_bring(self) -> None:
        setup = ConfigParser()
        setup.read(ROOT / "setup.cfg")
        assert re.search(r"^jsonargparse\[signatures,omegaconf\]>=", setup["options"]["install_requires"], re.MULTILINE)
        assert (ROOT / "pyproject.toml").exists()

    def test_trainer_defaults_hold(self, capsys: pytest.CaptureFixture[str]) -> None:
        trainer = printed_config(DIGITS)["trainer"]
        assert trainer["use_distributed_sampler"] is False
        assert trainer["check_val_every_n_epoch"] is None
