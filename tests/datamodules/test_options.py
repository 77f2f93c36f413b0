"""The command line refuses options out of range, naming key and value, and takes the options of every base class."""

import subprocess
import sys

import pytest
import yaml

from main import main
from tests.support.helpers import EXPERIMENTS, ROOT

SHARDS = ["--data=datamodules.ImageShards", "--data.train_shards=a", "--data.validation_shards=b"]
CACHE = ["--data=datamodules.LatentShards", "--data.cache=a"]


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={EXPERIMENTS / 'digits_tokenizer.yaml'}", *arguments])
    assert stop.value.code != 0
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "key", "value"),
    [
        (SHARDS, "shuffle_window", "0"),
        (SHARDS, "batch_size", "-4"),
        (SHARDS, "evaluation_batch_size", "0"),
        (SHARDS, "image_size", "0"),
        (SHARDS, "num_classes", "0"),
        (SHARDS, "max_fault_rate", "1.5"),
        (SHARDS, "loading.num_workers", "-1"),
        (SHARDS, "loading.prefetch_factor", "0"),
        (SHARDS, "loading.timeout", "-1"),
        ([*SHARDS, "--data.staging.directory=x"], "staging.limit_gigabytes", "0"),
        ([*SHARDS, "--data.staging.directory=x"], "staging.limit_gigabytes", "nan"),
        (CACHE, "shuffle_window", "0"),
        (CACHE, "num_classes", "0"),
    ],
)
def test_an_option_out_of_range_is_named_with_its_value(
    capsys: pytest.CaptureFixture[str], data: list[str], key: str, value: str
) -> None:
    error = error_of(capsys, *data, f"--data.{key}={value}")
    assert key.rpartition(".")[2] in error
    assert "does not conform to restriction" in error
    assert value in error


@pytest.mark.parametrize("data", [SHARDS, CACHE, ["--data=datamodules.Digits"]])
def test_options_of_the_base_classes_are_known_and_misspelt_ones_are_not(
    capsys: pytest.CaptureFixture[str], data: list[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["fit", *data, "--data.shuffle_window=3", "--data.drop_tail=true", "--print_config"])
    options = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert (options["shuffle_window"], options["drop_tail"], options["seed"]) == (3, True, None)
    assert (
        options["loading"]["num_workers"]
        == {"ImageShards": 8, "LatentShards": 2, "Digits": 1}[data[0].rpartition(".")[2]]
    )
    assert "shuffle_windw" in error_of(capsys, *data, "--data.shuffle_windw=3")


def test_what_digits_decide_cannot_be_set(capsys: pytest.CaptureFixture[str]) -> None:
    for key in ("train_shards", "num_classes", "horizontal_flip"):
        assert key in error_of(capsys, "--data=datamodules.Digits", f"--data.{key}=1")


def test_importing_datamodules_loads_no_model_code() -> None:
    program = (
        "import sys, datamodules; heavy = {'timm', 'webdataset', 'fsspec.implementations.http', 'maetok.networks', "
        "'maetok.checkpoints'}; print(sorted(heavy & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_packing_keeps_its_public_names() -> None:
    from datamodules import digits, pack
    from datamodules.pack.split import PackOptions

    assert pack.PackOptions is PackOptions
    assert digits.digit_images is pack.digit_images
    assert all(callable(getattr(pack, name)) for name in pack.HOMES)
    with pytest.raises(AttributeError, match=r"datamodules\.pack.*no attribute 'pack_nothing'"):
        getattr(pack, "pack_nothing")  # noqa: B009 - an attribute that does not exist
