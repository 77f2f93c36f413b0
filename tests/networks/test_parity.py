"""Published tokenizers give the published numbers (tolerances: tests/data/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from maetok import Tokenizer
from maetok.networks.layers.rope import rotate
from maetok.networks.tokenizer.published import to_our_name, to_published_name
from tests.conftest import DATA

FOLDERS = sorted(path.name for path in DATA.glob("ae_*"))
assert len(FOLDERS) >= 6, f"{DATA} holds only {FOLDERS}: MAETOK_TEST_DATA must name a folder of reference tensors"
WITH_INTERMEDIATES = ["ae_movq_rope", "ae_plain_rope"]


def reference(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    path = DATA / name / "io.safetensors"
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()["config"])


def load(name: str) -> tuple[Tokenizer, dict[str, torch.Tensor], dict]:
    tensors, info = reference(name)
    return Tokenizer.from_pretrained(DATA / name, **info["arch_override"]), tensors, info


def assert_close(ours: torch.Tensor, published: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, published, atol=tolerance, rtol=0)


def test_all_goldens_are_here() -> None:
    assert len(FOLDERS) == 6


@pytest.mark.parametrize("name", FOLDERS)
@torch.no_grad()
def test_encode_and_decode(name: str) -> None:
    tokenizer, golden, _ = load(name)
    latents = tokenizer.encode(golden["x"])
    assert_close(latents, golden["z"])
    assert_close(tokenizer.decode(golden["z"]), golden["recon"])
    assert_close(tokenizer(golden["x"]), golden["recon"])
    assert_close(tokenizer.decode(golden["z_random"]), golden["recon_of_z_random"])


@torch.no_grad()
def test_masked_encode() -> None:
    tokenizer, golden, _ = load("ae_movq_rope")
    assert_close(tokenizer.encode(golden["x"], golden["mask"]), golden["z_masked"])


@pytest.mark.parametrize("name", [name for name in FOLDERS if name != "ae_plain_ape"])
@torch.no_grad()
def test_rope(name: str) -> None:
    tokenizer, golden, _ = load(name)
    rope = tokenizer.encoder.rope
    angles = rope.angles(tokenizer.grid)
    assert_close(angles.cos(), golden["encoder.rope_angle_cos"])
    assert_close(angles.sin(), golden["encoder.rope_angle_sin"])
    first_layer = rope(tokenizer.grid, 0, 0, torch.float32)[0]
    assert_close(rotate(golden["rope.q_in"], first_layer), golden["rope.q_out"])
    assert_close(rotate(golden["rope.k_in"], first_layer), golden["rope.k_out"])


@pytest.mark.parametrize("name", WITH_INTERMEDIATES)
@torch.no_grad()
def test_intermediates(name: str) -> None:
    tokenizer, golden, _ = load(name)
    seen: dict[str, torch.Tensor] = {}
    for part in ("encoder", "decoder"):
        for number, block in enumerate(getattr(tokenizer, part).blocks):
            block.register_forward_hook(lambda _m, _i, out, key=f"mid.{part}.block{number}": seen.update({key: out}))
    tokenizer.decoder.norm.register_forward_hook(lambda _m, _i, out: seen.update({"mid.decoder.norm": out}))
    tokenizer(golden["x"])
    seen["mid.encoder.tokens_in"] = tokenizer.encoder.embed(golden["x"], None)
    seen["mid.decoder.tokens_in"] = tokenizer.decoder.embed(golden["z"], tokenizer.grid)
    seen["mid.encoder.patch_embed"] = tokenizer.encoder.patch_embedding(golden["x"]).flatten(2).transpose(1, 2)
    latents = golden["z"].shape[1]
    seen["mid.encoder.norm"] = tokenizer.encoder(golden["x"])
    last = len(tokenizer.encoder.blocks) - 1
    for key in (
        "mid.encoder.norm",
        f"mid.encoder.block{last}",
    ):  # the last block computes only the used tokens
        golden[key] = golden[key][:, -latents:]
    for key in ("mid.decoder.norm", f"mid.decoder.block{last}"):
        golden[key] = golden[key][:, :-latents]
    expected = {key for key in golden if key.startswith("mid.")}
    assert set(seen) == expected
    for key in expected:
        assert_close(seen[key], golden[key])


@pytest.mark.parametrize("name", WITH_INTERMEDIATES)
def test_gradients(name: str) -> None:
    tokenizer, golden, info = load(name)
    loss = (tokenizer(golden["x"]) - golden["x"]).square().mean()
    assert_close(loss, golden["grad.loss"])
    loss.backward()
    parameters = dict(tokenizer.named_parameters())
    compared = 0
    for published, norm in zip(info["grad_norm_names"], golden["grad.norms"], strict=True):
        parameter = parameters.get(to_our_name(published))
        if norm.isnan() or norm == 0 or published == "encoder.mask_token":  # unused there
            assert parameter is None or parameter.grad is None, published
            continue
        torch.testing.assert_close(parameter.grad.double().norm(), norm, rtol=1e-4, atol=1e-9)
        compared += 1
    assert compared > 60
    for key in (key for key in golden if key.startswith("grad.") and key not in ("grad.loss", "grad.norms")):
        ours = parameters[to_our_name(key.removeprefix("grad."))].grad
        torch.testing.assert_close(ours.reshape(golden[key].shape), golden[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", FOLDERS)
def test_round_trip_is_bit_exact(name: str, tmp_path: Path) -> None:
    tokenizer, golden, _ = load(name)
    tokenizer.save_pretrained(tmp_path)
    before, after = load_file(DATA / name / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    config, written = (json.loads((folder / "config.json").read_text()) for folder in (DATA / name, tmp_path))
    assert all(written[key] == value for key, value in config.items())
    again = Tokenizer.from_pretrained(tmp_path)  # the written config holds the true sizes
    assert torch.equal(again.encode(golden["x"]), tokenizer.encode(golden["x"]))


@pytest.mark.parametrize("name", FOLDERS)
def test_names_map_both_ways(name: str) -> None:
    tokenizer, _, _ = load(name)
    for ours in tokenizer.state_dict():
        assert to_our_name(to_published_name(ours)) == ours


def test_tokenizer_of_our_own_survives_the_published_format(tmp_path: Path) -> None:
    from maetok.networks import PlainBottleneck, TransformerSize

    tokenizer = Tokenizer(
        (32, 32), 8, 4, lambda width: PlainBottleneck(width, 6), TransformerSize(32, 2, 2), TransformerSize(48, 1, 3)
    ).eval()
    tokenizer.save_pretrained(tmp_path)
    published = load_file(DATA / "ae_plain_rope" / "model.safetensors")
    depth_one = {name for name in published if "decoder.model.blocks.1." not in name}
    assert load_file(tmp_path / "model.safetensors").keys() == depth_one | {"encoder.mask_token"}
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    torch.testing.assert_close(Tokenizer.from_pretrained(tmp_path)(images), tokenizer(images), atol=1e-6, rtol=0)


class TestErrors:
    """Errors name the fault of a folder, the file and the remedy."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for file in ("config.json", "model.safetensors"):
            (tmp_path / file).write_bytes((DATA / "ae_plain_ape" / file).read_bytes())
        return tmp_path

    SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3}  # noqa: RUF012

    def test_no_such_folder(self) -> None:
        with pytest.raises(FileNotFoundError, match="no such folder"):
            Tokenizer.from_pretrained("/nowhere/at/all")

    def test_missing_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
            Tokenizer.from_pretrained(folder)

    def test_truncated_weights(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            Tokenizer.from_pretrained(folder, **self.SIZES)

    def test_another_kind_of_model(self, folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"hidden_size": 96, "depth": 2}))
        with pytest.raises(ValueError, match="not the config of a published tokenizer: it lacks encoder_model"):
            Tokenizer.from_pretrained(folder)

    def test_wrong_size_names_the_remedy(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="pass embed_dim="):
            Tokenizer.from_pretrained(folder, embed_dim=96, depth=2, num_heads=3)

    @pytest.mark.parametrize("change", ["missing", "unknown"])
    def test_keys_are_strict(self, folder: Path, change: str) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["quant_conv.bias_" if change == "unknown" else "unrelated"] = tensors.pop("quant_conv.bias")
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match=rf"{change} .*quant_conv\.bias"):
            Tokenizer.from_pretrained(folder, **self.SIZES)

    def test_unknown_override(self, folder: Path) -> None:
        with pytest.raises(TypeError, match="unknown override 'embed_dims'"):
            Tokenizer.from_pretrained(folder, embed_dims=48)

    def test_unsupported_bottleneck_cannot_be_exported(self, tmp_path: Path) -> None:
        from maetok.networks import KLBottleneck, TransformerSize

        tokenizer = Tokenizer(16, 8, 2, KLBottleneck, TransformerSize(16, 1, 2), TransformerSize(16, 1, 2))
        with pytest.raises(ValueError, match="KLBottleneck"):
            tokenizer.save_pretrained(tmp_path)
