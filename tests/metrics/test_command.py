"""``python -m maetok.metrics`` measures folders and npz files under a protocol."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maetok.formats.crops import center_crop
from maetok.metrics.__main__ import main
from maetok.metrics.image_files import open_images
from tests.support.feature_networks import pictures

SMALL = ["--feature-size=32", "--device=cpu"]


def write_folder(path: Path, images: Tensor) -> Path:
    path.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path / f"{number:04d}.png")
    return path


def write_npz(path: Path, images: Tensor, save=np.savez, **more: np.ndarray) -> Path:
    save(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **more)
    return path


def test_files_are_read_in_order_a_batch_at_a_time(tmp_path: Path) -> None:
    images = pictures(7)
    for source in (
        write_folder(tmp_path / "images", images),
        write_npz(tmp_path / "a.npz", images),
        write_npz(tmp_path / "b.npz", images, np.savez_compressed, labels=np.arange(7)),
    ):
        opened = open_images(source)
        batches = list(opened.batches(3))
        assert [len(batch) for batch in batches] == [3, 3, 1]
        assert torch.equal(torch.cat(batches), images)
        assert len(opened) == 7
    assert opened.labels is not None
    assert opened.labels.tolist() == list(range(7))


def test_folders_and_npz_files_measure_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples, references = pictures(330, seed=1), pictures(340, seed=2)
    folders = write_folder(tmp_path / "samples", samples), write_folder(tmp_path / "real", references)
    files = write_npz(tmp_path / "samples.npz", samples), write_npz(tmp_path / "real.npz", references)
    output = tmp_path / "metrics.json"
    for ours, real in (folders, files):
        main(["--protocol=gfid-adm", f"--samples={ours}", f"--reference={real}", f"--output={output}", *SMALL])
    one, other = json.loads(output.read_text())
    assert one["metrics"] == other["metrics"]
    assert one["metrics"].keys() == {"fd", "precision", "recall"}
    assert (one["hash"], one["samples"], one["references"]) == (other["hash"], 330, 340)
    assert one["protocol"] == "gfid-adm@330,references=340,labels=unknown,statistics=images"
    assert one["samples_path"] == str(folders[0])
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith(f"{one['protocol']} [{one['hash']}] EfficientNetLite0Features(image_size=32): fd ")
    itself = main(["--protocol=gfid-adm", f"--samples={files[0]}", f"--reference={folders[0]}", *SMALL])
    assert itself.values["fd"] < 1e-3
    assert (itself.values["precision"], itself.values["recall"]) == (1, 1)


def test_images_of_folders_are_cropped_where_asked(tmp_path: Path) -> None:
    images = [torch.randint(0, 256, (3, 20 + number, 30), dtype=torch.uint8) for number in range(3)]
    (tmp_path / "odd").mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "odd" / f"{number}.png")
    (batch,) = open_images(tmp_path / "odd", image_size=16).batches(5)
    assert torch.equal(batch, torch.stack([center_crop(image, (16, 16)) for image in images]))
    with pytest.raises(ValueError, match="several sizes: crop them with --image-size"):
        list(open_images(tmp_path / "odd").batches(5))


def test_pairs_must_be_pairs(tmp_path: Path) -> None:
    images = pictures(6, size=16)
    one, other = write_folder(tmp_path / "one", images), write_folder(tmp_path / "other", images.flip(0))
    arguments = ["--protocol=rfid-val", f"--samples={one}", f"--reference={other}", *SMALL]
    measured = main(arguments)
    assert measured.name == "rfid-val@6"
    psnr = -10 * ((images.double() - images.flip(0).double()) / 255).square().mean((1, 2, 3)).log10()
    assert measured.values["psnr"] == pytest.approx(psnr.mean().item(), rel=1e-6)
    (other / "0003.png").rename(other / "0009.png")
    with pytest.raises(ValueError, match="must be pairs of files, got 0003 and 0004"):
        main(arguments)
    (other / "0009.png").unlink()
    with pytest.raises(ValueError, match="must be pairs, got 6 and 5 images"):
        main(arguments)


def test_reference_files_of_adm(tmp_path: Path) -> None:
    """Moments belong to Inception: any other network measures the images of the file, if it holds any."""
    images = pictures(6)
    moments = {
        "mu": np.arange(3, dtype=np.float32),
        "sigma": np.eye(3),
        "mu_s": np.zeros(2),
        "sigma_s": np.ones((2, 2)),
    }
    whole = write_npz(tmp_path / "whole.npz", images, **moments)
    opened = open_images(whole)
    assert opened.reference_moments is not None
    assert opened.reference_moments["pool"].mean.tolist() == [0, 1, 2]
    assert opened.reference_moments["pool"].covariance.dtype == torch.float64
    assert opened.reference_moments["spatial"].covariance.tolist() == [[1, 1], [1, 1]]
    measured = main(["--protocol=gfid-adm", f"--samples={whole}", f"--reference={whole}", *SMALL])
    assert measured.name == "gfid-adm@6,references=6,labels=unknown,statistics=images"
    np.savez(tmp_path / "moments.npz", **moments)
    assert len(open_images(tmp_path / "moments.npz")) == 0
    with pytest.raises(ValueError, match=r"not to EfficientNetLite0Features.*--features inception"):
        main(["--protocol=gfid-adm", f"--samples={whole}", f"--reference={tmp_path / 'moments.npz'}", *SMALL])


def test_labels_must_be_balanced(tmp_path: Path) -> None:
    images = pictures(6)
    real = write_npz(tmp_path / "real.npz", images)
    for labels, deviates in (([0, 1, 2, 0, 1, 2], False), ([0, 1, 2, 3, 0, 1], False), ([0, 0, 2, 0, 1, 0], True)):
        for name in ("labels", "arr_1"):  # the name in our files, and in files of ADM's sampler
            samples = write_npz(tmp_path / "samples.npz", images, **{name: np.array(labels)})
            measured = main(["--protocol=gfid-adm", f"--samples={samples}", f"--reference={real}", *SMALL])
            assert ("labels=unbalanced" in measured.name) == deviates
            assert "unknown" not in measured.name
    for samples in (real, write_npz(tmp_path / "few.npz", images, labels=np.arange(5))):
        measured = main(["--protocol=gfid-adm", f"--samples={samples}", f"--reference={real}", *SMALL])
        assert "labels=unknown" in measured.name


def test_errors_name_the_remedy(tmp_path: Path) -> None:
    real = write_npz(tmp_path / "real.npz", pictures(6))
    common = ["--protocol=gfid-adm", f"--reference={real}", *SMALL]
    with pytest.raises(
        FileNotFoundError, match=r"weights_path=None: no such file.*--weights of python -m maetok.metrics"
    ):
        main([*common, f"--samples={real}", "--features=inception"])
    with pytest.raises(FileNotFoundError, match="nowhere is neither a folder of images nor an npz file"):
        main([*common, "--samples=nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty holds no \.png"):
        main([*common, f"--samples={tmp_path / 'empty'}"])
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match=r"neither images \(arr_0\) nor moments.*'images'"):
        main([*common, f"--samples={tmp_path / 'other.npz'}"])
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"must be \(N, H, W, 3\) uint8, got \(2, 4, 4, 3\) float64"):
        main([*common, f"--samples={tmp_path / 'floats.npz'}"])
