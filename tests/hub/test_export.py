"""Exported checkpoints compute the same as published folders, and the library samples from them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from lightning_modules import LatentDiffusion, Sampling
from maetok import LightningDiT, SiT, Tokenizer, published_latent_moments, sample
from maetok.checkpoints.building import build_network
from maetok.flow import Euler, index_noise
from maetok.hub import PUBLISHED_FILES
from maetok.hub.__main__ import main
from maetok.hub.export import export
from maetok.networks import TransformerSize
from tests.conftest import DATA
from tests.support.helpers import ROOT, run
from tests.support.tokenizer_training import optimization

SIZE = TransformerSize(width=32, depth=1, num_heads=2)
SIZES = {"width": 32, "depth": 1, "num_heads": 2, "mlp_ratio": 4.0}
TOKENIZER = {"image_size": 32, "patch_size": 8, "latent_tokens": 4, "encoder": SIZES, "decoder": SIZES}
STAGE_2, STAGE_3 = "lightning_modules.DecoderFinetuning", "lightning_modules.LatentDiffusion"
INIT_ARGS = f"model: {{class_path: {STAGE_2}, init_args: "


def tokenizer_config(**init_args: Any) -> dict[str, Any]:
    return {"tokenizer": {"class_path": "maetok.Tokenizer", "init_args": TOKENIZER | init_args}}


def denoiser_config(name: str = "SiT", **init_args: Any) -> dict[str, Any]:
    sizes = {"latent_tokens": 4, "latent_channels": 32, "num_classes": 10, "size": SIZES}
    return {"denoiser": {"class_path": f"maetok.{name}", "init_args": sizes | init_args}}


def build(config: dict[str, Any]) -> Any:
    return build_network(config["tokenizer"], "tokenizer")


def write_run(folder: Path, class_path: str, init_args: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    """Write a run directory like one that training leaves."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"class_path": class_path, "init_args": init_args}}))
    torch.save({"state_dict": state}, folder / "checkpoints" / "step=000000005.ckpt")
    return folder / "checkpoints" / "step=000000005.ckpt"


