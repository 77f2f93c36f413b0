"""Commands that moved name the new command, which exists, and old modules name the new module."""

import importlib
import subprocess
import sys
from importlib.util import find_spec

import pytest

import benchmarks  # noqa: F401 - importing a package registers its old commands
import callbacks  # noqa: F401
import maetok  # noqa: F401
from maetok.runtime.renamed import MovedCommands


def moved() -> dict[str, str]:
    """Return all old commands with the new ones."""
    return {
        old: new for finder in sys.meta_path if isinstance(finder, MovedCommands) for old, new in finder.names.items()
    }


def test_all_commands_that_moved_are_known_and_their_new_modules_exist() -> None:
    assert {"benchmarks.plan", "callbacks.compare_runs", "maetok.consolidate"} <= moved().keys()
    assert len(moved()) == 13
    for new in moved().values():
        spec = find_spec(new)
        assert spec is not None
        if spec.submodule_search_locations is not None:
            assert find_spec(f"{new}.__main__")


@pytest.mark.parametrize("old", ["benchmarks.study", "maetok.consolidate"])
def test_an_old_command_ends_with_the_new_one(old: str) -> None:
    done = subprocess.run([sys.executable, "-m", old, "--any"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"python -m {old} is now python -m {moved()[old]}\n")


def test_importing_an_old_module_names_the_new_one() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"benchmarks\.plan is now tools\.plan"):
        importlib.import_module("benchmarks.plan")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'benchmarks\.unknown'"):
        importlib.import_module("benchmarks.unknown")
