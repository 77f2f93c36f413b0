"""Cases of what surrounds the networks: optimizer, moving average, checkpoints, start-up, reading."""

import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Case, Numbers
from benchmarks.speed import reference
from benchmarks.speed.networks import sit
from benchmarks.speed.variants import REFERENCE, SUITE, measure
from maetok.checkpoints.files import CheckpointFiles, read_checkpoint, write_file
from maetok.training.ema import EMA

ROOT = Path(__file__).parents[2]


def update(rounds: int) -> Numbers:
    """Measure gradient norm, AdamW and moving average of SiT-B, without forward and backward pass."""
    network = sit("B", 128)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], 1e-4, fused=True)
    ema = EMA(network, 0.9999)
    gradients = [torch.randn_like(p) for p in network.parameters() if p.requires_grad]

    def give_gradients() -> None:
        for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
            parameter.grad = gradient

    def plain() -> None:
        give_gradients()
        optimizer.param_groups[0].update(fused=False, foreach=False)
        reference.update(network, optimizer, ema.network, 0.9999)

    def own() -> None:
        give_gradients()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0, foreach=True)
        optimizer.param_groups[0].update(fused=True, foreach=None)
        optimizer.step()
        ema.update(network, 10**6)

    return measure({REFERENCE: plain, SUITE: own}, "float32", 1, rounds)


def moving_average(rounds: int) -> Numbers:
    """Measure the moving average of SiT-B alone."""
    network = sit("B", 128)
    ema = EMA(network, 0.9999)

    @torch.no_grad()
    def plain() -> None:
        for mean, value in zip(ema.network.parameters(), network.parameters(), strict=True):
            mean.mul_(0.9999).add_(value, alpha=1e-4)

    return measure({REFERENCE: plain, SUITE: lambda: ema.update(network, 10**6)}, "float32", 1, rounds)


def checkpoints(rounds: int) -> Numbers:
    """Write and read a checkpoint of SiT-B with optimizer and average, 2.1 GB; the reference is ``torch.save``.

    The suite waits until everything is on the disk, so its time includes the kernel's work; ``torch.save`` does not.
    ``asynchronous`` is the time that training waits.
    """
    network = sit("B", 128)
    state = {name: {"exp_avg": p.detach(), "exp_avg_sq": p.detach()} for name, p in network.named_parameters()}
    checkpoint = {
        "state_dict": {**network.state_dict(), **EMA(network).state_dict()},
        "optimizer_states": [{"state": state}],
    }
    files = CheckpointFiles(asynchronous=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.save(checkpoint, folder / "plain")
        variants: dict[str, Callable[[], object]] = {
            REFERENCE: lambda: torch.save(checkpoint, folder / "plain"),
            SUITE: lambda: write_file(checkpoint, folder / "own"),
            "suite, asynchronous": lambda: files.save_checkpoint(checkpoint, folder / "later"),
            "reference, read": lambda: torch.load(folder / "plain", weights_only=True),
            "suite, read": lambda: read_checkpoint(folder / "plain"),
        }
        numbers = measure(variants, "float32", 1, rounds)
        files.wait()
    return numbers


def start_up(rounds: int) -> Numbers:
    """Measure CPU-seconds of ``python main.py --help``, of a bare ``import torch``, and of the help of ``fit``."""
    commands = {
        REFERENCE: ["-c", "import torch"],
        SUITE: ["main.py", "--help"],
        "suite, fit --help": ["main.py", "fit", "--help"],
    }

    def seconds(arguments: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    times = {name: [seconds(arguments) for _ in range(rounds)] for name, arguments in commands.items()}
    numbers: Numbers = {}
    for name, values in times.items():
        numbers |= {f"{name} seconds": float(np.median(values))}
        numbers |= {f"{name} seconds min": min(values), f"{name} seconds max": max(values)}
    return numbers


def reading_cases(folder: Path, measured_images: int, measured_latents: int) -> dict[str, list[Case]]:
    """Return cases of the training loaders and the usual ones; the data is written to ``folder`` once."""
    from benchmarks.loading import data, latents

    photos = folder / "photos"
    write_sample_photos(photos, 600)
    shards = data.pack(photos, folder / "shards")
    latents.write_data(folder, {"webdataset_loader", "suite_loader"})
    images = [
        case
        for case in data.loader_cases(photos, shards, 1, measured_images)
        if case.name.startswith((data.REFERENCE, "bare loop", "suite"))
    ]
    cached = [
        Case(
            name,
            "benchmarks.loading.latents:measure_loader",
            {"loader": loader, "folder": str(folder), "num_workers": 0, "measured": measured},
        )
        for name, loader, measured in (
            ("webdataset, .npy members", "webdataset_loader", measured_latents // 25),
            ("suite", "suite_loader", measured_latents),
        )
    ]
    return {"images": images, "latents": cached}


def write_sample_photos(folder: Path, count: int) -> None:
    """Write crops of scikit-learn's two photographs, as an image folder of two classes."""
    import sklearn.datasets

    from benchmarks.loading.photos import crops

    if folder.exists():
        return
    for path in sorted((Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg")):
        target = folder / path.stem
        target.mkdir(parents=True)
        for number, image in enumerate(crops(path, count // 2, np.random.default_rng(0))):
            image.save(target / f"{number:06d}.jpg", quality=95, subsampling=("4:2:0", "4:4:4")[number % 2])
