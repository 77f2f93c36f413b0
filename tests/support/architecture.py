"""Rules for imports, names and sizes. Each takes the root of a source tree and returns what breaks the rule."""

import ast
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

PACKAGES = (
    "maetok", "lightning_modules", "datamodules", "callbacks", "command_line", "strategies", "tools", "benchmarks",
)  # fmt: skip
TASKS = {"maetok", "lightning_modules", "datamodules", "callbacks", "strategies"}

MAY_IMPORT = {
    "maetok": {"maetok"},
    "datamodules": {"datamodules", "maetok.formats"},
    "lightning_modules": {"lightning_modules", "maetok"},
    "callbacks": {"callbacks", "maetok"},
    "strategies": {"strategies", "maetok"},
    "command_line": {"command_line"},
    "main": TASKS | {"command_line"},
    "tools": TASKS | {"tools", "command_line", "main"},
    "benchmarks": TASKS | {"benchmarks", "command_line", "main"},
}
"""What a package may import of this repository; nothing imports the tests."""

LAYERS = (
    ("maetok.runtime",),
    ("maetok.formats",),
    ("maetok.networks.layers", "maetok.networks.folder"),
    (
        "maetok.networks.tokenizer", "maetok.networks.denoiser", "maetok.networks.targets",
        "maetok.networks.discriminators", "maetok.networks.inference", "maetok.losses", "maetok.flow",
    ),
    ("maetok.networks",),  # its root, which offers the classes of the layer below
    ("maetok.checkpoints",),
    ("maetok.training",),
    ("maetok.metrics", "maetok.analysis"),
    ("maetok.hub",),
    ("maetok",),  # its root, which offers what users need most
)  # fmt: skip
"""Layers of the library from the bottom up. A part imports parts of lower layers only, never its neighbours."""

APART = ("maetok.networks", "maetok.losses", "maetok.flow")
"""Parts of the library that do not import one another, whatever their layers: networks are passed in as callables."""

FORBIDDEN_IN_LIBRARY = {"lightning", "pytorch_lightning", "lightning_fabric", "jsonargparse", "tensorboard"}
LIBRARIES_OF_FORMATS = {"numpy", "torch", "PIL", "torchvision", "safetensors", *sys.stdlib_module_names}

LOOSE_MODULES = {
    "maetok": 0, "lightning_modules": 10, "datamodules": 16, "callbacks": 3, "command_line": 4, "strategies": 2,
    "tools": 6, "benchmarks": 3,
}  # fmt: skip
"""How many modules a package may hold outside its folders, besides ``__init__`` and ``__main__``."""
MODULES_IN_A_FOLDER = 18
LINES_OF_A_FILE = 300
LINES_OF_A_FUNCTION = 75  # constructors list their sizes
LINES_OF_MAIN = 70

OLD_NAMES = {
    "attended", "bottlenecked", "plays", "Frozen", "take_options", "as_it_is", "really", "moments_for", "used_solver",
    "linger_at_exit", "NOBODY", "ChannelStatistics", "LatentStatistics", "generator",
}  # fmt: skip
"""Names that nothing may have; ``generator=`` remains, because torch calls the argument so."""
OLD_FUNCTIONS = {"local", "whole", "described"}
"""Names that no function may have; variables may."""
OLD_NAMES_OF_LOSSES = {"others"}
"""Names that nothing in the losses and the tasks may have."""


@lru_cache(maxsize=1024)
def parse(path: Path, modified: int) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def tree_of(path: Path) -> ast.Module:
    """Parse a file, once for each state of it."""
    return parse(path, path.stat().st_mtime_ns)


def sources(root: Path, *folders: str) -> Iterator[Path]:
    """Yield the Python files of some folders, by default of all packages and of ``main.py``."""
    for folder in folders or (*PACKAGES, "main.py"):
        path = root / folder
        yield from [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))


