"""Every sample is written once, and the number of processes or interruptions does not change it."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from callbacks import SamplePictures, SampleWriter
from datamodules import SampleLabels
from datamodules.shards import file_sha256
from lightning_modules import DenoiserFrom, LatentDiffusion, Sampling
from maetok import SiT
from maetok.flow import CosineInterpolant, EulerMaruyama, FlowObjective
from maetok.hub import write_statistics
from tests.conftest import DATA
from tests.support.diffusion import CLASSES, diffusion, trainer
from tests.support.helpers import run_subprocess

pytestmark = pytest.mark.filterwarnings("ignore:sampling from a denoiser without trained weights")
COUNT, BLOCK = 14, 6
COSINE = {"objective": FlowObjective(CosineInterpolant())}  # which stochastic solvers need to know


def model(**options: Any) -> LatentDiffusion:
    defaults: dict[str, Any] = {"guidance_scale": 2.0, "guidance_interval": (0.0, 0.75), "seed": 0}
    settings = {name: options.pop(name, value) for name, value in defaults.items()}
    return diffusion(sampling=Sampling(EulerMaruyama(4), **settings), optimization=None, **options)


def labels(batch_size: int = 4, **options: Any) -> SampleLabels:
    return SampleLabels(
        **({"count": COUNT, "num_classes": CLASSES, "batch_size": batch_size, "block": BLOCK} | options)
    )


def write(
    output: Path,
    data: SampleLabels | None = None,
    task: LatentDiffusion | None = None,
    npz: bool = True,
    png: bool = True,
    **options: Any,
) -> None:
    """Sample with the real callback."""
    writer = SampleWriter(str(output), npz, png)
    fitted = trainer(output.parent, 1, writer, **options)
    fitted.predict(task or model(), datamodule=data or labels(), return_predictions=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples in batches of 4, by one process without interruption."""
    output = tmp_path_factory.mktemp("samples") / "whole"
    write(output)
    return output


def pixels(output: Path) -> np.ndarray:
    return np.load(output / "samples.npz")["arr_0"]


