"""A record names its protocol: every change shows in the hash, every deviation in the name."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from maetok.metrics import to_uint8
from maetok.metrics.protocols import GFID_ADM, PROTOCOLS, RFID_VAL, EvaluationProtocol, Measurement, append_record


def measurement() -> Measurement:
    networks = {"features": "a" * 64}
    return Measurement(RFID_VAL, "Inception", networks, (256, 256), 50_000, 50_000, values={"fid": 0.48})


def test_name_tells_every_deviation() -> None:
    whole = measurement()
    assert whole.name == "rfid-val"
    assert str(whole).startswith(f"rfid-val [{whole.hash}] Inception: fid 0.48")
    assert replace(whole, samples=1000, references=1000).name == "rfid-val@1000"
    adm = replace(whole, protocol=GFID_ADM, references=10_000)
    assert adm.name == "gfid-adm"
    assert replace(adm, samples=49_999).name == "gfid-adm@49999"
    few = replace(adm, samples=1000, references=1000, deviations={"statistics": "images"})
    assert few.name == "gfid-adm@1000,references=1000,statistics=images"
    assert replace(adm, deviations={"labels": "unbalanced"}).name == "gfid-adm@50000,labels=unbalanced"


def test_hash_changes_with_anything_but_the_results() -> None:
    whole = measurement()
    others = [
        replace(whole, features="EfficientNet"),
        replace(whole, digests={"features": "b" * 64}),
        replace(whole, digests={"features": "a" * 64, "lpips": "c" * 64}),
        replace(whole, image_size=(512, 512)),
        replace(whole, samples=1000),
        replace(whole, samples=1001),
        replace(whole, deviations={"labels": "unbalanced"}),
    ]
    for field in fields(RFID_VAL):
        value = getattr(RFID_VAL, field.name)
        other = {bool: not value, int: 17, str: "other", tuple: ("psnr",)}[type(value)]
        others.append(replace(whole, protocol=replace(RFID_VAL, **{field.name: other})))
    assert len({whole.hash, *(other.hash for other in others)}) == 1 + 7 + 14
    assert replace(whole, values={"fid": 1.0}, unavailable={"lpips": "none"}).hash == whole.hash


def test_protocols_are_those_of_the_literature() -> None:
    assert {name: (p.samples, p.references) for name, p in PROTOCOLS.items()} == {
        "rfid-val": (50_000, 50_000),
        "gfid-adm": (50_000, 10_000),
    }
    assert GFID_ADM.neighbours == 3
    assert GFID_ADM.inception_score_split == 5000


def test_uint8_rule() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))  # inverts the conversion of datamodules
    odd = torch.tensor([-9.0, -1.0 - 1e-6, -1.0 + 0.6 / 127.5, 0.0039, 1.0 - 0.4 / 127.5, 2.0])
    assert to_uint8(odd).tolist() == [0, 0, 1, 128, 255, 255]


def test_records_are_appended_to_a_list(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.json"
    append_record(path, measurement().record())
    append_record(path, {"step": 2})
    first, second = json.loads(path.read_text())
    assert (first["protocol"], first["hash"]) == ("rfid-val", measurement().hash)
    assert (first["samples"], first["metrics"], second) == (50_000, {"fid": 0.48}, {"step": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_record(path, {"psnr": float("inf")})
    assert len(json.loads(path.read_text())) == 2  # a failed write leaves the file as it was
    for content in ("{}", "torn ["):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"metrics\.json does not hold a JSON list: move it away"):
            append_record(path, {})


@pytest.mark.parametrize(
    ("protocol", "whole", "part", "name"),
    [
        (RFID_VAL, "1477333b0802", "fb14f155e330", "rfid-val@330,statistics=images,labels=unknown"),
        (GFID_ADM, "9ecce5180dc7", "f84949aa9bce", "gfid-adm@330,references=340,statistics=images,labels=unknown"),
    ],
)
def test_hashes_and_names_stay_those_of_published_records(
    protocol: EvaluationProtocol, whole: str, part: str, name: str
) -> None:
    """These values were computed before the fields of protocols were renamed; old and new records must compare."""
    found = replace(measurement(), protocol=protocol, references=protocol.references)
    assert (found.hash, found.name) == (whole, protocol.name)
    partial = replace(
        found,
        samples=330,
        references=340,
        features="EfficientNetLite0Features(image_size=96)",
        image_size=(32, 32),
        digests={"features": "a" * 64, "lpips": "b" * 64},
        deviations={"statistics": "images", "labels": "unknown"},
    )
    assert (partial.hash, partial.name) == (part, name)
    assert partial.record() == {
        "protocol": name,
        "hash": part,
        "features": "EfficientNetLite0Features(image_size=96)",
        "weights": {"features": "a" * 12, "lpips": "b" * 12},
        "image_size": [32, 32],
        "samples": 330,
        "references": 340,
        "metrics": {"fid": 0.48},
        "unavailable": {},
    }
