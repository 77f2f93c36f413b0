"""Initialise networks from another run, and compare weights by hash."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lightning_modules import LatentEncoding
from maetok import Tokenizer
from maetok.checkpoints.runs import InitFrom
from maetok.formats.channel_moments import ChannelMoments
from maetok.networks import TransformerSize
from maetok.runtime.weights import weights_hash

SIZE = TransformerSize(width=32, depth=1, num_heads=2)


def tokenizer(seed: int = 0, **options) -> Tokenizer:
    torch.manual_seed(seed)
    return Tokenizer(image_size=32, patch_size=8, latent_tokens=4, encoder=SIZE, decoder=SIZE, **options)


def save(path: Path, network: nn.Module, prefix: str = "ema.network.tokenizer.") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {f"{prefix}{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state | {"model.other": torch.zeros(1)}}, path)
    return path


class TestInitFrom:
    """Weights come from a file or from the newest checkpoint of a run, and must fit the network."""

    def test_newest_checkpoint_of_a_run(self, tmp_path: Path) -> None:
        for step, seed in ((9, 1), (10, 2)):
            save(tmp_path / "checkpoints" / f"step={step:09d}.ckpt", tokenizer(seed))
        save(tmp_path / "checkpoints" / ".step=000000011.ckpt.partial", tokenizer(3))
        task = LatentEncoding(tokenizer(), InitFrom(str(tmp_path)))
        assert task.tokenizer_hash == tokenizer(2).latents_hash()
        assert not any(parameter.requires_grad for parameter in task.parameters())
        one = InitFrom(str(tmp_path / "checkpoints" / "step=000000009.ckpt"))
        assert LatentEncoding(tokenizer(), one).tokenizer_hash == tokenizer(1).latents_hash()

    def test_errors_name_the_key_and_the_remedy(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"init_from\.path=nowhere is no checkpoint and no run directory"):
            InitFrom("nowhere").load(tokenizer())
        with pytest.raises(FileNotFoundError, match="no checkpoints in it; train that run first"):
            InitFrom(str(tmp_path)).load(tokenizer())
        path = save(tmp_path / "x.ckpt", tokenizer())
        with pytest.raises(
            ValueError, match=r"init_from\.prefix='model\.tokenizer\.': .* has no such weights, but ema"
        ):
            InitFrom(str(path), "model.tokenizer.").load(tokenizer())
        other = Tokenizer(image_size=32, patch_size=8, latent_tokens=5, encoder=SIZE, decoder=SIZE)
        with pytest.raises(
            ValueError, match=r"(?s)belong to another network than the config describes: .*size mismatch"
        ):
            InitFrom(str(path)).load(other)


class TestHash:
    """The hash changes if and only if the latents change."""

    def test_decoder_does_not_matter_but_encoder_and_bottleneck_do(self) -> None:
        network = tokenizer()
        before = network.latents_hash()
        assert before == tokenizer().latents_hash()
        with torch.no_grad():
            next(network.decoder.parameters()).add_(1)
        assert network.latents_hash() == before
        for part in (network.encoder, network.bottleneck):
            parameter = list(part.parameters())[-1]
            with torch.no_grad():
                parameter[0] += 1e-6
            assert network.latents_hash() != before
            with torch.no_grad():
                parameter[0] = 0
            before = network.latents_hash()

    def test_names_shapes_types_and_description_count(self) -> None:
        zeros = torch.zeros(2, 3)
        states = [{"a": zeros}, {"b": zeros}, {"a": zeros.T}, {"a": zeros.half()}, {"a": zeros + 1}]
        hashes = {weights_hash("", [state]) for state in states} | {weights_hash("x", [states[0]])}
        assert len(hashes) == 6
        assert weights_hash("", [{"a": zeros, "b": zeros}]) == weights_hash("", [{"b": zeros, "a": zeros}])


def test_mirrored_latents_are_those_of_the_mirrored_image() -> None:
    task = LatentEncoding(tokenizer())
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    batch = {"images": images, "valid": torch.tensor([True, False, True])}
    latents = task.predict_step(batch, 0)
    assert latents.shape == (2, 2, 4, 32)
    torch.testing.assert_close(latents[:, 0], task.encode(images[[0, 2]]))
    torch.testing.assert_close(latents[:, 1], task.encode(images[[0, 2]].flip(-1)))
    assert task.predict_step(batch | {"valid": torch.zeros(3, dtype=torch.bool)}, 0).shape == (0, 2, 4, 32)
    (only,) = LatentEncoding(tokenizer(), mirrored=False).predict_step(batch, 0).unbind(1)
    torch.testing.assert_close(only, latents[:, 0])


def test_statistics_do_not_depend_on_how_samples_are_divided() -> None:
    """Moments agree with numpy where the mean is large compared to the spread; the naive formula fails there."""
    values = np.random.default_rng(0).normal(1e6, [1e-2, 1.0], (1000, 4, 2))
    whole = ChannelMoments.of(values)
    for cuts in ([1], [300, 999], [10, 20, 30, 900]):
        parts = [ChannelMoments.of(part) for part in np.split(values, cuts)]
        merged = parts[0]
        for part in parts[1:]:
            merged = merged.merge(part)
        assert merged.count == 4000
        np.testing.assert_allclose(merged.mean, values.reshape(-1, 2).mean(0), rtol=1e-14)
        np.testing.assert_allclose(merged.std, values.reshape(-1, 2).std(0), rtol=1e-8)
    np.testing.assert_allclose(whole.std, values.reshape(-1, 2).std(0), rtol=1e-12)
