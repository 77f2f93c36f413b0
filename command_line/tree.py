"""What the files and flags of one command say together, as one tree without types.

jsonargparse merges files and flags while it checks types, so it has no merged tree in which ``${...}`` still stands.
This module merges them once more by the same rules: later wins key by key, lists are replaced, ``key+`` appends, and
the name of a file stands for its content. The tree only tells what an interpolation refers to; jsonargparse merges
what runs.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import get_loader

SUFFIXES = (".yaml", ".yml", ".json")
CONFIG_FLAGS = ("--config", "-c")
NOT_SETTINGS = ("help", "print_config")
SPECIAL = {"class_path", "init_args", "dict_kwargs"}


@dataclass
class Tree:
    """Merged settings of one command.

    ``values`` holds them, ``texts`` each text that some file or flag gives to a key: (where, dotted key, text).
    ``translate`` is applied to the content of each file.
    """

    translate: Callable[[Any], Any] = lambda content: content
    values: dict[str, Any] = field(default_factory=dict)
    texts: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def task(self) -> str:
        """Return the class of the model as written, or "" if there is none."""
        model = self.values.get("model")
        name = model.get("class_path") if isinstance(model, dict) else model
        return name if isinstance(name, str) else ""

    def has(self, key: str, text: str) -> bool:
        """Return whether a key still has a text; for keys inside lists, always True."""
        value: Any = self.values
        for part in key.split("."):
            if isinstance(value, list) or part.endswith("+"):
                return True
            value = value.get(part) if isinstance(value, dict) else None
        return value == text

    def add_config(self, value: str, subcommand: str | None = None) -> None:
        """Merge the value of ``--config``: the name of a file, or YAML; with a subcommand, only its section."""
        path = Path(value).absolute()
        with suppress(OSError):  # YAML may be too long for the name of a file
            value = path.read_text() if path.is_file() else value
        content = load(value)
        if subcommand is not None and isinstance(content, dict):
            content = content.get(subcommand)
        if isinstance(content, dict):
            merge(self.values, self._filled(self.translate(content), path, ""))

    def add_flag(self, key: str, text: str) -> None:
        """Merge a flag whose name is ``key``; a file's name is relative to the working directory."""
        content = self._filled(load(text), Path.cwd() / "flag", key, where=f"--{key}")
        set_by_key(self.values, key.split("."), content)

    def _filled(self, content: Any, path: Path, key: str, where: str = "") -> Any:
        """Return what a file says with the contents of the files that it names, and note all texts."""
        where = where or str(path)
        if isinstance(content, dict):
            return {
                name: self._filled(value, path, f"{key}.{name}".lstrip("."), where) for name, value in content.items()
            }
        if isinstance(content, list):
            return [self._filled(value, path, f"{key}.{index}", where) for index, value in enumerate(content)]
        if not isinstance(content, str):
            return content
        self.texts.append((where, key, content))
        fragment = path.parent / content
        if content.endswith(SUFFIXES) and fragment.is_file():
            return self._filled(self.translate(load(fragment.read_text())), fragment.resolve(), key)
        return content


def load(text: str) -> Any:
    """Return what a text means in YAML, or the text itself if it is no YAML."""
    try:
        return get_loader("yaml")(text)
    except yaml.YAMLError:
        return text


def merge(base: dict[str, Any], new: dict[str, Any]) -> None:
    """Merge a tree into another one in place; later wins key by key."""
    for key, value in new.items():
        name = key.removesuffix("+") if isinstance(key, str) else key
        before = base.get(name)
        if name != key:
            base[name] = as_list(before) + as_list(value)
        elif isinstance(value, dict) and isinstance(before, str) and SPECIAL & value.keys():
            base[name] = {"class_path": before} | value
        elif isinstance(value, dict) and isinstance(before, dict):
            merge(before, value)
        elif isinstance(value, str) and isinstance(before, dict) and "class_path" in before:
            before["class_path"] = value
        else:
            base[name] = value


def set_by_key(tree: dict[str, Any], parts: list[str], value: Any) -> None:
    """Set a dotted key; ``init_args`` may be left out, as on the command line. Arguments inside lists are skipped."""
    for part in parts[:-1]:
        tree = arguments_of(tree, part)
        child = tree.get(part)
        if isinstance(child, list):
            return
        if not isinstance(child, dict):
            tree[part] = {} if child is None else {"class_path": child}
        tree = tree[part]
    merge(arguments_of(tree, parts[-1]), {parts[-1]: value})


def arguments_of(tree: dict[str, Any], part: str) -> dict[str, Any]:
    """Return the mapping in which a part of a key lies: ``init_args``, if this is the description of a class."""
    if part in SPECIAL or not SPECIAL & tree.keys():
        return tree
    return tree.setdefault("init_args", {})


def as_list(value: Any) -> list[Any]:
    """Return a list unchanged, None as an empty list, anything else as a list of one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def settings(arguments: list[str]) -> Iterator[tuple[int, str, str]]:
    """Yield position, key and value of the flags of a command line, ``config`` included, in order.

    The position belongs to the argument with the value: ``--key=value``, or what follows ``--key``.
    """
    position = 0
    while position < len(arguments):
        name, equals, value = arguments[position].partition("=")
        follows = position + 1 < len(arguments) and not arguments[position + 1].startswith("--")
        if name.startswith("-") and not name[1:2].isdigit() and (equals or follows):
            if not equals:
                position += 1
                value = arguments[position]
            yield position, "config" if name in CONFIG_FLAGS else name.lstrip("-"), value
        position += 1


def read_tree(arguments: list[str], subcommands: set[str], translate: Callable[[Any], Any] | None = None) -> Tree:
    """Return what a command line says; jsonargparse reports files that do not exist."""
    tree = Tree(translate or (lambda content: content))
    first = next((position for position, argument in enumerate(arguments) if argument in subcommands), len(arguments))
    for position, key, value in settings(arguments):
        if key == "config":
            tree.add_config(value, arguments[first] if position < first < len(arguments) else None)
        elif key.rpartition(".")[2] not in NOT_SETTINGS and position > first:
            tree.add_flag(key, value)
    return tree
