"""Other commands validate, continue and export a sharded run that the command line trained with all callbacks."""

import json
from pathlib import Path

import pytest
import torch

from maetok import Tokenizer
from maetok.checkpoints.files import read_weights
from maetok.checkpoints.runs import complete_checkpoints
from maetok.hub.__main__ import main as hub
from tests.support.helpers import EXPERIMENTS, ROOT, TINY, run, run_main


def test_a_sharded_run_is_validated_continued_and_exported_by_one_process(tmp_path: Path, digits_root: Path) -> None:
    arguments = [f"--config={EXPERIMENTS / 'digits_tokenizer.yaml'}", f"--config={TINY}"]
    arguments += [f"--config={ROOT / 'configs' / 'overlay' / 'fsdp.yaml'}", "--trainer.devices=2"]
    run_main("fit", tmp_path, *arguments, f"--data.init_args.root={digits_root}")
    newest = complete_checkpoints(tmp_path)[-1]
    assert newest.name == "step=000000002.ckpt"
    assert len(list(newest.glob("*.distcp"))) == 2
    assert list((tmp_path / "pictures").glob("*.png"))
    during = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    metrics = run("validate", "digits_tokenizer", tmp_path, digits_root, "--ckpt_path=last").trainer.callback_metrics
    for name in ("psnr", "ssim", "l1"):
        assert float(metrics[f"validation/{name}"]) == pytest.approx(during[f"validation/{name}"], rel=1e-5)
    weights = read_weights(newest)
    hub(["export", f"--ckpt={tmp_path}", f"--output={tmp_path / 'hub'}"])
    for name, value in Tokenizer.from_pretrained(tmp_path / "hub").state_dict().items():
        assert torch.equal(value, weights[f"ema.network.tokenizer.{name}"])
    cli = run("fit", "digits_tokenizer", tmp_path, digits_root, "--ckpt_path=last", "--trainer.max_steps=3")
    assert cli.trainer.global_step == 3
    assert [path.is_dir() for path in complete_checkpoints(tmp_path)] == [True, False]


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp", "hsdp"])
def test_overlays_name_no_number_of_processes(name: str) -> None:
    text = (ROOT / "configs" / "overlay" / f"{name}.yaml").read_text()
    settings = [line for line in text.splitlines() if not line.startswith("#")]
    assert any("strategy" in line for line in settings)
    if name != "single":
        assert not any(key in line for line in settings for key in ("devices", "num_nodes", "size"))
