"""What the command line gives to every Trainer."""

import pytest
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

from callbacks.trainer_setup import with_slurm

SRUN = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "mine"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1"}


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SRUN, *TORCHRUN):
        monkeypatch.delenv(name, raising=False)


def test_srun_means_slurm_without_its_requeue(monkeypatch: pytest.MonkeyPatch) -> None:
    other = LightningEnvironment()
    assert with_slurm(None) == []
    assert with_slurm(other) == [other]
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    for given in (None, [], other, [other]):
        *before, slurm = with_slurm(given)
        assert isinstance(slurm, SLURMEnvironment)
        assert slurm.auto_requeue is False
        assert before == ([other] if given else [])


def test_an_environment_that_was_chosen_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    own = SLURMEnvironment(auto_requeue=True)
    assert with_slurm([own]) == [own]
    for name, value in TORCHRUN.items():  # torchrun started by srun
        monkeypatch.setenv(name, value)
    assert with_slurm(None) == []