def assert_same_but_for_rounding(found: Path, expected: Path) -> None:
    """A matrix product rounds differently for other numbers of rows: by about 1e-6, which rarely changes a uint8."""
    difference = np.abs(pixels(found).astype(int) - pixels(expected).astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 1e-3


def test_npz_and_pngs_hold_every_sample_of_its_label(whole: Path) -> None:
    npz = np.load(whole / "samples.npz")
    assert set(npz) == {"arr_0", "labels"}
    assert (npz["arr_0"].shape, npz["arr_0"].dtype) == ((COUNT, 8, 8, 3), np.uint8)
    assert (npz["labels"].tolist(), npz["labels"].dtype) == ([index % CLASSES for index in range(COUNT)], np.int64)
    expected = model().sample(torch.arange(COUNT) % CLASSES, torch.arange(COUNT))
    expected = ((expected.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(npz["arr_0"] - expected).max() < 0.51
    assert len(np.unique(npz["arr_0"].reshape(COUNT, -1), axis=0)) == COUNT
    names = sorted(path.name for path in (whole / "images").iterdir())
    assert names == [f"{number:06d}.png" for number in range(COUNT)]
    assert np.array_equal(np.stack([np.asarray(Image.open(whole / "images" / name)) for name in names]), npz["arr_0"])
    assert sorted(path.name for path in whole.iterdir()) == ["images", "samples.npz", "sampling.json"]


def test_an_interrupted_run_continues_with_the_missing_blocks(whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "samples"
    with pytest.raises(FileNotFoundError, match=r"2 blocks are missing in .*: run the same command again"):
        write(output, limit_predict_batches=3)  # the second block is cut short
    assert [path.name for path in (output / "blocks").iterdir()] == ["000000.npy"]
    (output / "blocks" / ".000001.partial").write_bytes(b"torn")
    task, calls = model(), []
    task.averaged_denoiser.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    write(output, task=task)
    assert len(calls) == 4 * 3  # four steps of three batches
    assert file_sha256(output / "samples.npz") == file_sha256(whole / "samples.npz")
    before = (output / "samples.npz").stat().st_mtime_ns
    write(output, task=task)
    assert len(calls) == 4 * 3
    assert (output / "samples.npz").stat().st_mtime_ns == before
    (output / "samples.npz").unlink()
    write(output)
    assert file_sha256(output / "samples.npz") == file_sha256(whole / "samples.npz")


@pytest.mark.parametrize("batch_size", [1, 6])
def test_samples_do_not_depend_on_the_batch(whole: Path, tmp_path: Path, batch_size: int) -> None:
    write(tmp_path / "samples", labels(batch_size), png=False)
    assert not (tmp_path / "samples" / "images").exists()
    assert_same_but_for_rounding(tmp_path / "samples", whole)


PROGRAM = """
import sys
from pathlib import Path
from tests.callbacks.test_sample_writer import labels, pictures, write
write(Path(sys.argv[1]), labels(), devices=2, strategy="ddp")
pictures(Path(sys.argv[1]).parent, devices=2, strategy="ddp")
"""


def pictures(folder: Path, **options: Any) -> None:
    """Validate without a single batch, and draw."""
    drawer = SamplePictures(classes=(1, 7), per_class=2, side=8)
    data = labels()
    data.val_dataloader = lambda: data.evaluation_dataloader("train")  # type: ignore[method-assign]
    task = model()
    task.validation_step = lambda batch, batch_idx: None  # type: ignore[method-assign, assignment]
    trainer(folder, 1, drawer, **options).validate(task, datamodule=data, verbose=False)


def test_two_processes_write_and_draw_what_one_does(whole: Path, tmp_path: Path) -> None:
    """The images are equal bit for bit."""
    run_subprocess(PROGRAM, tmp_path, str(tmp_path / "samples"))
    assert file_sha256(tmp_path / "samples" / "samples.npz") == file_sha256(whole / "samples.npz")
    assert np.array_equal(np.load(whole / "samples.npz")["arr_0"], pixels(tmp_path / "samples"))
    pictures(tmp_path / "one")
    name = Path("pictures") / "step=000000000.png"
    assert file_sha256(tmp_path / name) == file_sha256(tmp_path / "one" / name)


def test_pictures_show_each_class_without_and_with_guidance(tmp_path: Path) -> None:
    pictures(tmp_path)
    drawn = np.asarray(Image.open(tmp_path / "pictures" / "step=000000000.png")).astype(int)
    task, chosen = model(), torch.tensor([1, 1, 7, 7])
    halves = [task.sample(chosen, torch.arange(4), guidance_scale=scale) for scale in (1.0, 2.0)]
    expected = torch.cat([half.unflatten(0, (2, 2)) for half in halves], 1)  # (row, column, 3, 8, 8)
    expected = (expected.clamp(-1, 1) + 1) * 127.5
    found = [
        drawn[row : row + 8, column : column + 8].transpose(2, 0, 1) for row in (2, 14) for column in (2, 14, 26, 38)
    ]
    assert drawn.shape == (24, 48, 3)  # frames of two pixels
    np.testing.assert_allclose(np.stack(found), expected.flatten(0, 1).numpy(), atol=1.01)


@pytest.mark.parametrize(
    "change",
    [
        {"guidance_scale": 1.5},
        {"guidance_interval": (0.0, 0.5)},
        {"seed": 1},
        {"data": labels(labels="random")},
        COSINE,
    ],
    ids=["scale", "interval", "seed", "labels", "interpolant"],
)
def test_other_settings_are_refused(whole: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    data = change.get("data")
    task = model() if data else model(**change)
    with pytest.raises(FileExistsError, match=r"holds samples of another checkpoint or other settings \(sampling\.js"):
        write(whole, data, task)
    assert json.loads((whole / "sampling.json").read_text())["guidance_scale"] == 2.0


def test_another_decoder_is_refused_and_what_has_no_note_is_not_taken_over(whole: Path, tmp_path: Path) -> None:
    task = model()
    torch.nn.init.ones_(task.tokenizer.network.decoder.output.weight)
    with pytest.raises(FileExistsError, match="another checkpoint"):
        write(whole, task=task)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "samples.npz").write_bytes(b"of someone else")
    with pytest.raises(FileExistsError, match="another checkpoint"):
        write(tmp_path / "samples", png=False)


def test_a_denoiser_that_was_trained_anew_is_another_one(tmp_path: Path) -> None:
    path = tmp_path / "denoiser.ckpt"

    def save(task: LatentDiffusion) -> LatentDiffusion:
        saving = trainer(tmp_path, 1)
        saving.strategy.connect(task)
        saving.save_checkpoint(path)
        return diffusion(denoiser_from=DenoiserFrom(str(path)), optimization=None)

    write(tmp_path / "samples", task=save(model()))
    assert json.loads((tmp_path / "samples" / "sampling.json").read_text())["checkpoint"] == str(path)
    trained = model()
    torch.nn.init.ones_(trained.averaged_denoiser.final_layer.linear.bias)
    with pytest.raises(FileExistsError, match="another checkpoint"):
        write(tmp_path / "samples", task=save(trained))
    with pytest.raises(ValueError, match=r"set model\.init_args\.denoiser_from\.path to the"):
        trainer(tmp_path, 1, SampleWriter(str(tmp_path / "new"))).predict(model(), labels(), ckpt_path=path)
    assert not list((tmp_path / "new" / "blocks").iterdir())
    write(tmp_path / "new")  # nothing was noted


def test_a_published_denoiser_needs_the_statistics_of_its_latents(tmp_path: Path) -> None:
    """Without them its latents would be decoded unscaled; with them it samples what its training task samples."""
    task, folder = model(), tmp_path / "sit"
    task.normalizer.set_statistics(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 1.0, 2.0, 3.0]))
    task.averaged_denoiser.save_pretrained(folder)
    write_statistics(folder, task.normalizer.mean, task.normalizer.std)
    write(tmp_path / "expected", task=task)
    with pytest.raises(
        ValueError, match=r"model\.init_args\.statistics_from is missing: .* of the exported SiT, or for a"
    ):
        write(tmp_path / "samples", task=model(denoiser=SiT.from_pretrained(folder)))
    published = model(denoiser=SiT.from_pretrained(folder), statistics_from=str(folder))
    write(tmp_path / "samples", task=published)
    assert np.array_equal(pixels(tmp_path / "samples"), pixels(tmp_path / "expected"))
    released = diffusion(statistics_from=str(DATA / "ae_movq_rope"))  # one number for all channels
    assert released.normalizer.std.tolist() == [1.0] * 4


def test_labels_are_balanced_or_random() -> None:
    balanced = labels(count=50)
    assert np.bincount(balanced.labels).tolist() == [5] * 10
    random = labels(count=2000, labels="random", seed=3).labels
    counts = np.bincount(random, minlength=CLASSES)
    assert counts.sum() == 2000
    assert ((counts > 140) & (counts < 260)).all()  # four standard deviations
    assert np.array_equal(random, labels(count=2000, labels="random", seed=3).labels)
    assert not np.array_equal(random, labels(count=2000, labels="random", seed=4).labels)
    data = labels(batch_size=8)
    parts = []
    for rank in range(2):
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        parts += [batch["indices"][batch["valid"]] for batch in data.predict_dataloader()]
    assert sorted(torch.cat(parts).tolist()) == list(range(COUNT))
    with pytest.raises(ValueError, match=r"data\.init_args\.count=0 and block=6 must be at least 1"):
        labels(count=0)
    with pytest.raises(ValueError, match="writes nothing"):
        SampleWriter("x", npz=False, png=False)
