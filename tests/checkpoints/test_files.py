"""Checkpoint files and folders: names, incomplete writes, and writing while the checkpoint changes."""

import os
from pathlib import Path

import pytest
import torch

from maetok.checkpoints import files
from maetok.checkpoints.files import CheckpointFiles, is_complete, join, read_checkpoint, remove, remove_partial, split
from maetok.checkpoints.runs import complete_checkpoints


def checkpoint() -> dict:
    torch.manual_seed(0)
    network = torch.nn.BatchNorm1d(3)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return {"state_dict": network.state_dict(), "optimizer_states": [optimizer.state_dict()], "global_step": 7}


def test_split_and_join_are_inverse() -> None:
    tensors, rest = split(checkpoint())
    names = {"state_dict.running_mean", "optimizer_states.0.0.exp_avg", "optimizer_states.0.1.step"}
    assert names <= tensors.keys()
    assert rest["optimizer_states"][0]["state"] == {0: {}, 1: {}}
    joined, original = join(tensors, rest), checkpoint()
    assert joined["global_step"] == 7
    assert joined["optimizer_states"][0]["param_groups"] == original["optimizer_states"][0]["param_groups"]
    for name, value in original["state_dict"].items():
        assert torch.equal(joined["state_dict"][name], value)
    for index, state in original["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(joined["optimizer_states"][0]["state"][index][name], value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_holds_the_state_at_the_time_of_the_call(tmp_path: Path, asynchronous: bool) -> None:
    writer, state = CheckpointFiles(asynchronous), checkpoint()
    expected = checkpoint()["state_dict"]["weight"]
    writer.save_checkpoint(state, tmp_path / "checkpoints" / "step=000000007.ckpt")
    state["state_dict"]["weight"].zero_()
    writer.wait()
    assert complete_checkpoints(tmp_path) == [tmp_path / "checkpoints" / "step=000000007.ckpt"]
    assert torch.equal(writer.load_checkpoint(complete_checkpoints(tmp_path)[0])["state_dict"]["weight"], expected)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step=000000007.ckpt"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_error_in_writing_is_raised_and_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    writer, path = CheckpointFiles(asynchronous), tmp_path / "step=000000007.ckpt"
    writer.save_checkpoint(checkpoint(), path)
    writer.wait()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):  # noqa: PT012 - one or the other raises
        writer.save_checkpoint({**checkpoint(), "global_step": 8}, path)
        writer.wait()
    assert read_checkpoint(path)["global_step"] == 7
    writer.wait()  # the error is raised only once


def test_a_folder_is_complete_with_all_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints" / "step=000000003.ckpt"
    folder.mkdir(parents=True)
    for name in ("__0_0.distcp", ".metadata", "rest.pt"):
        assert not is_complete(folder)
        assert complete_checkpoints(tmp_path) == []
        (folder / name).touch()
    assert complete_checkpoints(tmp_path) == [folder]


def test_a_folder_loses_its_name_before_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "step=000000003.ckpt"
    folder.mkdir()
    for name in (".metadata", "rest.pt"):
        (folder / name).touch()
    (tmp_path / ".step=000000004.ckpt.partial").touch()

    def killed(path: Path) -> None:
        os.unlink(path / "rest.pt")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            remove(folder)
    assert [path.name for path in tmp_path.glob("step=*")] == []
    remove_partial([tmp_path])
    assert list(tmp_path.iterdir()) == []
