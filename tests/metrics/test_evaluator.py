"""The evaluator measures what the libraries measure, and counts every sample exactly once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from maetok.losses import LPIPSLoss
from maetok.metrics import reconstruction_metrics
from maetok.metrics.evaluator import ImageEvaluator
from maetok.metrics.gaussians import Gaussian
from maetok.metrics.protocols import GFID_ADM, RFID_VAL, Measurement
from tests.support.feature_networks import MeanColours, SmallInception, pictures, share
from tests.support.helpers import run_subprocess


def evaluated(samples: Tensor, references: Tensor, network: nn.Module | None = None, **options) -> Measurement:
    """Measure samples in interleaved batches, as several processes give them, under the protocol for samples."""
    protocol = replace(GFID_ADM, inception_score_split=20)
    evaluator = ImageEvaluator(protocol, network or SmallInception(), **options)
    for number in range(7):
        indices = torch.arange(number, len(samples), 7)
        evaluator.update(samples[indices], indices)
    for indices in torch.arange(len(references)).split(9):
        evaluator.update(references[indices], indices, is_reference=True)
    return evaluator.compute(len(samples), len(references))


def test_generated_images_are_measured_as_torch_fidelity_does() -> None:
    samples, references = pictures(60, seed=1), pictures(50, seed=2)
    measured = evaluated(samples, references)
    ours, real = SmallInception()(samples), SmallInception()(references)
    for metric, name in (("fid", "pool"), ("sfid", "spatial")):
        moments = [fid_features_to_statistics(side[name].double()) for side in (ours, real)]
        expected = fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
        assert measured.values[metric] == pytest.approx(expected, rel=1e-6)
    expected = isc_features_to_metric(ours["logits"], splits=3, shuffle=False)["inception_score_mean"]
    assert measured.values["inception_score"] == pytest.approx(expected, rel=1e-6)
    options = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": False, "verbose": False}
    expected = prc_features_to_metric(ours["pool"].double(), real["pool"].double(), **options)
    found = {name: measured.values[name] for name in ("precision", "recall")}
    assert found == pytest.approx({name: expected[name] for name in found}, abs=1e-6)
    assert 0.1 < min(found.values()) < 1
    assert measured.name == "gfid-adm@60,references=50,statistics=images"
    assert not measured.unavailable


def test_distance_equals_torchmetrics_and_is_fd_without_inception() -> None:
    samples, references = pictures(60, seed=1), pictures(50, seed=2)
    reference = FrechetInceptionDistance(feature=MeanColours(), normalize=True)
    reference.set_dtype(torch.float64)
    reference.update(references.double() / 255, real=True)
    reference.update(samples.double() / 255, real=False)
    measured = evaluated(samples, references, MeanColours())
    assert measured.values["fd"] == pytest.approx(reference.compute().item(), rel=1e-5)
    assert measured.values.keys() == {"fd", "precision", "recall"}
    assert measured.unavailable.keys() == {"sfid", "inception_score"}
    assert "MeanColours() gives no logits" in measured.unavailable["inception_score"]
    assert "fid" not in str(measured).replace("gfid-adm", "").replace("no sfid", "")
    same = evaluated(samples, samples, MeanColours())
    assert same.values["fd"] < 1e-3
    assert (same.values["precision"], same.values["recall"]) == (1, 1)


def test_moments_of_the_references_may_come_from_a_file() -> None:
    samples, references = pictures(60, seed=1), pictures(50, seed=2)
    features = {name: value.double() for name, value in SmallInception()(references).items()}
    gaussians = {name: Gaussian(features[name].mean(0), features[name].T.cov()) for name in ("pool", "spatial")}
    whole, other = evaluated(samples, references), evaluated(samples, references[:10], reference_moments=gaussians)
    for name in ("fid", "sfid", "inception_score"):
        assert other.values[name] == pytest.approx(whole.values[name], rel=1e-9)
    assert other.values["recall"] != whole.values["recall"]
    assert other.name == "gfid-adm@60,references=10"
    without = evaluated(samples, references[:0], reference_moments=gaussians)
    assert without.values["fid"] == other.values["fid"]
    assert without.unavailable == {"precision_recall": "no reference images"}
    with pytest.raises(
        ValueError, match=r"belong to Inception features, not to MeanColours\(\): use InceptionFeatures"
    ):
        ImageEvaluator(GFID_ADM, MeanColours(), reference_moments=gaussians)


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> LPIPSLoss:
    from torchvision.models import squeezenet1_1

    path = tmp_path_factory.mktemp("lpips") / "squeezenet.pth"
    torch.manual_seed(0)
    torch.save(squeezenet1_1().state_dict(), path)
    return LPIPSLoss("squeeze", str(path))


def test_reconstructions_are_measured_in_pairs(lpips: LPIPSLoss) -> None:
    images = pictures(9, seed=3, size=32)
    reconstructions = (images.float() * 0.9 + 5).to(torch.uint8)
    evaluator = ImageEvaluator(RFID_VAL, MeanColours(), lpips)
    for indices in torch.randperm(9).split(4):
        evaluator.update_pairs(reconstructions[indices], images[indices], indices)
    measured = evaluator.compute(9, 9)
    expected = reconstruction_metrics()
    expected.update(reconstructions / 255, images / 255)
    for name, value in expected.compute().items():
        if name != "l1":
            assert measured.values[name] == pytest.approx(value.item(), rel=1e-5)
    distance = lpips(reconstructions / 127.5 - 1, images / 127.5 - 1)  # all in one batch
    assert measured.values["lpips"] == pytest.approx(distance.item(), rel=1e-4)
    assert measured.digests.keys() == {"features", "lpips"}
    equal = ImageEvaluator(RFID_VAL, MeanColours())
    equal.update_pairs(images, images, torch.arange(9))
    measured = equal.compute(9, 9)
    assert measured.values["ssim"] == pytest.approx(1, abs=1e-5)
    assert "not finite" in measured.unavailable["psnr"]
    assert "no network was given" in measured.unavailable["lpips"]


def test_too_few_images_leave_the_distance_out() -> None:
    measured = evaluated(pictures(6), pictures(50))
    assert "6 images are too few for 6 pool features" in measured.unavailable["fid"]
    assert "precision" in measured.values


class TestAccounting:
    """Duplicate, missing and unknown samples are errors that name the first index."""

    def collect(self, *indices: int) -> ImageEvaluator:
        evaluator = ImageEvaluator(GFID_ADM, MeanColours())
        evaluator.update(pictures(len(indices)), torch.tensor(indices))
        evaluator.update(pictures(5), torch.arange(5), is_reference=True)
        return evaluator

    def test_order_does_not_matter(self) -> None:
        assert self.collect(2, 0, 3, 1, 4).compute(5, 5).samples == 5

    def test_duplicates(self) -> None:
        with pytest.raises(ValueError, match="1 samples too many: index 3 was counted more than once"):
            self.collect(0, 3, 1, 3, 4).compute()

    def test_missing(self) -> None:
        with pytest.raises(ValueError, match=r"2 of 7 samples are missing, but 0 .* \(first indices: 2, 5\)"):
            self.collect(0, 3, 1, 4, 6).compute(7, 5)
        with pytest.raises(ValueError, match="1 of 6 references are missing"):
            self.collect(0, 3, 1, 4, 2).compute(5, 6)
        assert self.collect(0, 3, 1, 4, 2).compute().samples == 5  # the expected number is unknown

    def test_broken_ones_are_known(self) -> None:
        evaluator = ImageEvaluator(RFID_VAL, MeanColours())
        images = pictures(5, size=16)
        evaluator.update_pairs(images, images, torch.tensor([0, 3, 1, 4, 6]))
        assert evaluator.compute(7, 7, left_out=2).name == "rfid-val@5"
        with pytest.raises(ValueError, match="2 of 7 samples are missing, but 1 are known to be broken"):
            evaluator.compute(7, 7, left_out=1)

    def test_strangers(self) -> None:
        with pytest.raises(ValueError, match=r"index 9 of the samples is not in 0 \.\.\. 4"):
            self.collect(0, 1, 2, 3, 9).compute(5, 5)

    def test_images_that_cannot_be_compared(self) -> None:
        evaluator = self.collect(0, 1, 2, 3)
        with pytest.raises(ValueError, match=r"images of \(9, 9\) pixels after images of \(8, 8\)"):
            evaluator.update(pictures(1, size=9), torch.tensor([4]))
        with pytest.raises(ValueError, match=r"must be \(n, 3, H, W\) uint8"):
            evaluator.update(pictures(1) / 255, torch.tensor([4]))
        with pytest.raises(ValueError, match="with 2"):
            evaluator.update(pictures(1), torch.tensor([4, 5]))
        with pytest.raises(ValueError, match="nothing to measure: 0 samples"):
            ImageEvaluator(GFID_ADM, MeanColours()).compute()


PROGRAM = """
import json, sys
import pytest, torch, torch.distributed as dist, torch.multiprocessing as mp
from maetok.metrics.evaluator import ImageEvaluator
from maetok.metrics.protocols import GFID_ADM
from tests.support.feature_networks import SmallInception, pictures, share

def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    measured = share(rank, 2)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(measured.record(), file)
    evaluator = ImageEvaluator(GFID_ADM, SmallInception())
    evaluator.update(pictures(4), torch.arange(4) + 3 * rank)  # index 3 on both
    with pytest.raises(ValueError, match="1 samples too many: index 3"):
        evaluator.compute()
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
"""


def test_two_processes_measure_what_one_does(tmp_path: Path) -> None:
    run_subprocess(PROGRAM, tmp_path, str(tmp_path))
    one = json.loads(json.dumps(share(0, 1).record()))
    for rank in (0, 1):
        two = json.loads((tmp_path / f"{rank}.json").read_text())
        for name in ("precision", "recall", "inception_score"):  # computed from the same rows in the same order
            assert two["metrics"][name] == one["metrics"][name]
        for name in ("fid", "sfid"):  # computed from sums in another order
            assert two["metrics"].pop(name) == pytest.approx(one["metrics"][name], rel=1e-9)
        assert two | {"metrics": one["metrics"]} == one
