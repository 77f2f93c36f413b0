"""The dependency rule and the size limits, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "maetok",
    "lightning_modules",
    "datamodules",
    "callbacks",
    "command_line",
    "strategies",
    "benchmarks",
    "main",
    "tests",
)
MAY_IMPORT = {
    "maetok": {"maetok"},
    "datamodules": {"datamodules", "maetok"},  # of maetok only the formats: see below
    "lightning_modules": {"lightning_modules", "maetok"},
    "callbacks": {"callbacks", "maetok"},
    "strategies": {"strategies", "maetok"},
    "command_line": {"command_line"},
}
APART = {"networks", "losses", "flow"}  # parts of maetok that do not know each other


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_they_may(package: str) -> None:
    assert sources(package)
    for path in sources(package):
        ours = {name.split(".")[0] for name in imported_modules(path)} & set(PACKAGES)
        assert ours <= MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {ours - MAY_IMPORT[package]}"


def test_datamodules_import_only_the_formats_of_the_library() -> None:
    for path in sources("datamodules"):
        ours = {name for name in imported_modules(path) if name.split(".")[0] == "maetok"}
        assert all(name.startswith("maetok.formats.") for name in ours), f"{path.relative_to(ROOT)} imports {ours}"


def test_formats_import_nothing_else_of_the_suite_and_few_libraries() -> None:
    allowed = {"numpy", "torch", "PIL", "torchvision", "safetensors", *sys.stdlib_module_names}
    for path in sources("maetok/formats"):
        others = {name for name in imported_modules(path) if not name.startswith("maetok.formats.")}
        assert {name.split(".")[0] for name in others} <= allowed, f"{path.relative_to(ROOT)} imports {others}"


def test_the_library_knows_nothing_of_lightning() -> None:
    for path in sources("maetok"):
        roots = {name.split(".")[0] for name in imported_modules(path)}
        assert not roots & {"lightning", "pytorch_lightning", "jsonargparse", "tensorboard"}, path


def test_networks_losses_and_flow_stay_apart() -> None:
    for part in APART:
        for path in sources(f"maetok/{part}"):
            for name in imported_modules(path):
                for other in APART - {part}:
                    assert not name.startswith(f"maetok.{other}"), f"{path.relative_to(ROOT)} imports {name}"


def test_main_is_short_and_nobody_imports_it() -> None:
    assert len((ROOT / "main.py").read_text().splitlines()) <= 70
    for package in MAY_IMPORT:
        for path in sources(package):
            assert "main" not in imported_modules(path)


def test_files_and_functions_stay_readable() -> None:
    for package in MAY_IMPORT:
        for path in sources(package):
            text = path.read_text()
            assert len(text.splitlines()) <= 300, path
            assert "sys.path" not in text, path
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    length = (node.end_lineno or 0) - node.lineno + 1
                    assert length <= 75, f"{path}: {node.name} has {length} lines"  # constructors list their sizes
