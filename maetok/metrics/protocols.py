"""Named evaluation protocols: everything that a number depends on besides the images and the network."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class EvaluationProtocol:
    """What is measured, on what, and how.

    Args:
        name: name of the protocol.
        metrics: of ``fid``, ``sfid``, ``inception_score``, ``precision_recall``, ``psnr``, ``ssim``, ``lpips``.
        samples: number of images to be judged.
        references: number of real images.
        paired: whether each image to be judged has a reference of its own.
        statistics: where the moments of the references come from: their ``images``, or a ``file`` that holds those of
            a larger set.
        labels: ``validation``: those of the real images; ``balanced``: equally many samples of each class.
        crop: what is cut out of an image that is not of the size asked for.
        resize: how such an image is resized before.
        uint8: how images in [-1, 1] become the uint8 that is measured (:func:`maetok.metrics.to_uint8`).
        feature_dtype: type that features are computed in.
        moments_dtype: type of their means, covariances and distances.
        neighbours: k of precision and recall.
        inception_score_split: samples per split of the Inception Score.
    """

    name: str
    metrics: tuple[str, ...]
    samples: int
    references: int
    paired: bool
    statistics: Literal["images", "file"]
    labels: Literal["validation", "balanced"]
    crop: str = "center"
    resize: str = "bicubic, antialiased, to cover"
    uint8: str = "round(127.5 x + 127.5), clamped to 0 ... 255"
    feature_dtype: str = "float32"
    moments_dtype: str = "float64"
    neighbours: int = 3
    inception_score_split: int = 5000


RFID_VAL = EvaluationProtocol(
    name="rfid-val",
    metrics=("fid", "sfid", "psnr", "ssim", "lpips"),
    samples=50_000,
    references=50_000,
    paired=True,
    statistics="images",
    labels="validation",
)
"""Reconstructions against the centre-cropped validation images of ImageNet that they were made from."""

GFID_ADM = EvaluationProtocol(
    name="gfid-adm",
    metrics=("fid", "sfid", "inception_score", "precision_recall"),
    samples=50_000,
    references=10_000,
    paired=False,
    statistics="file",
    labels="balanced",
)
"""Samples against a reference file of the ADM evaluation suite (``VIRTUAL_imagenet256_labeled.npz``): its moments of
the training images for FID and sFID, its 10,000 images for precision and recall."""

PROTOCOLS = {protocol.name: protocol for protocol in (RFID_VAL, GFID_ADM)}


@dataclass(frozen=True)
class Measurement:
    """Results under a protocol.

    Args:
        protocol: the protocol.
        features: name of the feature network.
        digests: hashes of the networks that took part, by role.
        image_size: (height, width) of the images.
        samples: how many images were judged.
        references: how many real images there were.
        deviations: what else is not as the protocol says, by the name of its field.
        values: results by metric.
        unavailable: why a metric of the protocol could not be measured.
    """

    protocol: EvaluationProtocol
    features: str
    digests: Mapping[str, str]
    image_size: tuple[int, int]
    samples: int
    references: int
    deviations: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    unavailable: Mapping[str, str] = field(default_factory=dict)

    def all_deviations(self) -> dict[str, str]:
        """What is not as the protocol says, numbers of images included."""
        counts = {"samples": self.samples, "references": self.references}
        if self.protocol.paired:
            del counts["references"]  # as many as samples
        wrong = {name: str(count) for name, count in counts.items() if count != getattr(self.protocol, name)}
        return wrong | dict(self.deviations)

    @property
    def name(self) -> str:
        """The protocol's name only if everything is as it says: ``rfid-val``, ``rfid-val@1000``."""
        deviations = self.all_deviations()
        if not deviations:
            return self.protocol.name
        deviations.pop("samples", None)
        others = "".join(f",{name}={value}" for name, value in deviations.items())
        return f"{self.protocol.name}@{self.samples}{others}"

    @property
    def hash(self) -> str:
        """Equal only for numbers that may be compared: of protocol, networks, image size and deviations."""
        description = {
            "protocol": asdict(self.protocol),
            "features": self.features,
            "digests": dict(self.digests),
            "image_size": list(self.image_size),
            "deviations": self.all_deviations(),
        }
        return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        """One line: protocol, hash, network, results, and what is missing."""
        values = ", ".join(f"{name} {value:.6g}" for name, value in self.values.items())
        missing = "".join(f"; no {name}: {reason}" for name, reason in self.unavailable.items())
        return f"{self.name} [{self.hash}] {self.features}: {values}{missing}"

    def record(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        return {
            "protocol": self.name,
            "hash": self.hash,
            "features": self.features,
            "weights": {role: digest[:12] for role, digest in self.digests.items()},
            "image_size": list(self.image_size),
            "samples": self.samples,
            "references": self.references,
            "metrics": dict(self.values),
            "unavailable": dict(self.unavailable),
        }


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append to a JSON list in a file, which is there as a whole or not at all; the folder is made.

    Raises:
        ValueError: if the file is there and holds no JSON list.
    """
    records = []
    if path.exists():
        try:
            records = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} holds no JSON list: move it away or give another file ({error})") from error
        if not isinstance(records, list):
            raise ValueError(f"{path} holds no JSON list: move it away or give another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        json.dump([*records, record], file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
