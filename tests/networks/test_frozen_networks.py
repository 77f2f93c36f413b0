"""timm networks as teachers and discriminators: hidden, frozen, on the right grid, with the right input range."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from maetok.losses import LPIPSLoss, TimmPerceptualLoss
from maetok.networks import DINODiscriminator, PatchGAN, TimmTarget
from maetok.runtime.pretrained import Normalization, UnregisteredModule, channels_first, create_timm_model

VIT = "test_vit"
CONVNET = "test_resnet"


def test_teacher_runs_on_the_patch_grid_of_the_image() -> None:
    target = TimmTarget(patch_size=8, model_name=VIT)  # its own patches have 16 pixels
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    features = target(images)
    assert features.shape == (2, 4 * 6, target.dim)
    model = target.features.network.model
    resized = nn.functional.interpolate(images, size=(64, 96), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    expected = model.forward_features((resized * 0.5 + 0.5 - mean) / std)[:, model.num_prefix_tokens :]
    torch.testing.assert_close(features, expected)


def test_convolutional_teacher_is_resized_to_the_grid() -> None:
    target = TimmTarget(patch_size=8, model_name=CONVNET, loss="mse")
    features = target(torch.rand(2, 3, 64, 64) * 2 - 1)
    assert features.shape == (2, 64, target.dim)
    assert target.loss == "mse"


def test_channels_last_maps_are_turned() -> None:
    features = torch.randn(2, 4, 5, 7)
    assert torch.equal(channels_first(features, 4), features)
    assert torch.equal(channels_first(features.permute(0, 2, 3, 1), 4), features)


def test_perceptual_loss_takes_transformers_at_any_size() -> None:
    loss = TimmPerceptualLoss(VIT, stages=(1,))
    images = torch.rand(2, 3, 48, 64) * 2 - 1
    assert loss(images, images) == 0
    assert loss(-images, images) > 0


def test_teacher_pictures_are_colours_in_range() -> None:
    target = TimmTarget(patch_size=8, model_name=VIT)
    features = target(torch.rand(2, 3, 32, 32) * 2 - 1)
    picture = target.picture(features, (4, 4), features)
    assert picture.shape[:2] == (2, 3)
    assert picture.abs().max() <= 1


@pytest.mark.parametrize(
    "build", [lambda: TimmTarget(8, VIT), lambda: DINODiscriminator(VIT, layers=(0, 2), image_size=32)]
)
def test_backbones_are_hidden_from_checkpoints_and_optimizers(build) -> None:
    module = build()
    trained = list(module.parameters())
    frozen = module.features if isinstance(module, TimmTarget) else module.backbone
    assert isinstance(frozen, UnregisteredModule)
    assert not frozen.network.training
    assert not any(parameter.requires_grad for parameter in frozen.network.parameters())
    hidden = {id(parameter) for parameter in frozen.network.parameters()}
    assert hidden.isdisjoint(id(parameter) for parameter in trained)
    assert not any("model" in name for name in module.state_dict())
    module.train()
    assert not frozen.network.training


@pytest.mark.parametrize(
    "build",
    [lambda: DINODiscriminator(VIT, layers=(0, 2), image_size=32), lambda: PatchGAN(channels=8, layers=2)],
    ids=["dino", "patchgan"],
)
def test_discriminators_judge_each_image_alone_and_give_it_a_gradient(build) -> None:
    discriminator = build().eval()
    images = (torch.rand(3, 3, 32, 32) * 2 - 1).requires_grad_()
    logits = discriminator(images)
    assert logits.ndim == 2
    assert logits.dtype == torch.float32
    torch.testing.assert_close(discriminator(images[:1]), logits[:1], atol=1e-5, rtol=0)
    logits.sum().backward()
    assert images.grad.abs().sum() > 0
    assert all(parameter.grad is not None for parameter in discriminator.parameters())


def test_dino_discriminator_has_logits_of_every_depth_and_position() -> None:
    discriminator = DINODiscriminator(VIT, layers=(0, 2), image_size=32)
    assert discriminator(torch.rand(2, 3, 48, 48)).shape == (2, 2 * 4)
    with pytest.raises(ValueError, match="image_size=40 is not a multiple"):
        DINODiscriminator(VIT, layers=(0,), image_size=40)


def test_weights_load_from_a_local_file(tmp_path: Path) -> None:
    original = timm.create_model(VIT)
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    loaded = create_timm_model(VIT, pretrained=False, checkpoint_path=str(tmp_path / "weights.pth"))
    assert all(torch.equal(a, b) for a, b in zip(original.parameters(), loaded.parameters(), strict=True))


def test_a_local_file_is_used_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(timm.create_model(VIT).state_dict(), tmp_path / "weights.pth")
    asked = []
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: asked.append(k["pretrained"]) or create(*a, **k))
    create_timm_model(VIT, pretrained=True, checkpoint_path=str(tmp_path / "weights.pth"))
    assert asked == [False]


def test_missing_weights_name_model_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"test_vit.*set\s+checkpoint_path, or set pretrained: false"):
        create_timm_model(VIT, pretrained=False, checkpoint_path=str(tmp_path / "none.pth"))


def test_normalization_maps_range_to_statistics() -> None:
    model = nn.Module()
    model.pretrained_cfg = {"mean": (0.5, 0.25, 0.0), "std": (0.5, 0.5, 1.0)}
    black_and_white = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    expected = torch.tensor([[-1.0, -0.5, 0.0], [1.0, 1.5, 1.0]])
    torch.testing.assert_close(Normalization(model)(black_and_white).flatten(1), expected)


def test_timm_perceptual_loss_is_zero_for_equal_images_and_bounded() -> None:
    loss = TimmPerceptualLoss(CONVNET, stages=(1, 2))
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert loss(images, images) == 0
    others = (-images).requires_grad_()
    value = loss(others, images)
    assert 0 < value <= 4
    value.backward()
    assert others.grad.abs().sum() > 0
    assert not loss.state_dict()


def test_lpips_is_torchmetrics_with_local_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write AlexNet's file as torchvision's cache holds it, so that the real loading code reads it."""
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity
    from torchvision.models import AlexNet_Weights, alexnet

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(alexnet().state_dict(), folder / AlexNet_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1])
    loss = LPIPSLoss("alex")
    images, others = torch.rand(2, 2, 3, 64, 64).mul(2).sub(1).unbind(0)
    others.requires_grad_()
    value = loss(others, images)
    expected = learned_perceptual_image_patch_similarity(others.detach(), images, net_type="alex")
    torch.testing.assert_close(value.detach(), expected)
    value.backward()
    assert others.grad.abs().sum() > 0
    assert not loss.state_dict()


