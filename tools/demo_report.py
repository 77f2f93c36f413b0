"""A table of the results of ``make demo``: ``python -m tools.demo_report``.

A support vector machine trained on real digits classifies the generated digits. The share that it assigns to the
requested class is a simple measure of how recognisable they are.
"""

import argparse
import json
from pathlib import Path

import numpy as np


def digit_classifier() -> tuple[object, float]:
    """Train a classifier on the 4,000 training digits; return it with its accuracy on the 1,000 validation digits."""
    from sklearn.svm import SVC

    from datamodules.pack.digits import TRAIN_SAMPLES, digit_images

    images, labels = digit_images()
    pixels = images.reshape(len(images), -1) / 255.0
    classifier = SVC(C=5.0, gamma="scale").fit(pixels[:TRAIN_SAMPLES], labels[:TRAIN_SAMPLES])
    return classifier, float(classifier.score(pixels[TRAIN_SAMPLES:], labels[TRAIN_SAMPLES:]))


def accuracy_on_samples(classifier: object, samples: Path) -> float:
    """Return the share of the samples of an npz file that the classifier assigns to the requested class."""
    with np.load(samples) as arrays:
        images, labels = arrays["arr_0"], arrays["labels"]
    return float(classifier.score(images[..., 0].reshape(len(images), -1) / 255.0, labels))  # type: ignore[attr-defined]


def last_metric(run: Path, name: str) -> float:
    """Return a metric of the last validation of a run."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])[f"validation/{name}"]


def main(args: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tools.demo_report", description=__doc__)
    parser.add_argument("--runs", default="runs", type=Path)
    options = parser.parse_args(args)
    classifier, test_accuracy = digit_classifier()
    guided, unguided = (
        options.runs / name / "samples" / "samples.npz" for name in ("digits_samples", "digits_samples_unguided")
    )
    rows = [
        ("PSNR before stage 2 (dB)", f"{last_metric(options.runs / 'digits_tokenizer', 'psnr'):.2f}"),
        ("PSNR after stage 2 (dB)", f"{last_metric(options.runs / 'digits_decoder', 'psnr'):.2f}"),
        ("diffusion loss", f"{last_metric(options.runs / 'digits_sit', 'diffusion_loss'):.3f}"),
        ("classifier on real validation digits", f"{test_accuracy:.1%}"),
        ("classifier on samples with guidance", f"{accuracy_on_samples(classifier, guided):.1%}"),
        ("classifier on samples without guidance", f"{accuracy_on_samples(classifier, unguided):.1%}"),
    ]
    for title, value in rows:
        print(f"{title:<40}{value:>10}")
    pictures = sorted((options.runs / "digits_sit" / "pictures").glob("*.png"))
    print(f"digits, left without and right with guidance: {pictures[-1]}")


if __name__ == "__main__":
    main()
