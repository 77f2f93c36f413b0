"""Documents name files, functions and commands that exist, and README stays short."""

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "maetok" / "README.md"} - {ROOT / "CHANGELOG.md"}
)
FOLDERS = tuple(f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
MADE = re.compile(r"^(runs|data|weights|exported)/|[<>$]|/[A-Z]\b|NAME|docs/\w+$")
"""Paths that commands make, and placeholders."""
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#:\s]*)(#[^)\s]*)?\)")


def braces(pattern: str) -> list[str]:
    """Return all names that ``a{b,c}d`` stands for."""
    match = re.search(r"\{([\w,]+)\}", pattern)
    if match is None:
        return [pattern]
    return [name for part in match[1].split(",") for name in braces(pattern.replace(match[0], part, 1))]


def exists(name: str, base: Path = ROOT) -> bool:
    """Whether a name, which may hold ``*``, is there."""
    return all(next(base.glob(one.rstrip("/")), None) is not None for one in braces(name))


def anchors(path: Path) -> set[str]:
    """Return the anchors of the headings of a document."""
    heads = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_links_and_commands_exist(document: Path) -> None:
    text = document.read_text()
    for code in CODE.findall(text):
        for word in code.split():
            if word.startswith(FOLDERS) and not MADE.search(word):
                assert exists(word), f"{document.name} names {word}, which does not exist"
    for command in re.findall(r"--config (configs/[\w/{},*]+\.yaml)", text):
        assert re.search(r"/[A-Z]\.yaml", command) or exists(command), f"{document.name} names {command}"
    for module in re.findall(r"python -m ([\w.]+)", text):
        assert find_spec(module), f"{document.name} names python -m {module}"
    for target, anchor in LINK.findall(text):
        path = (document.parent / target) if target else document
        assert path.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in anchors(path), f"{document.name} links to {target}{anchor}"


def definitions(path: Path) -> set[str]:
    """Return the names of all classes, functions and variables that a module and its classes define."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    named = {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    return named | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


@pytest.mark.parametrize("document", ["README.md", "docs/architecture.md"])
def test_answers_name_functions_that_the_files_define(document: str) -> None:
    """Each row of "Where is ..." gives paths and names; every name must be defined in one of the files of its row."""
    section = (ROOT / document).read_text().partition("## Where is ...")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 7
    for row in rows:
        words = CODE.findall(row)
        modules = [path for word in words if word.endswith(".py") for path in ROOT.glob(word)]
        known = {name for path in modules for name in definitions(path)}
        for word in words:
            name = re.fullmatch(r"((?:[A-Z]|\w+_)\w*(?:\.\w+)?|\w+(?=\())(\(\w*\))?", word)
            for part in name[1].split(".") if name and modules else ():
                assert part in known, f"{document}: {word} is in no file of its row: {row}"


def test_the_changelog_sends_to_modules_that_exist() -> None:
    section = (ROOT / "CHANGELOG.md").read_text().partition("### Moved commands")[2].partition("### Renamed")[0]
    rows = [line.split(" | ")[1] for line in section.splitlines() if line.startswith("| `")]
    modules = [module for row in rows for code in CODE.findall(row) for module in braces(code)]
    assert len(modules) > 70
    assert not [module for module in modules if find_spec(module) is None]


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
