"""Measurements of each tokenizer of ``python -m tools.study``, once its runs are complete."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maetok.analysis.linear_probe import linear_probe_accuracy
from maetok.analysis.modes import ModeAnalysis, analyse_modes
from maetok.analysis.neighbours import neighbour_accuracy
from maetok.formats.latent_cache import LatentCache
from maetok.metrics.gaussians import Gaussian, Moments
from tools.study.runs import Cell

COMPONENT_COUNTS = (1, 2, 5, 10, 20, 40)
DIMENSIONS = 40
"""All tokenizers keep this many, which explain more than 90 % of the variance of each (reported)."""


@dataclass(frozen=True)
class Measures:
    """Holds the numbers of one tokenizer."""

    variant: str
    seed: int
    psnr: float
    """dB, with the tokenizer's own decoder."""
    psnr_tuned: float
    """dB, after decoder fine-tuning."""
    reconstruction_fd: float
    reconstruction_fd_tuned: float
    linear_probe: float
    """Accuracy on flattened validation latents."""
    linear_probe_pooled: float
    """Accuracy on latents averaged over tokens."""
    nearest_neighbours: float
    modes: dict[str, Any]
    """A :class:`ModeAnalysis` as a dictionary."""
    diffusion_steps: list[int]
    diffusion_losses: list[float]
    """Validation loss of the SiT at these steps."""
    gaussian_loss: float
    """Lowest possible diffusion loss for normally distributed latents with the same covariance."""
    samples_fd: float
    """Fréchet distance between samples without guidance and training digits, in features of EfficientNet-Lite0."""
    samples_fd_tuned: float
    """The same distance when the fine-tuned decoder decodes the same latents."""

    def nll(self, components: int) -> float:
        """Return the held-out negative log-likelihood at a number of components, nats per sample."""
        fits = ModeAnalysis.from_dict(self.modes).fits
        return next(fit.nll_held_out for fit in fits if fit.components == components)


def gaussian_loss(latents: np.ndarray, bins: int = 10) -> float:
    """Return the lowest velocity error for normal latents with the covariance of these (n, L, C).

    Latents are normalised per channel. Along a direction of variance v, x_t = (1 - t) data + t noise has variance
    s = (1 - t)^2 v + t^2. Given x_t, the velocity noise - data keeps the variance v / s. The result is the mean over
    directions and the time bins of validation.
    """
    normalized = (latents - latents.mean((0, 1))) / latents.std((0, 1))
    values = normalized.reshape(len(latents), -1).astype(np.float64)
    variances = np.linalg.eigvalsh(np.cov(values, rowvar=False)).clip(0)
    times = ((np.arange(bins) + 0.5) / bins)[:, None]
    return float((variances / ((1 - times) ** 2 * variances + times**2)).mean())


def lines(path: Path) -> list[dict[str, float]]:
    """Read the validation records of a run."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class SampleDistance:
    """Measures the Fréchet distance between images and the training digits."""

    def __init__(self) -> None:
        from datamodules.pack.digits import TRAIN_SAMPLES, digit_images
        from maetok.metrics import EfficientNetLite0Features

        self.network = EfficientNetLite0Features(image_size=96).eval()
        self.reference = self.gaussian(digit_images()[0][:TRAIN_SAMPLES, ..., None].repeat(3, axis=-1))

    @torch.no_grad()
    def gaussian(self, images: np.ndarray) -> Gaussian:
        """Return the moments of the features of images (n, H, W, 3) uint8; n must exceed the number of features."""
        moments = Moments(torch.device("cpu"))
        for batch in torch.from_numpy(images).permute(0, 3, 1, 2).split(250):
            moments.update(self.network(batch.float() / 255))
        gaussian = moments.gaussian()
        assert gaussian is not None
        assert len(images) > len(gaussian.mean)
        return gaussian

    def __call__(self, samples: Path) -> float:
        """Return the distance of the images of an npz file."""
        with np.load(samples) as arrays:
            return self.gaussian(arrays["arr_0"]).distance(self.reference)


def measure(cell: Cell, distance: SampleDistance) -> Measures:
    """Measure a cell whose runs are complete."""
    cache = LatentCache(cell.folder / "latents" / "cache")
    labels = {split: cache.labels(split) for split in ("train", "validation")}
    latents = {split: cache.latents(split, np.arange(len(labels[split]))) for split in labels}
    train, held_out = latents["train"], latents["validation"]

    def accuracy(classifier: Any, pooled: bool = False) -> float:
        features = [values.mean(1) if pooled else values for values in (train, held_out)]
        return classifier(features[0], labels["train"], features[1], labels["validation"]).value

    own, tuned = (lines(cell.folder / stage / "metrics.jsonl")[-1] for stage in ("tokenizer", "decoder"))
    diffusion = lines(cell.folder / "sit" / "metrics.jsonl")
    modes = analyse_modes(f"{cell.variant} seed {cell.seed}", train, held_out, COMPONENT_COUNTS, DIMENSIONS, restarts=2)
    return Measures(
        variant=cell.variant,
        seed=cell.seed,
        psnr=own["validation/psnr"],
        psnr_tuned=tuned["validation/psnr"],
        reconstruction_fd=own["validation/reconstruction_fd"],
        reconstruction_fd_tuned=tuned["validation/reconstruction_fd"],
        linear_probe=accuracy(linear_probe_accuracy),
        linear_probe_pooled=accuracy(linear_probe_accuracy, pooled=True),
        nearest_neighbours=accuracy(neighbour_accuracy),
        modes=modes.to_dict(),
        diffusion_steps=[int(line["step"]) for line in diffusion],
        diffusion_losses=[line["validation/diffusion_loss"] for line in diffusion],
        gaussian_loss=gaussian_loss(train),
        samples_fd=distance(cell.folder / "samples" / "images" / "samples.npz"),
        samples_fd_tuned=distance(cell.folder / "samples_tuned" / "images" / "samples.npz"),
    )


def measured(cells: list[Cell]) -> list[Measures]:
    """Return the numbers of all cells; ``measures.json`` in the folder of a cell keeps earlier measurements."""
    distance: SampleDistance | None = None
    results = []
    for cell in cells:
        path = cell.folder / "measures.json"
        if not path.exists():
            distance = distance or SampleDistance()
            path.write_text(json.dumps(asdict(measure(cell, distance)), indent=1))
            print(f"measured {cell.folder}", flush=True)
        results.append(Measures(**json.loads(path.read_text())))
    return results
