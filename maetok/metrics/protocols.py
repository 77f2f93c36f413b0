"""Named evaluation protocols: everything that a number depends on besides the images and the network.

The crop of FID is decided in one function, :func:`maetok.formats.crops.center_crop`: the datamodules cut
validation images by the same rule, and ``python -m maetok.metrics --image-size`` cuts the images of folders with it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from maetok.formats.crops import CENTER_CROP
from maetok.formats.files import write_text


@dataclass(frozen=True)
class EvaluationProtocol:
    """States what is measured, on what, and how.

    Args:
        name: name of the protocol.
        metrics: names of :func:`maetok.metrics.standard.protocol_metrics`, or class paths of other metrics.
        samples: number of images to judge.
        references: number of real images.
        paired: whether each image to judge has a reference of its own.
        reference_moments_from: where the moments of the references come from: their ``images``, or a ``file`` that
            holds the moments of a larger set.
        labels: ``validation``: the labels of the real images; ``balanced``: equally many samples of each class.
        crop: the part that is cut out of an image of another size (:data:`maetok.formats.crops.CENTER_CROP`).
        resize: how such an image is resized first.
        uint8: how images in [-1, 1] become the measured uint8 (:func:`maetok.metrics.to_uint8`).
        feature_dtype: dtype in which features are computed.
        moments_dtype: dtype of their means, covariances and distances.
        neighbours: k of precision and recall.
        inception_score_split: samples per split of the Inception Score.
    """

    name: str
    metrics: tuple[str, ...]
    samples: int
    references: int
    paired: bool
    reference_moments_from: Literal["images", "file"]
    labels: Literal["validation", "balanced"]
    crop: str = CENTER_CROP["crop"]
    resize: str = CENTER_CROP["resize"]
    uint8: str = "round(127.5 x + 127.5), clamped to 0 ... 255"
    feature_dtype: str = "float32"
    moments_dtype: str = "float64"
    neighbours: int = 3
    inception_score_split: int = 5000

    def recorded_fields(self) -> dict[str, Any]:
        """Return the fields by the names that hashes and records use; they keep ``statistics``, an older name."""
        fields = asdict(self)
        fields["statistics"] = fields.pop("reference_moments_from")
        return fields


RFID_VAL = EvaluationProtocol(
    name="rfid-val",
    metrics=("fid", "sfid", "psnr", "ssim", "lpips"),
    samples=50_000,
    references=50_000,
    paired=True,
    reference_moments_from="images",
    labels="validation",
)
"""Compares reconstructions with the centre-cropped validation images of ImageNet that they were made from."""

GFID_ADM = EvaluationProtocol(
    name="gfid-adm",
    metrics=("fid", "sfid", "inception_score", "precision_recall"),
    samples=50_000,
    references=10_000,
    paired=False,
    reference_moments_from="file",
    labels="balanced",
)
"""Compares samples with a reference file of the ADM evaluation suite (``VIRTUAL_imagenet256_labeled.npz``). FID and
sFID use its moments of the training images; precision and recall use its 10,000 images."""

PROTOCOLS = {protocol.name: protocol for protocol in (RFID_VAL, GFID_ADM)}


@dataclass(frozen=True)
class Measurement:
    """Holds the results of a measurement under a protocol.

    Args:
        protocol: the protocol.
        features: name of the feature network.
        digests: hashes of the networks that took part, by role.
        image_size: (height, width) of the images.
        samples: number of images that were judged.
        references: number of real images.
        deviations: other deviations from the protocol, by the name of its field.
        values: results by name.
        unavailable: by metric, the reason why it could not be measured.
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
        """Return all deviations from the protocol, including the numbers of images."""
        counts = {"samples": self.samples, "references": self.references}
        if self.protocol.paired:
            del counts["references"]  # as many as samples
        wrong = {name: str(count) for name, count in counts.items() if count != getattr(self.protocol, name)}
        return wrong | dict(self.deviations)

    @property
    def name(self) -> str:
        """Return the protocol's name if there is no deviation, else name and deviations, such as ``rfid-val@1000``."""
        deviations = self.all_deviations()
        if not deviations:
            return self.protocol.name
        deviations.pop("samples", None)
        others = "".join(f",{name}={value}" for name, value in deviations.items())
        return f"{self.protocol.name}@{self.samples}{others}"

    @property
    def hash(self) -> str:
        """Return a hash of protocol, networks, image size and deviations: only numbers of equal hashes compare."""
        description = {
            "protocol": self.protocol.recorded_fields(),
            "features": self.features,
            "digests": dict(self.digests),
            "image_size": list(self.image_size),
            "deviations": self.all_deviations(),
        }
        return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        """Return one line: protocol, hash, network, results, and what is unavailable."""
        values = ", ".join(f"{name} {value:.6g}" for name, value in self.values.items())
        missing = "".join(f"; no {name}: {reason}" for name, reason in self.unavailable.items())
        return f"{self.name} [{self.hash}] {self.features}: {values}{missing}"

    def record(self) -> dict[str, Any]:
        """Return all of it for JSON."""
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
    """Append to a JSON list in a file; make the folder. The file is replaced atomically.

    Raises:
        ValueError: if the file exists and does not hold a JSON list.
    """
    records, problem = [], f"{path} does not hold a JSON list: move it away or give another file"
    if path.exists():
        try:
            records = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{problem} ({error})") from error
        if not isinstance(records, list):
            raise ValueError(problem)
    write_text(path, json.dumps([*records, record], indent=1, allow_nan=False))
