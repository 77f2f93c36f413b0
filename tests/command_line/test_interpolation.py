"""Test ``${...}`` in configs: what it refers to, how the order of files and flags counts, and how errors name mistakes.

The traps are those of jsonargparse's own OmegaConf modes: they resolve each file before later files and flags count, or
know relative keys only.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line.tree import read_tree
from main import main
from tests.support.helpers import EXPERIMENTS, ROOT, TINY, printed_config, run

DIGITS = f"--config={EXPERIMENTS}/digits_tokenizer.yaml"
SUBCOMMANDS = {"fit", "validate", "test", "predict"}


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Any:
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["fit", *arguments])
        assert stop.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        if "${" in lines[-1]:
            assert lines[-1].startswith("error: ")
        return lines[-1] if "${" in lines[-1] else "\n".join(lines)

    return error


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def config(text: str, name: str = "later.yaml") -> str:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        return f"--config={tmp_path / name}"

    return config


def sizes(config: dict) -> tuple[int, int]:
    """Return the image sizes of the data and of the tokenizer."""
    return (
        config["data"]["init_args"]["image_size"],
        config["model"]["init_args"]["tokenizer"]["init_args"]["image_size"],
    )


class TestWhatIsSeen:
    """An interpolation sees the final value, wherever files and flags set it."""

    def test_a_flag_changes_all_users(self) -> None:
        assert sizes(printed_config(DIGITS)) == (32, 32)
        assert sizes(printed_config(DIGITS, "--shared.image_size=64")) == (64, 64)
        assert sizes(printed_config(DIGITS, "--shared.image_size", "64")) == (64, 64)
        assert printed_config(DIGITS, "--shared.image_size=64")["shared"]["image_size"] == 64

    def test_a_later_file_changes_all_users(self, write: Any) -> None:
        later = write("shared: {image_size: 48}")
        assert sizes(printed_config(DIGITS, later)) == (48, 48)
        assert sizes(printed_config(DIGITS, later, "--shared.image_size=64")) == (64, 64)

    def test_a_file_after_a_flag_wins_over_it(self, write: Any) -> None:
        later = write("shared: {image_size: 48}")
        assert sizes(printed_config("--shared.image_size=64", DIGITS)) == (32, 32)
        assert sizes(printed_config(DIGITS, "--shared.image_size=64", later)) == (48, 48)

    def test_a_flag_and_a_later_file_win_over_an_interpolated_value(self, write: Any) -> None:
        assert sizes(printed_config(DIGITS, "--data.init_args.image_size=16")) == (16, 32)
        assert sizes(printed_config(DIGITS, "--data.image_size=16")) == (16, 32)  # init_args may be left out
        assert sizes(printed_config(DIGITS, write("data: {init_args: {image_size: 24}}"))) == (24, 32)

    def test_a_value_that_is_replaced_needs_no_environment(
        self, monkeypatch: pytest.MonkeyPatch, write: Any, refused: Any
    ) -> None:
        monkeypatch.delenv("NOT_SET_ANYWHERE", raising=False)
        size = write("data: {init_args: {image_size: '${oc.env:NOT_SET_ANYWHERE}'}}", "size.yaml")
        assert sizes(printed_config(DIGITS, size, "--data.init_args.image_size=16")) == (16, 32)
        assert sizes(printed_config(DIGITS, size, write("data: {init_args: {image_size: 24}}"))) == (24, 32)
        assert "size.yaml: data.init_args.image_size: ${oc.env:NOT_SET_ANYWHERE}" in refused(size, DIGITS, size)
        other = write("trainer: {max_steps: '${oc.env:NOT_SET_ANYWHERE}'}")
        message = refused(DIGITS, size, other, "--data.init_args.image_size=16")
        assert "later.yaml: trainer.max_steps: ${oc.env:NOT_SET_ANYWHERE}" in message
        inside = write("trainer: {callbacks+: [{class_path: '${oc.env:NOT_SET_ANYWHERE}'}]}")
        assert "callbacks+.0.class_path" in refused(DIGITS, inside)

    def test_any_key_from_the_top_without_the_subcommand(self, write: Any) -> None:
        later = write(
            "trainer: {log_every_n_steps: '${trainer.max_steps}'}\n"
            "data: {init_args: {root: 'data/${experiment}/${shared.image_size}'}}"
        )
        config = printed_config(DIGITS, later, "--trainer.max_steps=7", "--experiment=mine")
        assert config["trainer"]["log_every_n_steps"] == 7
        assert config["data"]["init_args"]["root"] == "data/mine/32"

    def test_chains_and_containers(self, write: Any) -> None:
        later = write(
            "shared: {data_root: 'data/${shared.name}', name: 'of_${shared.image_size}'}\n"
            "model: {init_args: {target_weights: '${model.init_args.mask_ratio}', mask_ratio: {low: 0.25}}}"
        )
        config = printed_config(DIGITS, later, "--model.init_args.mask_ratio.high=0.75", "--shared.image_size=64")
        assert config["data"]["init_args"]["root"] == "data/of_64"
        assert config["model"]["init_args"]["target_weights"]["low"] == 0.25
        assert config["model"]["init_args"]["target_weights"]["high"] == 0.75

    @pytest.mark.parametrize("subcommand", ["validate", "test", "predict"])
    def test_other_subcommands(self, subcommand: str) -> None:
        assert sizes(printed_config(DIGITS, "--shared.image_size=64", subcommand=subcommand)) == (64, 64)

    def test_config_before_the_subcommand(self, capsys: pytest.CaptureFixture[str], write: Any) -> None:
        text = (EXPERIMENTS / "digits_tokenizer.yaml").read_text().replace("../", f"{ROOT}/configs/")
        path = write(yaml.safe_dump({"fit": yaml.safe_load(text)}))
        with pytest.raises(SystemExit):
            main([path, "fit", "--shared.image_size=64", "--print_config"])
        assert sizes(yaml.safe_load(capsys.readouterr().out)) == (64, 64)


class TestWhereItStands:
    """Interpolations work in fragments, lists, appended lists and flags, and after a change of the class."""

    def test_nested_fragments(self, write: Any) -> None:
        write("width: 64\ndepth: '${model.init_args.auxiliary_depth}'\nnum_heads: 2", "parts/size.yaml")
        write("max_steps: ${shared.max_steps}\naccelerator: cpu", "parts/trainer.yaml")
        later = write(
            "shared: {max_steps: 9}\ntrainer: parts/trainer.yaml\n"
            "model: {init_args: {tokenizer: {init_args: {encoder: parts/size.yaml}}}}"
        )
        config = printed_config(DIGITS, later)
        assert config["trainer"]["max_steps"] == 9
        assert config["model"]["init_args"]["tokenizer"]["init_args"]["encoder"]["depth"] == 1
        path = later.removeprefix("--config=").replace("later", "parts/trainer")
        assert printed_config(DIGITS, f"--trainer={path}", "--shared.max_steps=11")["trainer"]["max_steps"] == 11

    def test_lists_and_appended_lists(self, write: Any) -> None:
        picture = "{class_path: callbacks.ReconstructionPictures, init_args: {side: '${shared.image_size}'}}"
        before = len(printed_config(DIGITS)["trainer"]["callbacks"])
        callbacks = printed_config(DIGITS, write(f"trainer: {{callbacks+: [{picture}]}}"))["trainer"]["callbacks"]
        assert (len(callbacks), callbacks[-1]["init_args"]["side"]) == (before + 1, 32)
        callbacks = printed_config(DIGITS, write(f"trainer: {{callbacks: [{picture}]}}"))["trainer"]["callbacks"]
        assert (len(callbacks), callbacks[-1]["init_args"]["side"]) == (1, 32)
        callbacks = printed_config(DIGITS, f"--trainer.callbacks+={picture}")["trainer"]["callbacks"]
        assert (len(callbacks), callbacks[-1]["init_args"]["side"]) == (before + 1, 32)

    def test_another_class_in_a_later_file(self, write: Any) -> None:
        later = write(
            "data: {class_path: datamodules.ImageShards, init_args: "
            "{train_shards: '${shared.data_root}/a.tar', validation_shards: b.tar, num_classes: 3}}"
        )
        data = printed_config(DIGITS, later, "--shared.image_size=64")["data"]
        assert data["class_path"] == "datamodules.ImageShards"
        assert (data["init_args"]["train_shards"], data["init_args"]["image_size"]) == ("data/digits/a.tar", 64)
        assert "root" not in data["init_args"]

    def test_flags(self) -> None:
        config = printed_config(
            DIGITS, "--trainer.max_steps=${shared.image_size}", "--experiment", "of ${shared.image_size}="
        )
        assert (config["trainer"]["max_steps"], config["experiment"]) == (32, "of 32=")

    def test_environment_variables(self, monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
        experiment = f"--config={EXPERIMENTS}/imagenet256_maetok_b128.yaml"
        monkeypatch.delenv("IMAGENET_ROOT", raising=False)
        assert printed_config(experiment)["data"]["init_args"]["train_shards"] == "data/imagenet/train-*.tar"
        monkeypatch.setenv("IMAGENET_ROOT", "/scratch/images")
        assert printed_config(experiment)["data"]["init_args"]["train_shards"] == "/scratch/images/train-*.tar"
        flag = "--data.init_args.train_shards=x.tar"
        assert printed_config(experiment, flag)["data"]["init_args"]["train_shards"] == "x.tar"
        monkeypatch.setenv("STEPS", "12")
        assert printed_config(DIGITS, write("trainer: {max_steps: '${oc.env:STEPS}'}"))["trainer"]["max_steps"] == 12

    @pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("imagenet*.yaml")), ids=lambda path: path.stem)
    def test_no_imagenet_experiment_needs_an_edit_on_a_cluster(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("IMAGENET_ROOT", "/scratch/images")
        monkeypatch.setenv("LATENTS_ROOT", "/scratch/latents")
        config = printed_config(f"--config={path}", subcommand="predict" if "_latents" in path.stem else "fit")
        arguments = config["data"]["init_args"]
        size = path.stem.split("_")[0].removeprefix("imagenet")
        if "cache" in arguments:
            assert arguments["cache"] == f"/scratch/latents/imagenet{size}_latents"
        else:
            assert arguments["train_shards"] == "/scratch/images/train-*.tar"
            assert arguments["validation_shards"] == "/scratch/images/validation-*.tar"
        if path.stem.endswith("_latents"):
            written = config["trainer"]["callbacks"][-1]["init_args"]["output"]
            assert written == f"/scratch/latents/imagenet{size}_latents"


class TestSavedConfig:
    """A run saves a config without interpolations, which runs again."""

    def test_it_is_resolved_and_runs_again_as_it_is(
        self, tmp_path: Path, digits_root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPTION", "1.0e-3")
        (tmp_path / "rate.yaml").write_text(
            "model: {init_args: {autoencoder_optimization: {optimizer: {init_args: {lr: '${oc.env:OPTION}'}}}}}"
        )
        run("fit", "digits_tokenizer", tmp_path / "a", digits_root, f"--config={tmp_path / 'rate.yaml'}")
        saved = tmp_path / "a" / "config.yaml"
        assert "${" not in saved.read_text()
        monkeypatch.delenv("OPTION")
        main(["fit", f"--config={saved}", f"--trainer.default_root_dir={tmp_path / 'b'}"])
        first, second = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in "ab")
        assert first.pop("trainer") | {"default_root_dir": None} == second.pop("trainer") | {"default_root_dir": None}
        assert first == second
        assert sizes(first) == (64, 64)

    def test_a_shared_flag_that_would_change_nothing_is_refused(self, refused: Any, write: Any) -> None:
        saved = write(yaml.safe_dump(printed_config(DIGITS)))
        message = refused(saved, "--shared.image_size=64")
        assert "--shared.image_size changes nothing: no config refers to ${shared.image_size}" in message
        assert sizes(printed_config(saved, "--data.init_args.image_size=64")) == (64, 32)


class TestErrors:
    """The last line of an error names the file and the key of a wrong interpolation."""

    def test_unknown_key_in_a_file(self, refused: Any, write: Any, tmp_path: Path) -> None:
        message = refused(DIGITS, write("data: {init_args: {root: 'a/${shared.data_rot}'}}"))
        assert f"{tmp_path}/later.yaml: data.init_args.root: a/${{shared.data_rot}}:" in message
        assert "'shared.data_rot' not found" in message
        message = refused(DIGITS, write("trainer: {callbacks+: [{class_path: '${fit.experiment}'}]}"))
        assert "later.yaml: trainer.callbacks+.0.class_path: ${fit.experiment}:" in message

    def test_unknown_key_in_a_fragment_and_in_a_flag(self, refused: Any, write: Any, tmp_path: Path) -> None:
        write("max_steps: ${shared.steps}", "parts/trainer.yaml")
        message = refused(DIGITS, write("trainer: parts/trainer.yaml"))
        assert f"{tmp_path}/parts/trainer.yaml: trainer.max_steps: ${{shared.steps}}:" in message
        message = refused(DIGITS, "--trainer.max_steps=${shared.steps}")
        assert "--trainer.max_steps: trainer.max_steps: ${shared.steps}:" in message

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("${oc.env:NOT_SET_ANYWHERE}", "NOT_SET_ANYWHERE"),
            ("${shared.image_size", "${shared.image_size"),
            ("${experiment}", "experiment: ${experiment}"),
            ("${shared}${", "${shared}${"),
            ("${.image_size}", "${.image_size}"),
        ],
    )
    def test_other_mistakes(self, text: str, words: str, refused: Any, write: Any, tmp_path: Path) -> None:
        message = refused(DIGITS, write(f"experiment: '{text}'"))
        assert f"{tmp_path}/later.yaml: experiment:" in message
        assert words in message

    def test_a_value_of_the_wrong_type_and_an_undeclared_shared_value(self, refused: Any, write: Any) -> None:
        assert "image_szie" in refused(DIGITS, write("shared: {image_szie: 3}"))
        assert "max_steps" in refused(DIGITS, write("trainer: {max_steps: '${experiment}'}"))


def leaves(tree: Any, key: str = "") -> dict[str, Any]:
    if isinstance(tree, dict):
        return {name: value for part, child in tree.items() for name, value in leaves(child, f"{key}.{part}").items()}
    return {key: tree}


@pytest.mark.parametrize(
    "arguments",
    [
        [DIGITS],
        [f"--config={EXPERIMENTS}/imagenet256_sit_xl.yaml", f"--config={ROOT}/configs/overlay/samples.yaml"],
        [f"--config={EXPERIMENTS}/imagenet512_maetok_b128.yaml", f"--config={ROOT}/configs/ablation/kl_vae.yaml",
         f"--config={TINY}", f"--config={ROOT}/configs/overlay/fsdp.yaml"],
        [DIGITS, "--model.ema_decay=0.5", "--data", "datamodules.Digits", "--data.batch_size", "3",
         f"--model.tokenizer.bottleneck={ROOT}/configs/bottleneck/kl.yaml", "--trainer.max_steps=-1"],
    ],
    ids=["experiment", "overlay", "overlays", "flags"],
)  # fmt: skip
def test_the_merged_tree_says_what_jsonargparse_makes_of_it(arguments: list[str]) -> None:
    """Every number in the merged tree is the number that runs, except arguments of a class that was replaced."""
    tree = leaves(read_tree(["fit", *arguments], SUBCOMMANDS).values)
    made = leaves(printed_config(*arguments, subcommand="predict" if "samples" in arguments[-1] else "fit"))
    numbers = {key: value for key, value in tree.items() if isinstance(value, (int, float)) and key in made}
    assert len(numbers) > 15
    assert numbers == {key: made[key] for key in numbers}
    if any("max_steps" in argument for argument in arguments):
        assert numbers[".model.init_args.ema_decay"] == 0.5
        assert (numbers[".data.init_args.batch_size"], numbers[".trainer.max_steps"]) == (3, -1)
