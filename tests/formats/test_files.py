"""A file has its name only when it is complete."""

import os
from pathlib import Path

import pytest

from maetok.formats.files import atomic_write, partial_path, write_text


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.txt"
    with atomic_write(path) as partial:
        partial.write_text("new")
        assert partial == tmp_path / "folder" / ".a.txt.partial" == partial_path(path)
        assert not path.exists()
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def interrupted() -> None:
        with atomic_write(path) as partial:
            partial.write_text("half") if kind == "file" else partial.mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_flushed_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda file: steps.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("rename"), replace(*names)))
    write_text(tmp_path / "a.json", "{}")
    assert steps == [".a.json.partial", "rename", tmp_path.name]
