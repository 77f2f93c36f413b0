"""Measures two folders or npz files of images under a named protocol, without Lightning and without a config.

    python -m maetok.metrics --protocol rfid-val --samples reconstructions --reference images --output metrics.json
    python -m maetok.metrics --protocol gfid-adm --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz
        --features inception --weights weights/pt_inception-2015-12-05-6726825d.pth

A result carries the protocol's bare name only if it deviates in nothing: ``gfid-adm@1000`` measures a thousand samples,
and ``labels=unknown`` marks samples without labels, such as a folder's. Distances are FID with Inception and FD
with any other network.
"""

import argparse
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from maetok.losses import LPIPSLoss
from maetok.metrics.evaluator import ImageEvaluator
from maetok.metrics.features import EfficientNetLite0Features
from maetok.metrics.image_files import ImageArchive, ImageFolder, open_images, reference_gaussians
from maetok.metrics.inception import InceptionFeatures
from maetok.metrics.protocols import PROTOCOLS, EvaluationProtocol, Measurement, append_record
from maetok.metrics.standard import load_metric

Images = ImageFolder | ImageArchive


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m maetok.metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--protocol", required=True, choices=list(PROTOCOLS))
    parser.add_argument("--samples", required=True, type=Path, help="folder of PNG or JPEG files, or npz file")
    parser.add_argument("--reference", required=True, type=Path, help="the same, or ADM's file with moments")
    parser.add_argument("--features", default="efficientnet_lite0", choices=["efficientnet_lite0", "inception"])
    parser.add_argument("--feature-size", default=96, type=int, help="side in pixels of EfficientNet-Lite0's input")
    parser.add_argument("--weights", help="torch-fidelity's weights of Inception; nothing is downloaded")
    parser.add_argument("--lpips", help="torchvision's weights of VGG16, for LPIPS (rfid-val)")
    parser.add_argument("--metrics", nargs="+", default=[], help="class paths of more metrics: my_module.MyMetric")
    parser.add_argument("--image-size", type=int, help="crop images of folders to this square, as the protocol says")
    parser.add_argument("--batch-size", default=64, type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file to append the result to, such as metrics.json")
    return parser


def numbered(images: Images, batch_size: int, side: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images with the number of each image, under a progress bar."""
    from tqdm import tqdm

    first = 0
    with tqdm(total=len(images), desc=side, unit="image") as bar:
        for batch in images.batches(batch_size):
            yield batch, torch.arange(first, first + len(batch))
            first += len(batch)
            bar.update(len(batch))


def check_pairs(samples: Images, references: Images) -> None:
    """Raise ValueError unless both sides hold equally many images, with the same file names if both are folders."""
    if len(samples) != len(references):
        raise ValueError(f"samples and references must be pairs, got {len(samples)} and {len(references)} images")
    if samples.names and references.names:
        for name, other in zip(samples.names, references.names, strict=True):
            if name != other:
                raise ValueError(f"samples and references must be pairs of files, got {name} and {other}")


def label_deviation(protocol: EvaluationProtocol, samples: Images) -> dict[str, str]:
    """Return how the labels of the samples deviate from the protocol; empty if they do not."""
    if protocol.labels != "balanced":
        return {}
    if samples.labels is None or samples.labels.shape != (len(samples),):
        return {"labels": "unknown"}
    counts = np.unique(samples.labels, return_counts=True)[1]
    return {} if counts.max() - counts.min() <= 1 else {"labels": "unbalanced"}


def measure(evaluator: ImageEvaluator, samples: Images, references: Images, batch_size: int) -> Measurement:
    """Read all images once and measure them."""
    if evaluator.protocol.paired:
        check_pairs(samples, references)
        sides = numbered(samples, batch_size, "pairs"), references.batches(batch_size)
        for (images, indices), real in zip_longest(*sides):
            evaluator.update_pairs(images, real, indices)
    else:
        for images, indices in numbered(samples, batch_size, "samples"):
            evaluator.update(images, indices)
        for images, indices in numbered(references, batch_size, "references"):
            evaluator.update(images, indices, is_reference=True)
    deviations = label_deviation(evaluator.protocol, samples)
    return evaluator.compute(len(samples), len(references), deviations=deviations)


def main(args: list[str] | None = None) -> Measurement:
    """Measure, print one line, and append to ``--output``; ``args`` default to the command line."""
    options = parser().parse_args(args)
    protocol, inception = PROTOCOLS[options.protocol], options.features == "inception"
    samples, references = (open_images(path, options.image_size) for path in (options.samples, options.reference))
    moments = reference_gaussians(references, inception)
    features: nn.Module = (
        InceptionFeatures(options.weights) if inception else EfficientNetLite0Features(options.feature_size)
    )
    lpips = LPIPSLoss("vgg", options.lpips) if options.lpips else None
    metrics = [load_metric(class_path) for class_path in options.metrics]
    evaluator = ImageEvaluator(protocol, features, lpips, moments, options.device, metrics)
    measurement = measure(evaluator, samples, references, options.batch_size)
    print(measurement)
    if options.output:
        paths = {"samples_path": str(options.samples), "reference_path": str(options.reference)}
        append_record(options.output, measurement.record() | paths)
    return measurement


if __name__ == "__main__":
    main()