def named(network: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": value for name, value in network.state_dict().items()}


def scrambled(network: nn.Module) -> Any:
    """Return the network with random weights instead of its initial zeros, so that equal outputs prove something."""
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def assert_same_files(first: Path, second: Path) -> None:
    assert {path.name for path in second.iterdir()} == set(PUBLISHED_FILES)
    for name in PUBLISHED_FILES:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


@torch.no_grad()
def assert_same_tokenizer(ours: Tokenizer, trained: Tokenizer) -> None:
    images = torch.rand(3, 3, *trained.image_size) * 2 - 1
    latents = trained.encode(images)
    assert torch.equal(ours.encode(images), latents)
    assert torch.equal(ours.decode(latents), trained.decode(latents))
    assert torch.equal(ours(images), trained(images))


class TestTokenizer:
    """Test the export of stages 1 and 2."""

    @pytest.mark.parametrize("weights", ["ema", "raw"])
    def test_a_run_of_stage_1(self, tmp_path: Path, digits_root: Path, weights: str, capsys: Any) -> None:
        model = run("fit", "digits_tokenizer", tmp_path / "run", digits_root).model
        checkpoint = tmp_path / "run" / "checkpoints" / "step=000000002.ckpt"
        folder, again = tmp_path / "folder", tmp_path / "again"
        main(["export", f"--ckpt={checkpoint}", f"--output={folder}", f"--weights={weights}"])
        assert f"wrote Tokenizer ({weights} weights) to {folder}" in capsys.readouterr().out
        averaged, raw = model.averaged_model.tokenizer, model.model.tokenizer.eval()
        assert not torch.equal(averaged.decoder.output.weight, raw.decoder.output.weight)
        ours = Tokenizer.from_pretrained(folder)
        assert_same_tokenizer(ours, averaged if weights == "ema" else raw)
        assert (ours.latents_hash() == averaged.latents_hash()) == (weights == "ema")
        ours.save_pretrained(again)
        assert_same_files(folder, again)
        export(tmp_path / "run", tmp_path / "newest", weights=weights)  # newest of the run
        assert_same_files(folder, tmp_path / "newest")

    @pytest.mark.parametrize("positions", ["rotary", "absolute", "both"])
    def test_any_positions_and_sizes(self, tmp_path: Path, positions: str) -> None:
        """A table that only the published format has is written as zeros."""
        options = {"encoder_positions": positions, "decoder_positions": positions, "rope_theta": 7.0}
        network = scrambled(Tokenizer(32, 8, 4, encoder=SIZE, decoder=SIZE, **options))
        state = named(network, "ema.network.tokenizer.")
        export(write_run(tmp_path / "run", STAGE_2, tokenizer_config(**options), state), tmp_path / "folder")
        assert_same_tokenizer(Tokenizer.from_pretrained(tmp_path / "folder"), network)

    def test_channels_and_pairs_of_the_config(self, tmp_path: Path) -> None:
        plain = {"class_path": "maetok.networks.PlainBottleneck", "init_args": {"channels": 6}}
        config = tokenizer_config(bottleneck=plain, image_size=[32, 32], encoder=SIZES | {"width": 48})
        state = named(trained := scrambled(build(config)), "model.tokenizer.")
        export(write_run(tmp_path / "run", STAGE_2, config, state), tmp_path / "folder", weights="raw")
        ours = Tokenizer.from_pretrained(tmp_path / "folder")
        assert (ours.latent_channels, ours.encoder_size.width, ours.image_size) == (6, 48, (32, 32))
        assert_same_tokenizer(ours, trained)

    def test_a_published_tokenizer_whose_decoder_was_fine_tuned(self, tmp_path: Path) -> None:
        """The export keeps the published config, unused tensors, and all values that training did not change."""
        source, sizes = DATA / "ae_movq_rope", {"embed_dim": 96, "depth": 2, "num_heads": 3}
        network = Tokenizer.from_pretrained(source, **sizes)
        scrambled(network.decoder)
        init_args = {"path_or_repo": str(source)}
        config = {"class_path": "maetok.Tokenizer.from_pretrained", "init_args": init_args, "dict_kwargs": sizes}
        state = named(network, "ema.network.tokenizer.")
        export(write_run(tmp_path / "run", STAGE_2, {"tokenizer": config}, state), tmp_path / "folder")
        assert_same_tokenizer(Tokenizer.from_pretrained(tmp_path / "folder"), network)
        before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "folder"))
        assert before.keys() == after.keys()
        kept = [key for key in before if key.startswith(("encoder.", "quant_"))]
        assert len(kept) > 20
        assert all(torch.equal(before[key], after[key]) for key in kept)
        assert not torch.equal(before["decoder.to_pixel.model.weight"], after["decoder.to_pixel.model.weight"])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"bottleneck": {"class_path": "maetok.networks.KLBottleneck"}}, "plain autoencoders, not KLBottleneck"),
            ({"encoder_positions": "absolute"}, "rotary embeddings in both encoder and decoder, or in neither"),
            ({"image_size": [32, 16]}, "square image sizes"),
            ({"encoder": SIZES | {"mlp_ratio": 2.0}}, "mlp_ratio=4 only"),
        ],
    )
    def test_what_the_format_has_no_place_for(self, tmp_path: Path, change: dict[str, Any], message: str) -> None:
        config = tokenizer_config(**change)
        state = named(build(config), "ema.network.tokenizer.")
        with pytest.raises(ValueError, match=message):
            export(write_run(tmp_path / "run", STAGE_2, config, state), tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


class TestDenoiser:
    """Test the export of stage 3: a SiT, and the statistics of its training latents."""

    def task(self, qk_norm: bool = False) -> LatentDiffusion:
        sampling = Sampling(Euler(3), guidance_scale=1.9, guidance_interval=(0.0, 0.75), seed=5)
        tokenizer = scrambled(Tokenizer(32, 8, 4, encoder=SIZE, decoder=SIZE, encoder_positions="both"))
        sit = SiT(4, 32, 10, SIZE, qk_norm)
        task = LatentDiffusion(denoiser=sit, optimization=optimization(), tokenizer=tokenizer, sampling=sampling)
        scrambled(task.averaged_denoiser)
        task.normalizer.set_statistics(torch.randn(32), torch.rand(32) + 0.5)
        return task

    @pytest.mark.parametrize("qk_norm", [False, True])
    def test_the_library_samples_what_the_task_samples(self, tmp_path: Path, qk_norm: bool) -> None:
        """The example in the docstring of ``maetok`` samples the task's images from the task's noise."""
        task = self.task(qk_norm)
        checkpoint = write_run(tmp_path / "run", STAGE_3, denoiser_config(qk_norm=qk_norm), task.state_dict())
        export(checkpoint, tmp_path / "sit")
        task.frozen_tokenizer().save_pretrained(tmp_path / "tokenizer")

        tokenizer, sit = Tokenizer.from_pretrained(tmp_path / "tokenizer"), SiT.from_pretrained(tmp_path / "sit")
        mean, std = published_latent_moments(tmp_path / "sit")
        labels, indices = torch.tensor([3, 7]), torch.arange(2)
        noise = index_noise(5, indices, shape=(sit.latent_tokens, sit.latent_channels))
        normalized = sample(sit, labels, noise, steps=3, guidance_scale=1.9, guidance_interval=(0.0, 0.75))
        images = tokenizer.decode(normalized * std + mean)
        assert torch.equal(images, task.sample(labels, indices))
        assert torch.equal(torch.stack((mean, std)), torch.stack((task.normalizer.mean, task.normalizer.std)))
        assert not torch.equal(images, tokenizer.decode(normalized))

    def test_raw_weights_and_re_export(self, tmp_path: Path) -> None:
        task = self.task()
        checkpoint = write_run(tmp_path / "run", STAGE_3, denoiser_config(), task.state_dict())
        for weights, expected in (("ema", task.averaged_denoiser), ("raw", task.denoiser)):
            export(checkpoint, tmp_path / weights, weights=weights)
            ours = SiT.from_pretrained(tmp_path / weights)
            assert all(torch.equal(value, expected.state_dict()[name]) for name, value in ours.state_dict().items())
            ours.save_pretrained(tmp_path / f"{weights}_again")
            assert_same_files(tmp_path / weights, tmp_path / f"{weights}_again")
        assert not torch.equal(task.averaged_denoiser.input.weight, task.denoiser.input.weight)

    def test_lightning_dit_has_no_published_format(self, tmp_path: Path) -> None:
        state = named(LightningDiT(4, 32, 10, SIZE), "emas.0.network.")
        checkpoint = write_run(tmp_path / "run", STAGE_3, denoiser_config("LightningDiT"), state)
        with pytest.raises(ValueError, match=r"LightningDiT: only Tokenizer and SiT have a published format"):
            export(checkpoint, tmp_path / "folder")

    def test_statistics_are_needed(self, tmp_path: Path) -> None:
        state = named(SiT(4, 32, 10, SIZE), "emas.0.network.")
        checkpoint = write_run(tmp_path / "run", STAGE_3, denoiser_config(), state)
        with pytest.raises(ValueError, match=r"lacks normalizer\.mean and normalizer\.std"):
            export(checkpoint, tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def test_statistics_of_a_released_model(tmp_path: Path) -> None:
    mean, std = published_latent_moments(DATA / "ae_movq_rope")
    assert (mean.item(), std.item(), mean.dtype, mean.shape) == (0.0, 1.0, torch.float32, ())
    with pytest.raises(ValueError, match=r"neither latent_statistics\.safetensors nor vq_mean .* of its tokenizer"):
        published_latent_moments(DATA / "sit_small")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        published_latent_moments(tmp_path / "none")


class TestErrors:
    """Each error names the given value and the remedy."""

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        network = Tokenizer(32, 8, 4, encoder=SIZE, decoder=SIZE)
        return write_run(tmp_path / "run", STAGE_2, tokenizer_config(), named(network, "ema.network.tokenizer."))

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        for path in (tmp_path, tmp_path / "none.ckpt"):
            with pytest.raises(FileNotFoundError, match="is no checkpoint, and no run directory with one"):
                export(path, tmp_path / "folder")

    def test_missing_config(self, checkpoint: Path, tmp_path: Path) -> None:
        elsewhere = (checkpoint.parents[1] / "config.yaml").rename(tmp_path / "elsewhere.yaml")
        with pytest.raises(FileNotFoundError, match=r"run/config\.yaml: no such config; give .* as --config"):
            export(checkpoint, tmp_path / "folder")
        export(checkpoint, tmp_path / "folder", elsewhere)

    def test_nothing_is_overwritten(self, checkpoint: Path, tmp_path: Path) -> None:
        export(checkpoint, tmp_path / "folder")
        with pytest.raises(FileExistsError, match=r"holds config\.json, model\.safetensors already: give another"):
            export(checkpoint, tmp_path / "folder")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("model: {class_path: lightning_modules.LatentEncoding, init_args: {}}", "trains nothing that can be publ"),
            ("model: {init_args: {}}", r"lacks model\.class_path"),
            ("- 1", r"lacks model\.class_path"),
            ("model: {", "is no YAML"),
            (INIT_ARGS + "{tokenizer: ../t.yaml}}", r"tokenizer='\.\./t\.yaml' has no class_path; files that"),
            (INIT_ARGS + "{}}", r"model\.init_args\.tokenizer=None has no class_path"),
        ],
    )
    def test_other_configs(self, checkpoint: Path, tmp_path: Path, text: str, message: str) -> None:
        (checkpoint.parents[1] / "config.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            export(checkpoint, tmp_path / "folder")

    @pytest.mark.parametrize(
        ("class_path", "init_args", "message"),
        [
            ("maetok.Tokeniser", {}, "no attribute 'Tokeniser'"),
            ("nowhere.Tokenizer", {}, "No module named 'nowhere'"),
            ("maetok.Tokenizer", {"sides": 3}, "unexpected keyword argument 'sides'"),
        ],
    )
    def test_networks_that_cannot_be_built(
        self, checkpoint: Path, tmp_path: Path, class_path: str, init_args: dict[str, Any], message: str
    ) -> None:
        tokenizer = {"class_path": class_path, "init_args": init_args}
        config = {"model": {"class_path": STAGE_2, "init_args": {"tokenizer": tokenizer}}}
        (checkpoint.parents[1] / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(ValueError, match=rf"(?s)class_path={class_path} cannot be built .*{message}"):
            export(checkpoint, tmp_path / "folder")

    def test_weights_of_something_else(self, checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"--weights=raw: no weights model\.tokenizer\.\*.* but ema\.network\.tok"):
            export(checkpoint, tmp_path / "folder", weights="raw")
        config = {"model": {"class_path": STAGE_2, "init_args": tokenizer_config(latent_tokens=5)}}
        (tmp_path / "other.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(ValueError, match=r"(?s)to another network than the config describes.*size mismatch"):
            export(checkpoint, tmp_path / "folder", tmp_path / "other.yaml")
        assert not (tmp_path / "folder").exists()

    def test_damaged_checkpoints(self, checkpoint: Path, tmp_path: Path) -> None:
        whole = checkpoint.read_bytes()
        for content in (whole[: len(whole) // 2], b"", b"text"):
            checkpoint.write_bytes(content)
            with pytest.raises(ValueError, match="is not a complete checkpoint"):
                export(checkpoint, tmp_path / "folder")
        torch.save({"weights": {}}, checkpoint)
        with pytest.raises(ValueError, match="has no state_dict"):
            export(checkpoint, tmp_path / "folder")


def test_importing_the_library_imports_nothing_heavy() -> None:
    """The package imports without Lightning, and so does everything that it offers."""
    program = """
import sys
import maetok
assert not {"torch", "timm", "numpy", "yaml"} & sys.modules.keys()
from maetok import LightningDiT, SiT, Tokenizer, published_latent_moments, sample
assert sample is sys.modules["maetok.flow.sampling"].sample
import maetok.hub.export
assert not {"lightning", "jsonargparse"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
