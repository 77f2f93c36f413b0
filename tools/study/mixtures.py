"""Theorem 2.1 of the paper in miniature: how well a SiT learns a mixture of K Gaussians from n samples.

The theorem bounds the number of samples that a diffusion model needs by a polynomial in K. The exact velocity of a
mixture of unit Gaussians with means on a sphere of radius B is known, so ``python -m tools.study.mixtures`` measures
the error of a trained SiT against the truth.
"""

import argparse
import itertools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maetok import SiT
from maetok.flow import FlowObjective
from maetok.networks import TransformerSize

TOKENS, CHANNELS = 4, 2
COMPONENTS = (1, 2, 4, 8, 16, 32)
SAMPLES = (125, 500, 2000)


@dataclass(frozen=True)
class GaussianMixture:
    """A mixture of equally likely unit Gaussians in d dimensions with means (K, d) of norm B."""

    means: Tensor

    @classmethod
    def random(cls, components: int, radius: float, rng: torch.Generator) -> "GaussianMixture":
        """Draw the means uniformly from the sphere of this radius in TOKENS * CHANNELS dimensions."""
        directions = torch.randn(components, TOKENS * CHANNELS, generator=rng, dtype=torch.float64)
        return cls(radius * directions / directions.norm(dim=1, keepdim=True))

    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        """Draw samples (count, d) float64."""
        component = torch.randint(len(self.means), (count,), generator=rng)
        return self.means[component] + torch.randn(count, self.means.shape[1], generator=rng, dtype=torch.float64)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """Return E[noise - data | x_t = x] on the linear path x_t = (1 - t) data + t noise.

        Given the component, data and noise are jointly normal: x_t has mean (1 - t) m and variance s = (1 - t)^2 + t^2.
        Therefore E[noise - data | x, m] = -m + (2 t - 1) / s * (x - (1 - t) m).

        Args:
            x: (n, d) float64.
            t: (n,) float64 in [0, 1].
        """
        t = t[:, None]
        variance = (1 - t).square() + t.square()
        offsets = x[:, None] - (1 - t)[:, None] * self.means  # (n, K, d)
        posterior = (-offsets.square().sum(-1) / (2 * variance)).softmax(dim=1)  # (n, K)
        velocities = -self.means + ((2 * t - 1) / variance)[:, None] * offsets
        return (posterior[..., None] * velocities).sum(1)


def velocity_error(components: int, samples: int, seed: int, steps: int, radius: float) -> float:
    """Train a SiT on ``samples``; return its mean squared error per dimension at x_t of new samples, t in [0, 1]."""
    rng = torch.Generator().manual_seed(1000 * seed + components)
    mixture = GaussianMixture.random(components, radius, rng)
    data = mixture.sample(samples, rng).float().unflatten(1, (TOKENS, CHANNELS))
    torch.manual_seed(seed)
    denoiser = SiT(TOKENS, CHANNELS, num_classes=1, size=TransformerSize(64, 3, 4)).train()
    optimizer = torch.optim.AdamW(denoiser.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    objective, rows = FlowObjective(), 128
    labels = torch.zeros(rows, dtype=torch.int64)
    for _ in range(steps):
        batch = data[torch.randint(samples, (rows,), generator=rng)]
        noise = torch.randn(batch.shape, generator=rng)
        losses, _ = objective.loss(denoiser, batch, noise, torch.rand(rows, generator=rng), labels)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return true_error(denoiser.eval(), mixture, rng)


@torch.no_grad()
def true_error(denoiser: SiT, mixture: GaussianMixture, rng: torch.Generator, count: int = 4096) -> float:
    """Return the mean squared error of the predicted velocity for new samples at times (i + 1/2) / count."""
    data = mixture.sample(count, rng)
    t = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    noise = torch.randn(data.shape, generator=rng, dtype=torch.float64)
    x = (1 - t)[:, None] * data + t[:, None] * noise
    labels = torch.zeros(count, dtype=torch.int64)
    predicted = denoiser(x.float().unflatten(1, (TOKENS, CHANNELS)), t.float(), labels).flatten(1)
    return float((predicted - mixture.velocity(x, t)).square().mean())


@dataclass(frozen=True)
class Point:
    """Holds one measurement."""

    components: int
    samples: int
    seed: int
    error: float


def measure(path: Path, seeds: int, steps: int, radius: float) -> list[Point]:
    """Return all measurements; each is stored at once, and stored measurements are not repeated."""
    settings = {"steps": steps, "radius": radius}
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    points = [Point(**point) for point in stored.get("points", [])] if stored.get("settings") == settings else []
    known = {(point.components, point.samples, point.seed) for point in points}
    for key in itertools.product(COMPONENTS, SAMPLES, range(seeds)):
        if key not in known:
            points.append(Point(*key, velocity_error(*key, steps, radius)))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"settings": settings, "points": [asdict(point) for point in points]}, indent=1))
            print(points[-1], flush=True)
    return points


def draw(points: list[Point], path: Path) -> None:
    """Draw the error against the number of components, a line per number of samples: mean and range over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for samples in SAMPLES:
        errors = [[p.error for p in points if (p.components, p.samples) == (k, samples)] for k in COMPONENTS]
        means = [sum(values) / len(values) for values in errors]
        axes.fill_between(COMPONENTS, [min(v) for v in errors], [max(v) for v in errors], alpha=0.2)
        axes.plot(COMPONENTS, means, marker="o", label=f"{samples} samples")
    axes.set(xscale="log", yscale="log", xlabel="components K", ylabel="squared velocity error per dimension")
    axes.set_xticks(COMPONENTS, [str(k) for k in COMPONENTS])
    axes.minorticks_off()
    axes.legend()
    figure.savefig(path, dpi=120)


def main(args: list[str] | None = None) -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(prog="python -m tools.study.mixtures", description=__doc__)
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--steps", default=500, type=int)
    parser.add_argument("--radius", default=6.0, type=float, help="norm B of the means")
    parser.add_argument("--output", default=Path("docs/study_mixtures"), type=Path, help="write OUTPUT.json and .png")
    options = parser.parse_args(args)
    points = measure(options.output.with_suffix(".json"), options.seeds, options.steps, options.radius)
    draw(points, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
