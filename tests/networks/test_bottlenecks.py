"""Bottlenecks against closed forms."""

import torch
from torch.distributions import Normal, kl_divergence

from maetok.networks import KLBottleneck, PlainBottleneck, SoftVQBottleneck


def test_plain_is_a_projection_without_loss() -> None:
    bottleneck = PlainBottleneck(8, 3)
    tokens = torch.randn(2, 5, 8)
    latents, losses = bottleneck(tokens)
    torch.testing.assert_close(latents, tokens @ bottleneck.projection.weight.T + bottleneck.projection.bias)
    assert losses == {}


def test_kl_equals_torch_distributions() -> None:
    bottleneck = KLBottleneck(8, 3, weight=0.5)
    tokens = torch.randn(4, 5, 8)
    mean, log_variance = bottleneck.projection(tokens).chunk(2, -1)
    exact = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum((1, 2)).mean()
    torch.testing.assert_close(bottleneck(tokens)[1]["kl"], 0.5 * exact)


def test_kl_samples_with_the_posterior_moments_only_while_training() -> None:
    bottleneck = KLBottleneck(8, 3)
    tokens = torch.randn(1, 1, 8)
    mean, log_variance = bottleneck.projection(tokens).chunk(2, -1)
    samples = bottleneck(tokens.expand(20_000, 1, 8))[0]
    torch.testing.assert_close(samples.mean(0, keepdim=True), mean, atol=0.05, rtol=0)
    torch.testing.assert_close(samples.std(0, keepdim=True), (0.5 * log_variance).exp(), atol=0.05, rtol=0)
    torch.testing.assert_close(bottleneck.eval()(tokens)[0], mean)
    free = KLBottleneck(8, 3, sample=False)
    assert torch.equal(free(tokens)[0], free(tokens)[0])


def test_softvq_at_low_temperature_is_the_nearest_codeword() -> None:
    bottleneck = SoftVQBottleneck(8, 3, codebook_size=16, temperature=1e-4, l2_norm=False)
    tokens = torch.randn(2, 5, 8)
    projected = bottleneck.projection(tokens)
    nearest = torch.cdist(projected.flatten(0, 1), bottleneck.codebook).argmin(1)
    torch.testing.assert_close(bottleneck(tokens)[0].flatten(0, 1), bottleneck.codebook[nearest], atol=1e-4, rtol=0)


def test_softvq_at_high_temperature_is_the_mean_codeword_and_its_entropy_is_zero() -> None:
    bottleneck = SoftVQBottleneck(8, 3, codebook_size=16, temperature=1e6, entropy_weight=2.0, l2_norm=False)
    latents, losses = bottleneck(torch.randn(2, 5, 8))
    torch.testing.assert_close(latents, bottleneck.codebook.mean(0).expand(2, 5, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(losses["entropy"], torch.tensor(0.0), atol=1e-4, rtol=0)  # both entropies are log 16


def test_softvq_entropy_rewards_sharp_and_even_assignment() -> None:
    bottleneck = SoftVQBottleneck(3, 3, codebook_size=3, temperature=1e-3, entropy_weight=1.0)
    with torch.no_grad():
        bottleneck.codebook.copy_(torch.eye(3))
        bottleneck.projection.weight.copy_(torch.eye(3))
        bottleneck.projection.bias.zero_()
    _, losses = bottleneck(torch.eye(3)[None])  # each token sits on its own codeword
    torch.testing.assert_close(losses["entropy"], -torch.tensor(3.0).log(), atol=1e-4, rtol=0)


def test_a_posterior_is_drawn_on_request_and_by_the_given_generator() -> None:
    """encode(sample=True): mean and deviation of draws are the posterior's; a plain bottleneck has one value."""
    torch.manual_seed(0)
    bottleneck = KLBottleneck(6, 3).eval()
    tokens = torch.randn(1, 2, 6)
    mean, log_variance = bottleneck.posterior(tokens)
    draws = torch.stack([bottleneck.draw(tokens, torch.Generator().manual_seed(seed)) for seed in range(4000)])
    deviation = (0.5 * log_variance).exp()
    assert ((draws.mean(0) - mean).abs() < 5 * deviation / 4000**0.5).all()
    torch.testing.assert_close(draws.std(0), deviation, rtol=0.06, atol=0)
    assert torch.equal(draws[7], bottleneck.draw(tokens, torch.Generator().manual_seed(7)))
    assert torch.equal(bottleneck(tokens)[0], mean)
    plain = PlainBottleneck(6, 3)
    assert torch.equal(plain.draw(tokens), plain(tokens)[0])