@pytest.mark.parametrize("net_type", ["squeeze", "alex"])
def test_lpips_takes_a_local_file_of_the_backbone(
    net_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, alexnet, squeezenet1_1

    build, file = {
        "squeeze": (squeezenet1_1, SqueezeNet1_1_Weights.IMAGENET1K_V1),
        "alex": (alexnet, AlexNet_Weights.IMAGENET1K_V1),
    }[net_type]
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    cached = folder / file.url.rsplit("/", 1)[1]
    torch.save(build().state_dict(), cached)
    from_cache, from_file = LPIPSLoss(net_type), LPIPSLoss(net_type, str(cached))
    images, others = torch.rand(2, 2, 3, 64, 64).mul(2).sub(1).unbind(0)
    assert torch.equal(from_file.per_image(others, images), from_cache.per_image(others, images))
    assert torch.allclose(from_file.per_image(others, images).mean(), from_cache(others, images))
    assert from_file.digest == from_cache.digest
    with pytest.raises(RuntimeError, match=r"checkpoint_path='nowhere\.pth'.*set checkpoint_path to it"):
        LPIPSLoss(net_type, "nowhere.pth")


def test_lpips_without_weights_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(RuntimeError, match=r"net_type='vgg'.*no network.*TORCH_HOME"):
        LPIPSLoss("vgg")
    images = torch.zeros(1, 3, 32, 32)
    assert LPIPSLoss("squeeze", pretrained=False)(images, images) == 0  # random weights need no file
