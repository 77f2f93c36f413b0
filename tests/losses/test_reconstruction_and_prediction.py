"""Pixel losses, the whole objective and masked prediction against closed forms."""

import pytest
import torch
import torch.nn.functional as F

from maetok.losses import LossWeights, ReconstructionObjective, masked_prediction_loss, pixel_loss


def test_pixel_losses() -> None:
    a, b = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)
    assert pixel_loss(a, b, "l1") == 0.5
    assert pixel_loss(a, b, "l2") == 0.25


class TestObjective:
    """Test weights, names and the losses that the objective builds."""

    layer = torch.nn.Linear(3, 3)
    images = torch.rand(2, 3, 4, 4)

    def reconstruct(self) -> torch.Tensor:
        return self.layer(self.images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def test_without_discriminator_only_pixels_count(self) -> None:
        objective = ReconstructionObjective(LossWeights(2.0, 0.0, 0.4), discriminator_start=0)
        reconstructions = self.reconstruct()
        total, terms = objective.autoencoder(reconstructions, self.images, self.layer.weight)
        torch.testing.assert_close(total, 2 * (reconstructions - self.images).square().mean())
        assert terms.keys() == {"reconstruction"}

    def test_adversarial_term_is_weighted_adaptively(self) -> None:
        objective = ReconstructionObjective(LossWeights(1.0, 0.0, 0.4))
        reconstructions = self.reconstruct()
        total, terms = objective.autoencoder(
            reconstructions, self.images, self.layer.weight, lambda x: x.flatten(1), torch.rand(2, 7)
        )
        pixel, adversarial = terms["reconstruction"], terms["adversarial"]
        torch.testing.assert_close(adversarial, -reconstructions.mean())
        torch.testing.assert_close(total, pixel + 0.4 * terms["adaptive_weight"] * adversarial)
        ratio = terms["reconstruction_gradient"] / terms["adversarial_gradient"]
        torch.testing.assert_close(terms["adaptive_weight"], ratio, rtol=1e-3, atol=0)
        assert not any(term.requires_grad for term in terms.values())

    def test_networks_without_weight_are_not_built(self) -> None:
        def explode() -> None:
            raise AssertionError("built")

        ReconstructionObjective(LossWeights(perceptual=0.0), perceptual=explode)
        with pytest.raises(AssertionError, match="built"):
            ReconstructionObjective(LossWeights(perceptual=1.0), perceptual=explode)
        with pytest.raises(ValueError, match=r"weights\.perceptual=1\.0 needs a perceptual loss"):
            ReconstructionObjective(LossWeights(perceptual=1.0))


class TestMaskedPrediction:
    """Only masked patches count."""

    predictions, targets = torch.randn(2, 3, 5, 7).unbind(0)
    mask = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)

    def test_mse_over_masked_patches(self) -> None:
        expected = (self.predictions - self.targets)[self.mask].square().mean()
        torch.testing.assert_close(masked_prediction_loss(self.predictions, self.targets, self.mask, "mse"), expected)

    def test_cosine_is_half_the_squared_distance_of_unit_vectors_minus_one(self) -> None:
        value = masked_prediction_loss(self.predictions, self.targets, self.mask, "cosine")
        unit = [F.normalize(values[self.mask], dim=-1) for values in (self.predictions, self.targets)]
        torch.testing.assert_close(value, (unit[0] - unit[1]).square().sum(-1).mean() / 2 - 1)

    def test_unmasked_patches_get_no_gradient(self) -> None:
        predictions = self.predictions.clone().requires_grad_()
        masked_prediction_loss(predictions, self.targets, self.mask, "mse").backward()
        touched = predictions.grad.abs().sum(-1) > 0
        assert torch.equal(touched, self.mask)

    def test_no_mask_counts_all_and_an_empty_mask_counts_nothing(self) -> None:
        everything = masked_prediction_loss(self.predictions, self.targets, None, "mse")
        torch.testing.assert_close(everything, (self.predictions - self.targets).square().mean())
        assert masked_prediction_loss(self.predictions, self.targets, torch.zeros_like(self.mask), "mse") == 0

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(ValueError, match=r"\(3, 5, 7\) and targets \(3, 4, 7\) differ"):
            masked_prediction_loss(self.predictions, self.targets[:, :4], self.mask, "mse")