def module_of(root: Path, path: Path) -> str:
    """Return the dotted name of a file."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def named_imports(path: Path) -> Iterator[str]:
    """Yield the dotted names that a file imports, also inside functions and under ``TYPE_CHECKING``.

    ``from a import b`` gives ``a.b``; ``import_module("a.b")`` gives ``a.b``.
    """
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def wrong_imports(root: Path) -> list[str]:
    """Return the imports that the table of packages does not allow, and relative ones."""
    ours, found = {*MAY_IMPORT, "tests"}, []
    for path in sources(root):
        package = module_of(root, path).partition(".")[0]
        for name in named_imports(path):
            relative, known = name.startswith("."), name.partition(".")[0] in ours
            if relative or (known and not any(within(name, allowed) for allowed in MAY_IMPORT[package])):
                found.append(f"{path.relative_to(root)} imports {name}")
    return found


def wrong_libraries(root: Path) -> list[str]:
    """Return the imports of frameworks in the library, and of more than a few libraries in the formats."""
    found = []
    for path in sources(root, "maetok"):
        formats = within(module_of(root, path), "maetok.formats")
        for name in named_imports(path):
            top = name.partition(".")[0]
            if top in FORBIDDEN_IN_LIBRARY or (formats and top not in LIBRARIES_OF_FORMATS | {"maetok"}):
                found.append(f"{path.relative_to(root)} imports {name}")
    return found


def layer_of(name: str) -> tuple[int, str]:
    """Return height and name of the part of the library that a dotted name belongs to."""
    parts = [(height, part) for height, row in enumerate(LAYERS) for part in row if within(name, part)]
    return max(parts, key=lambda part: len(part[1]))


def upward_imports(root: Path) -> list[str]:
    """Return the imports inside the library that do not lead downwards."""
    modules, found = module_paths(root), []
    for path in sources(root, "maetok"):
        module = module_of(root, path)
        height, part = layer_of(module)
        for name in (name for name in named_imports(path) if within(name, "maetok")):
            other_height, other = layer_of(imported_module(name, modules))
            ends = [next((apart for apart in APART if within(end, apart)), "") for end in (module, name)]
            if (part != other and other_height >= height) or (all(ends) and ends[0] != ends[1]):
                found.append(f"{path.relative_to(root)} imports {name}")
    return found


def unknown_parts(root: Path) -> list[str]:
    """Return the modules of the library that lie in no layer by their folder."""
    roots = {"maetok", "maetok.networks"}
    modules = {module_of(root, path) for path in sources(root, "maetok")}
    return sorted(module for module in modules - roots if layer_of(module)[1] in roots)


def module_paths(root: Path) -> dict[str, Path]:
    return {module_of(root, path): path for path in sources(root)}


def imported_module(name: str, modules: dict[str, Path]) -> str:
    """Return the module that holds an imported name: the name itself, or what stands before its last dots."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name


def circles(root: Path) -> list[str]:
    """Return the circles of imports, each as the modules on it."""
    modules = module_paths(root)
    graph = {
        module: {imported_module(name, modules) for name in named_imports(path)} - {"", module}
        for module, path in modules.items()
    }
    reachable = {module: reached_from(module, graph) for module in graph}
    groups = {
        tuple(sorted(other for other in reached if module in reachable[other]))
        for module, reached in reachable.items()
        if module in reached
    }
    return [f"circle of {', '.join(group)}" for group in sorted(groups)]


def reached_from(module: str, graph: dict[str, set[str]]) -> set[str]:
    """Return the modules that a module imports, directly or through others; itself only if it is on a circle."""
    found, waiting = set(), set(graph[module])
    while waiting:
        current = waiting.pop()
        found.add(current)
        waiting |= graph[current] - found
    return found


def loose_modules(root: Path) -> list[str]:
    """Return the packages with too many modules outside folders, and what is in the root of the library."""
    found = []
    for path in sorted({path.parent for path in sources(root, *PACKAGES)}):
        name = str(path.relative_to(root))
        loose = sorted(file.name for file in path.glob("*.py") if file.name not in ("__init__.py", "__main__.py"))
        limit = LOOSE_MODULES.get(name, MODULES_IN_A_FOLDER)
        if len(loose) > limit:
            found.append(f"{name} has {len(loose)} loose modules, at most {limit}: {', '.join(loose)}")
    files = {file.name for file in (root / "maetok").iterdir() if file.is_file()}
    return found + sorted(f"maetok/{name}" for name in files - {"__init__.py", "README.md"})


def too_long(root: Path) -> list[str]:
    """Return the files and functions that are too long, and files that change ``sys.path``."""
    found = []
    for path in sources(root):
        text, name = path.read_text(), path.relative_to(root)
        lines, limit = len(text.splitlines()), LINES_OF_MAIN if str(name) == "main.py" else LINES_OF_A_FILE
        if lines > limit:
            found.append(f"{name} has {lines} lines, at most {limit}")
        if "sys.path" in text:
            found.append(f"{name} changes sys.path")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > LINES_OF_A_FUNCTION:
                    found.append(f"{name}: {node.name} has {length} lines, at most {LINES_OF_A_FUNCTION}")
    return found


def identifiers(node: ast.AST) -> list[str]:
    """Return the names that a node of the syntax tree defines or uses; not the keywords of calls."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.alias):
        return [*node.name.split("."), node.asname or ""]
    if isinstance(node, ast.arg):
        return [node.arg]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    return [node.id] if isinstance(node, ast.Name) else []


def old_names(root: Path) -> list[str]:
    """Return the uses of names that were replaced. Configs with old names are read through tables of strings."""
    found = []
    for path in sources(root, *PACKAGES, "main.py", "tests"):
        name = str(path.relative_to(root))
        refused = OLD_NAMES | (
            OLD_NAMES_OF_LOSSES if name.startswith(("maetok/losses", "lightning_modules")) else set()
        )
        for node in ast.walk(tree_of(path)):
            used = set(identifiers(node)) & refused
            if isinstance(node, ast.keyword):
                used = {node.arg} & (refused - {"generator"})
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.alias)
            if is_function and not name.startswith("tests"):
                used |= set(identifiers(node)) & OLD_FUNCTIONS
            found += [f"{name}:{getattr(node, 'lineno', 0)} has the old name {word}" for word in sorted(used)]
    return found


def classes_of_one_name(root: Path) -> list[str]:
    """Return the names that several classes of the packages have."""
    places: dict[str, list[str]] = {}
    for path in sources(root):
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(root)))
    return [f"class {name} is in {', '.join(files)}" for name, files in sorted(places.items()) if len(files) > 1]
