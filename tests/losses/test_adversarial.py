"""Adversarial losses against closed forms, and the state of LeCAM."""

import pytest
import torch
import torch.nn.functional as F

from maetok.losses import AdversarialLoss, DiffAugment, LeCAM, adaptive_weight, autoencoder_loss, discriminator_loss


def test_hinge_by_hand() -> None:
    real, fake = torch.tensor([[2.0, 0.5]]), torch.tensor([[-2.0, 0.0]])
    torch.testing.assert_close(discriminator_loss(real, fake), torch.tensor(0.5 * (0.25 + 0.5)))
    torch.testing.assert_close(autoencoder_loss(fake), torch.tensor(1.0))


def test_non_saturating_is_binary_cross_entropy_with_logits_first() -> None:
    real, fake = torch.randn(4, 3), torch.randn(4, 3)
    entropy = F.binary_cross_entropy_with_logits
    expected = 0.5 * (entropy(real, torch.ones_like(real)) + entropy(fake, torch.zeros_like(fake)))
    torch.testing.assert_close(discriminator_loss(real, fake, "non_saturating"), expected)
    torch.testing.assert_close(autoencoder_loss(fake, "non_saturating"), entropy(fake, torch.ones_like(fake)))


def test_adaptive_weight_balances_gradients_at_the_last_layer() -> None:
    layer = torch.nn.Linear(4, 4)
    hidden = torch.randn(8, 4)
    output = layer(hidden)
    reconstruction, adversarial = 3.0 * output.sum(), -0.5 * output.sum()
    weight, norms = adaptive_weight(reconstruction, adversarial, layer.weight)
    torch.testing.assert_close(weight, torch.tensor(6.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(norms["reconstruction_gradient"], 6 * norms["adversarial_gradient"])
    assert not weight.requires_grad
    assert layer.weight.grad is None
    assert adaptive_weight(reconstruction, adversarial, layer.weight, maximum=2.0)[0] == 2.0


def test_lecam_by_hand_and_its_state() -> None:
    lecam = LeCAM(decay=0.75)
    real, fake = torch.tensor([[2.0], [4.0]]), torch.tensor([[-1.0], [-3.0]])
    value = lecam(real, fake)
    # averages: 0.25 * 3 = 0.75 and 0.25 * -2 = -0.5
    expected = ((2.5**2 + 4.5**2) + (1.75**2 + 3.75**2)) / 2
    torch.testing.assert_close(value, torch.tensor(expected))
    assert lecam.state_dict() == {"real_average": torch.tensor(0.75), "fake_average": torch.tensor(-0.5)}
    resumed = LeCAM(decay=0.75)
    resumed.load_state_dict(lecam.state_dict())
    torch.testing.assert_close(resumed(real, fake), lecam(real, fake))


def test_lecam_gradient_may_be_taken_after_the_next_update() -> None:
    lecam = LeCAM()
    real, fake = torch.randn(4, 2, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    first = lecam(real, fake)
    lecam(real, fake)
    first.backward()
    assert real.grad is not None


class TestAdversarialLoss:
    """Test the losses of both sides with a plain function as discriminator."""

    images, fakes = torch.rand(2, 4, 3, 8, 8).mul(2).sub(1).unbind(0)
    uniform = torch.rand(8, 7)

    @staticmethod
    def mean_colour(images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))

    def test_parts_sum_to_the_total(self) -> None:
        loss = AdversarialLoss(lecam_weight=0.1, consistency_weight=2.0, augment=DiffAugment())
        total, parts = loss.discriminator(self.mean_colour, self.images, self.fakes, self.uniform)
        torch.testing.assert_close(total, parts["adversarial"] + parts["lecam"] + parts["consistency"])
        assert {"real_logits", "fake_logits"} <= parts.keys()

    def test_consistency_is_the_distance_of_logits_with_and_without_augmentation(self) -> None:
        augment = DiffAugment()
        loss = AdversarialLoss(lecam_weight=0.0, consistency_weight=2.0, augment=augment)
        both = torch.cat((self.images, self.fakes))
        expected = 2 * (self.mean_colour(augment(both, self.uniform)) - self.mean_colour(both)).square().mean()
        parts = loss.discriminator(self.mean_colour, self.images, self.fakes, self.uniform)[1]
        torch.testing.assert_close(parts["consistency"], expected)

    def test_no_gradient_reaches_the_fakes_on_the_discriminators_side(self) -> None:
        fakes = self.fakes.clone().requires_grad_()
        scale = torch.ones(1, requires_grad=True)
        loss = AdversarialLoss()
        loss.discriminator(lambda x: scale * self.mean_colour(x), self.images, fakes, self.uniform)[0].backward()
        assert fakes.grad is None
        assert scale.grad is not None
        loss.autoencoder(self.mean_colour, fakes, self.uniform[:4]).backward()
        torch.testing.assert_close(fakes.grad, torch.full_like(fakes, -1 / (4 * 3 * 64)))


class TestDiffAugment:
    """Test augmentation as a function of its uniform numbers."""

    images = torch.rand(3, 3, 16, 16) * 2 - 1

    def test_neutral_numbers_change_nothing(self) -> None:
        neutral = torch.full((3, 7), 0.5)  # brightness 0, factors 1, shift 0
        torch.testing.assert_close(DiffAugment(cutout=0.0)(self.images, neutral), self.images, atol=1e-6, rtol=0)

    def test_shift_moves_pixels_and_fills_with_zero(self) -> None:
        uniform = torch.full((3, 7), 0.5)
        uniform[:, 3] = 0.999  # largest shift down: round(16 * 0.125) = 2 rows
        shifted = DiffAugment(color=False, cutout=0.0)(self.images, uniform)
        assert torch.equal(shifted[:, :, 2:], self.images[:, :, :-2])
        assert shifted[:, :, :2].abs().max() == 0

    def test_cutout_zeroes_a_square_of_the_given_share(self) -> None:
        uniform = torch.full((3, 7), 0.5)
        cut = DiffAugment(color=False, translation=0.0, cutout=0.25)(torch.ones(3, 3, 16, 16), uniform)
        assert (cut == 0).sum() == 3 * 3 * 4 * 4
        assert cut[:, :, 6:10, 6:10].abs().max() == 0

    def test_brightness_saturation_contrast_by_their_statistics(self) -> None:
        augment = DiffAugment(translation=0.0, cutout=0.0)
        uniform = torch.full((3, 7), 0.5)
        brighter, grey, flat = uniform.clone(), uniform.clone(), uniform.clone()
        brighter[:, 0], grey[:, 1], flat[:, 2] = 0.75, 0.0, 0.0
        torch.testing.assert_close(augment(self.images, brighter), self.images + 0.25, atol=1e-6, rtol=0)
        assert augment(self.images, grey).std(1).max() < 1e-6
        deviation = augment(self.images, flat).flatten(1).std(1) / self.images.flatten(1).std(1)
        torch.testing.assert_close(deviation, torch.full((3,), 0.5), atol=1e-5, rtol=0)

    def test_images_are_independent_and_differentiable(self) -> None:
        uniform = torch.rand(3, 7)
        images = self.images.clone().requires_grad_()
        together = DiffAugment()(images, uniform)
        torch.testing.assert_close(together[1:2], DiffAugment()(self.images[1:2], uniform[1:2]))
        together.sum().backward()
        assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("start", [0, 5])
def test_objective_plays_from_its_start(start: int) -> None:
    from maetok.losses import LossWeights, ReconstructionObjective

    objective = ReconstructionObjective(LossWeights(perceptual=0.0, adversarial=0.4), discriminator_start=start)
    assert [objective.discriminator_active(step) for step in (start - 1, start, start + 1)] == [False, True, True]
    without = ReconstructionObjective(LossWeights(perceptual=0.0, adversarial=0.0), discriminator_start=start)
    assert not without.discriminator_active(start + 1)
