"""SiT gives the published numbers; both denoisers start at zero, train, and are as large as they should be."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningArgumentParser
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from maetok import LightningDiT, SiT
from maetok.networks import Denoiser, TransformerSize, drop_labels
from maetok.networks.denoiser.lightning_dit import rotary_angles, swiglu
from maetok.networks.denoiser.published_sit import to_published_name
from maetok.networks.denoiser.transformer import SIZES
from maetok.networks.layers.rope import rotate
from tests.conftest import DATA

FOLDERS = ["sit_small", "sit_small_qknorm", "sit_sampler"]
CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = TransformerSize(width=32, depth=2, num_heads=2)


def load(name: str) -> tuple[SiT, dict[str, torch.Tensor], dict]:
    path = DATA / name / "io.safetensors"
    with safe_open(path, "pt") as file:
        return SiT.from_pretrained(DATA / name), load_file(path), json.loads(file.metadata()["config"])


def assert_close(ours: torch.Tensor, published: torch.Tensor) -> None:
    torch.testing.assert_close(ours, published, atol=6e-6, rtol=0)


def small(kind: type[Denoiser], *, seed: int | None = None, **options) -> Denoiser:
    """A denoiser of 6 tokens with 4 channels and 10 classes; with a seed, all that starts at zero is random."""
    denoiser = kind(**({"latent_tokens": 6, "latent_channels": 4, "num_classes": 10, "size": SMALL} | options))
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in denoiser.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return denoiser


def batch(size: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(size, 6, 4), torch.rand(size), torch.arange(11 - size, 11)


BOTH = pytest.mark.parametrize("kind", [SiT, LightningDiT])


class TestPublishedNumbers:
    @pytest.mark.parametrize("name", FOLDERS)
    @torch.no_grad()
    def test_velocity(self, name: str) -> None:
        sit, golden, _ = load(name)
        assert not sit.training
        assert golden["t"][0] == 0
        assert golden["t"][1] == 1
        assert golden["y"][3] == sit.num_classes  # the null label
        assert_close(sit(golden["x"], golden["t"], golden["y"]), golden["v"])

    @torch.no_grad()
    def test_intermediates(self) -> None:
        sit, golden, _ = load("sit_small")
        parts = {"t_embedder": sit.time_embedder, "y_embedder": sit.label_embedder}
        parts |= {"block0": sit.blocks[0], "block0.attn": sit.blocks[0].attn, "block0.mlp": sit.blocks[0].mlp}
        parts |= {"block1": sit.blocks[1]}
        seen: dict[str, torch.Tensor] = {}
        for key, part in parts.items():
            part.register_forward_hook(lambda _m, _i, out, key=key: seen.update({f"mid.{key}": out}))
        sit(golden["x"], golden["t"], golden["y"])
        assert seen.keys() == {key for key in golden if key.startswith("mid.")}
        for key, ours in seen.items():
            assert_close(ours, golden[key])

    @pytest.mark.parametrize("name", FOLDERS)
    def test_new_positions_are_the_published_ones(self, name: str) -> None:
        _, golden, info = load(name)
        size = TransformerSize(info["hidden"], 1, info["heads"])
        assert_close(SiT(info["tokens"], info["channels"], 10, size).position_table.data, golden["pos_embed_init"])

    @pytest.mark.parametrize("name", ["sit_small", "sit_small_qknorm"])
    def test_training_step(self, name: str) -> None:
        sit, golden, info = load(name)
        sit.train()
        latents, labels = golden["loss.latents"], golden["loss.y"]
        torch.manual_seed(info["train_seed"])
        t, noise, uniform = torch.rand(len(latents), 1, 1), torch.randn_like(latents), torch.rand(len(latents))
        assert torch.equal(t.flatten(), golden["train.t"])
        assert torch.equal(noise, golden["train.noise"])
        dropped = drop_labels(labels, uniform, 0.1, sit.num_classes)
        assert torch.equal(dropped != labels, golden["train.label_dropped"])
        velocity = sit((1 - t) * latents + t * noise, t.flatten(), dropped)
        loss = (velocity - (noise - latents)).square().mean(dim=(1, 2))
        assert_close(loss, golden["train.loss"])
        loss.mean().backward()
        parameters = {to_published_name(ours): parameter for ours, parameter in sit.named_parameters()}
        assert parameters.keys() == set(info["grad_norm_names"])
        for published, norm in zip(info["grad_norm_names"], golden["train.grad_norms"], strict=True):
            gradient = parameters[published].grad
            if norm.isnan():
                assert published == "pos_embed"
                assert gradient is None
            else:
                # Key biases add the same to all logits of a query, so their gradient is rounding, about 1e-9.
                torch.testing.assert_close(gradient.double().norm(), norm, rtol=1e-4, atol=1e-8, msg=published)
        for key in (key for key in golden if key.startswith("train.grad.")):
            ours = parameters[key.removeprefix("train.grad.")].grad
            torch.testing.assert_close(ours, golden[key], rtol=1e-4, atol=1e-6)


class TestPublishedFolder:
    @pytest.mark.parametrize("name", FOLDERS)
    def test_round_trip_is_bit_exact(self, name: str, tmp_path: Path) -> None:
        sit, _, _ = load(name)
        sit.save_pretrained(tmp_path)
        before, after = (load_file(folder / "model.safetensors") for folder in (DATA / name, tmp_path))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (DATA / name, tmp_path))
        assert before == after

    @pytest.mark.parametrize("qk_norm", [False, True])
    def test_a_model_of_our_own_survives(self, qk_norm: bool, tmp_path: Path) -> None:
        sit = small(SiT, seed=1, qk_norm=qk_norm)
        sit.save_pretrained(tmp_path / "new")
        published = DATA / ("sit_small_qknorm" if qk_norm else "sit_small")
        config = json.loads((tmp_path / "new" / "config.json").read_text())
        assert config.keys() == json.loads((published / "config.json").read_text()).keys() - {
            "license",
            "repo_url",
            "tags",
        }
        names = load_file(tmp_path / "new" / "model.safetensors").keys()
        assert names == load_file(published / "model.safetensors").keys()
        inputs = batch()
        assert torch.equal(SiT.from_pretrained(tmp_path / "new")(*inputs), sit(*inputs))

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for file in ("config.json", "model.safetensors"):
            (tmp_path / file).write_bytes((DATA / "sit_small" / file).read_bytes())
        return tmp_path

    def change(self, folder: Path, **values) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    def test_missing_tensor(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors["pos_embed"]
        save_file(tensors, folder / "model.safetensors")
        with pytest.raises(ValueError, match=r"does not fit its config\.json: missing pos_embed\."):
            SiT.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["projector.weight", "position_table"])  # a name of ours is none of theirs
    def test_unknown_tensor(self, folder: Path, name: str) -> None:
        save_file(load_file(folder / "model.safetensors") | {name: torch.zeros(1)}, folder / "model.safetensors")
        with pytest.raises(ValueError, match=rf"does not fit its config\.json: unknown {name}\."):
            SiT.from_pretrained(folder)

    def test_missing_query_key_norms(self, folder: Path) -> None:
        self.change(folder, qk_norm=True)
        with pytest.raises(ValueError, match=r"missing blocks\.0\.attn\.q_norm\.weight.*and 3 more"):
            SiT.from_pretrained(folder)

    def test_other_sizes(self, folder: Path) -> None:
        self.change(folder, num_classes=1000)
        with pytest.raises(ValueError, match=r"y_embedder.embedding_table.weight has shape \(11, 96\), expected \(100"):
            SiT.from_pretrained(folder)

    @pytest.mark.parametrize(("key", "value"), [("vae_1d", False), ("patch_size", 2), ("path_type", "cosine")])
    def test_another_family(self, folder: Path, key: str, value: object) -> None:
        self.change(folder, **{key: value})
        with pytest.raises(ValueError, match=rf"{key}={value!r} is not supported in a published SiT, only "):
            SiT.from_pretrained(folder)

    def test_a_tokenizer_is_no_sit(self) -> None:
        with pytest.raises(ValueError, match="not the config of a published SiT: it lacks hidden_size, depth"):
            SiT.from_pretrained(DATA / "ae_plain_rope")

    def test_missing_and_truncated_files(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="not a complete safetensors file"):
            SiT.from_pretrained(folder)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors"):
            SiT.from_pretrained(folder)


class TestSizes:
    @pytest.mark.parametrize(
        ("kind", "size", "millions"),
        [
            (SiT, "S", 32.9),
            (SiT, "B", 130.4),
            (SiT, "L", 458.0),
            (SiT, "XL", 675.0),
            (LightningDiT, "B", 130.4),
            (LightningDiT, "XL", 675.0),
        ],
    )
    def test_parameters(self, kind: type[Denoiser], size: str, millions: float) -> None:
        with torch.device("meta"):
            denoiser = kind(size=SIZES[size])
        parameters = sum(parameter.numel() for parameter in denoiser.parameters())
        assert abs(parameters / 1e6 - millions) < 0.05

    @pytest.mark.parametrize("path", sorted((CONFIGS / "denoiser").glob("*_*.yaml")), ids=lambda path: path.stem)
    def test_configs(self, path: Path) -> None:
        parser = LightningArgumentParser()
        parser.add_subclass_arguments(Denoiser, "denoiser")
        text = path.read_text().replace("${shared.num_classes}", "1000").replace("../size/", f"{CONFIGS}/size/")
        config = parser.parse_object({"denoiser": yaml.safe_load(text)})
        config.denoiser.init_args.size.depth, depth = 1, config.denoiser.init_args.size.depth
        with torch.device("meta"):
            denoiser = parser.instantiate_classes(config).denoiser
        name, size = path.stem.split("_")
        assert type(denoiser) is {"sit": SiT, "lightningdit": LightningDiT}[name]
        expected = SIZES[size.upper()]
        assert (denoiser.size.width, depth, denoiser.size.num_heads) == (
            expected.width,
            expected.depth,
            expected.num_heads,
        )
        assert (denoiser.latent_tokens, denoiser.latent_channels, denoiser.num_classes) == (128, 32, 1000)

    def test_sizes_are_the_files_of_the_same_size(self) -> None:
        for name, file in {"S": "small", "B": "base", "L": "large", "XL": "xl"}.items():
            values = yaml.safe_load((CONFIGS / "size" / f"{file}.yaml").read_text())
            assert TransformerSize(**values) == SIZES[name]

    @pytest.mark.parametrize("size", SIZES.values())
    def test_swiglu_has_two_thirds_of_the_hidden_size(self, size: TransformerSize) -> None:
        with torch.device("meta"):
            mlp = swiglu(size)
        assert mlp.fc2.in_features == int(2 / 3 * 4 * size.width)
        assert mlp.fc1.out_features == 2 * mlp.fc2.in_features


@BOTH
class TestBoth:
    def test_velocity_is_zero_at_the_start(self, kind: type[Denoiser]) -> None:
        denoiser = small(kind)
        assert torch.equal(denoiser(*batch()), torch.zeros(3, 6, 4))
        tokens, condition = torch.randn(3, 6, 32), torch.randn(3, 32)
        assert torch.equal(denoiser.blocks[0](tokens, None, condition), tokens)  # gates are zero

    def test_null_label_is_a_label_of_its_own(self, kind: type[Denoiser]) -> None:
        denoiser = small(kind, seed=1)
        x, t = torch.randn(1, 6, 4).expand(11, -1, -1), torch.full((11,), 0.5)
        velocities = denoiser(x, t, torch.arange(11))
        assert len(torch.unique(velocities.flatten(1), dim=0)) == 11
        with pytest.raises(IndexError):
            denoiser(x[:1], t[:1], torch.tensor([11]))

    def test_samples_do_not_see_each_other(self, kind: type[Denoiser]) -> None:
        denoiser = small(kind, seed=1)
        x, t, labels = batch()
        together = denoiser(x, t, labels)
        one_by_one = torch.cat([denoiser(x[i : i + 1], t[i : i + 1], labels[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(one_by_one, together, atol=1e-5, rtol=1e-5)

    def test_tokens_are_told_apart_by_their_position(self, kind: type[Denoiser]) -> None:
        denoiser = small(kind, seed=1)
        x, t, labels = batch()
        torch.testing.assert_close(denoiser(x, t, labels), denoiser(x, t, labels))
        assert (denoiser(x.flip(1), t, labels).flip(1) - denoiser(x, t, labels)).abs().max() > 1e-3

    @pytest.mark.parametrize("qk_norm", [False, True])
    def test_plain_and_fused_attention_agree(
        self, kind: type[Denoiser], qk_norm: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        denoiser, inputs = small(kind, seed=1, qk_norm=qk_norm), batch()
        monkeypatch.setattr("maetok.networks.layers.attention.plain_is_faster", lambda *_: False)
        fused = denoiser(*inputs)
        monkeypatch.setattr("maetok.networks.layers.attention.plain_is_faster", lambda *_: True)
        torch.testing.assert_close(denoiser(*inputs), fused, atol=6e-6, rtol=0)

    @pytest.mark.parametrize("qk_norm", [False, True])
    def test_query_key_norm_makes_attention_scale_free(self, kind: type[Denoiser], qk_norm: bool) -> None:
        denoiser, tokens = small(kind, seed=1, qk_norm=qk_norm), torch.randn(2, 6, 32)
        attention = denoiser.blocks[0].attn
        before = attention(tokens)
        with torch.no_grad():
            attention.qkv.weight[:64] *= 100  # rows of queries and keys
            attention.qkv.bias[:64] *= 100
        assert torch.allclose(attention(tokens), before, atol=1e-3) is qk_norm

    def test_gradient_reaches_everything_by_the_third_step(self, kind: type[Denoiser]) -> None:
        denoiser = small(kind, qk_norm=True)
        optimizer = torch.optim.SGD((p for p in denoiser.parameters() if p.requires_grad), lr=0.1)
        inputs, target = batch(), torch.randn(3, 6, 4)
        reached: list[set[str]] = []
        for _ in range(3):
            optimizer.zero_grad()
            (denoiser(*inputs) - target).square().mean().backward()
            reached.append({name for name, p in denoiser.named_parameters() if p.grad is not None and p.grad.any()})
            optimizer.step()
        trained = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
        assert {name for name, _ in denoiser.named_parameters()} - trained <= {"position_table"}
        output = {"final_layer.linear.weight", "final_layer.linear.bias"}
        assert reached[0] == output
        # Gates and modulation are zero still: what is behind them has to wait for one more step.
        behind_gates = {name for name in trained if ".attn." in name or ".mlp." in name or ".norm" in name}
        conditioning = {name for name in trained if "_embedder." in name}
        final_norm = {"final_layer.norm.weight"} & trained
        assert reached[1] == trained - (behind_gates - final_norm) - conditioning
        assert reached[2] == trained

    def test_activation_checkpointing_gives_equal_gradients(self, kind: type[Denoiser]) -> None:
        plain = small(kind, seed=1)
        saving, inputs = copy.deepcopy(plain), batch()
        saving.set_activation_checkpointing(True)
        calls = []
        saving.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
        for denoiser in (plain, saving):
            denoiser(*inputs).square().mean().backward()
        assert len(calls) == 2  # once more in the backward pass
        for ours, expected in zip(saving.parameters(), plain.parameters(), strict=True):
            assert (ours.grad is None) == (expected.grad is None)
            if ours.grad is not None:
                assert torch.equal(ours.grad, expected.grad)

    def test_compiled_blocks_compute_the_same(self, kind: type[Denoiser], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
        plain = small(kind, seed=1, size=TransformerSize(32, 1, 2), qk_norm=True)
        compiled, inputs = copy.deepcopy(plain), batch()
        compiled.compile_blocks()
        assert all(block._compiled_call_impl for block in compiled.blocks())
        assert compiled.state_dict().keys() == plain.state_dict().keys()
        velocities = [denoiser(*inputs) for denoiser in (compiled, plain)]
        torch.testing.assert_close(*velocities, atol=1e-5, rtol=1e-5)
        for velocity in velocities:
            velocity.square().mean().backward()
        gradients = [denoiser.blocks[0].modulation.weight.grad for denoiser in (compiled, plain)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)

    def test_bfloat16_autocast_keeps_sums_in_float32(self, kind: type[Denoiser]) -> None:
        denoiser, inputs, seen = small(kind, seed=1, qk_norm=True), batch(), []
        expected = denoiser(*inputs)
        denoiser.final_layer.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].dtype))
        denoiser.blocks[0].attn.qkv.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            velocity = denoiser(*inputs)
        assert seen == [torch.bfloat16, torch.float32]
        assert velocity.dtype == torch.float32
        torch.testing.assert_close(velocity, expected, atol=0.05 * expected.abs().max().item(), rtol=0)

    def test_shapes_that_do_not_fit_are_refused(self, kind: type[Denoiser]) -> None:
        denoiser, (x, t, labels) = small(kind), batch()
        with pytest.raises(ValueError, match=r"latents have shape \(3, 5, 4\), expected \(B, 6, 4\)"):
            denoiser(x[:, :5], t, labels)
        with pytest.raises(ValueError, match=r"t has shape \(\), expected \(3,\)"):
            denoiser(x, t[0], labels)
        for wrong, got in (
            (labels[:1], r"\(1,\) torch.int64"),
            (labels.float(), r"\(3,\) torch.float32"),
            (None, "None"),
        ):
            with pytest.raises(ValueError, match=rf"labels must be \(3,\) integers, .*; got {got}"):
                denoiser(x, t, wrong)
        with pytest.raises(ValueError, match="width=32 is not divisible by num_heads=3"):
            small(kind, size=TransformerSize(32, 1, 3))


def test_widths_that_have_no_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="even width, got 33"):
        small(SiT, size=TransformerSize(33, 1, 3))
    with pytest.raises(ValueError, match="divisible by 2, got 11"):
        small(LightningDiT, size=TransformerSize(33, 1, 3))


def test_the_contract_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Denoiser(6, 4, 10)


@BOTH
def test_a_denoiser_without_labels_has_no_null_condition(kind: type[Denoiser]) -> None:
    x, t, labels = batch()
    denoiser, labelled = small(kind, seed=1, num_classes=None), small(kind, seed=1)
    assert set(labelled.state_dict()) - set(denoiser.state_dict()) == {"label_embedder.weight"}
    assert small(kind, num_classes=0).num_classes is denoiser.num_classes is None
    assert torch.equal(denoiser(x, t), denoiser(x, t, labels))
    assert not torch.equal(denoiser(x, t), denoiser(x, 1 - t))
    assert denoiser.condition_of({"labels": labels}) is None
    assert denoiser.drop_condition(None, t, 1.0) is None
    assert not denoiser.has_null_condition
    with pytest.raises(ValueError, match=r"\(num_classes: null\), so classifier-free guidance is impossible"):
        denoiser.without_condition(None)


def test_a_denoiser_with_labels_owns_its_null_condition() -> None:
    denoiser, (_, _, labels) = small(SiT), batch()
    assert denoiser.condition_of({"labels": labels, "latents": None}) is labels
    uniform = torch.tensor([0.0, 0.2, 0.05])
    assert torch.equal(denoiser.drop_condition(labels, uniform, 0.1), drop_labels(labels, uniform, 0.1, 10))
    assert denoiser.drop_condition(labels, uniform, 0.1).tolist() == [10, 9, 10]
    assert denoiser.without_condition(labels).tolist() == [10, 10, 10]


def test_a_model_without_labels_survives_the_published_format(tmp_path: Path) -> None:
    sit, (x, t, _) = small(SiT, seed=1, num_classes=None), batch()
    sit.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["num_classes"], config["class_dropout_prob"]) == (None, 0.0)
    assert torch.equal(SiT.from_pretrained(tmp_path)(x, t), sit(x, t))


def test_dropped_labels() -> None:
    labels, uniform = torch.tensor([0, 1, 2, 3]), torch.tensor([0.0, 0.09, 0.1, 0.9])
    dropped = drop_labels(labels, uniform, 0.1, 10)
    assert dropped.tolist() == [10, 10, 2, 3]
    assert dropped.dtype == torch.int64
    assert torch.equal(drop_labels(labels, uniform, 0.0, 10), labels)
    assert drop_labels(labels, uniform, 1.0, 10).tolist() == [10] * 4


def test_time_embedding_is_the_closed_form() -> None:
    embedder, seen = small(SiT).time_embedder, []
    embedder.mlp[0].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    embedder(torch.tensor([0.0, 0.7]))
    angles = [0.7 * 10000 ** (-i / 128) for i in range(128)]
    expected = torch.tensor([[1.0] * 128 + [0.0] * 128, [*map(math.cos, angles), *map(math.sin, angles)]])
    torch.testing.assert_close(seen[0], expected, atol=1e-6, rtol=0)


class TestRotaryPositions:
    def rotated(self, vector: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The same vector at all positions: (1, T, head_dim)."""
        angles = rotary_angles(positions, vector.shape[-1])[None].to(vector.dtype)
        return rotate(vector.expand(1, len(positions), -1), (angles.cos(), angles.sin()))

    def test_logits_depend_on_the_distance_only(self) -> None:
        query, key = torch.randn(2, 8, dtype=torch.float64)
        for shift in (0, 5):
            positions = torch.arange(7) + shift
            logits = (self.rotated(query, positions) @ self.rotated(key, positions).transpose(-2, -1))[0]
            if not shift:
                unshifted = logits
        torch.testing.assert_close(logits, unshifted, atol=1e-5, rtol=0)  # angles are float32
        for distance in range(-6, 7):
            diagonal = logits.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-5, rtol=0)
        assert logits[0].std() > 0.1

    def test_angles_are_the_closed_form(self) -> None:
        angles = rotary_angles(torch.arange(128), 72)
        expected = torch.tensor([[p * 10000 ** (-i / 36) for i in range(36)] for p in range(128)])
        torch.testing.assert_close(angles, expected, atol=1e-4, rtol=1e-6)

    def test_every_block_and_head_gets_the_same_rotation(self) -> None:
        denoiser = small(LightningDiT)
        rotations = denoiser.rotations(torch.zeros(3, 6, 32))
        assert len(rotations) == SMALL.depth
        assert all(part.shape == (1, 6, 8) for rotation in rotations for part in rotation)
        angles = rotary_angles(torch.arange(6), 16)[None]
        assert torch.equal(rotations[1][0], angles.cos())
        assert torch.equal(rotations[1][1], angles.sin())
