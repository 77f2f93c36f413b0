"""LightningCLI with interpolation by OmegaConf in its configs, and with keys that had another name once."""

import json
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from command_line.interpolation import MARK, Interpolation, InterpolationError, Shared
from command_line.legacy import modernize, modernize_flag
from command_line.tree import read_tree, settings

MODE = "interpolated"
_translate: ContextVar[Callable[[Any], Any] | None] = ContextVar("_translate", default=None)


def load(text: str) -> Any:
    """Return what a text means in YAML; while a command line is parsed, with new names and resolved interpolations."""
    content, translate = get_loader("yaml")(text), _translate.get()
    return translate(content) if translate and isinstance(content, dict | list) else content


set_loader(MODE, load, exceptions=(yaml.YAMLError, InterpolationError))


class InterpolatingCLI(LightningCLI):
    """LightningCLI that resolves ``${...}`` in files and flags with OmegaConf, and reads old keys with a warning.

    jsonargparse reads each file through :func:`load`, so it sees final values before it checks types. The values come
    from the tree that all files and flags make together (:mod:`command_line.tree`), so none is stale.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, parser_kwargs={"parser_mode": MODE}, **kwargs)

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the values that parts of an experiment share."""
        super().add_default_arguments_to_parser(parser)
        parser.add_class_arguments(Shared, "shared", instantiate=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str] | None) -> None:
        """Parse the command line after old names have been replaced and interpolations resolved."""
        arguments = list(sys.argv[1:] if args is None else args)
        try:
            arguments, translate = self._translated(arguments)
        except InterpolationError as error:
            parser.error(str(error))
        token = _translate.set(translate)
        try:
            self.config = parser.parse_args(arguments)
        finally:
            _translate.reset(token)

    def instantiate_classes(self) -> None:
        """Tell the task the arguments that it was built with, which its checkpoints record."""
        super().instantiate_classes()
        self.model.configured_arguments = self.config_dump.get("model", {}).get("init_args", {})

    def _parse_ckpt_path(self) -> None:
        """Do not let hyper-parameters stored in a checkpoint win over the config (LightningCLI would)."""

    def _translated(self, arguments: list[str]) -> tuple[list[str], Callable[[Any], Any]]:
        """Return the arguments with new names and values, and the function that does the same to contents of files."""
        subcommands, changes = set(self.subcommands()), set[str]()
        task = read_tree(arguments, subcommands).task
        arguments = [modernize_flag(argument, task, changes) for argument in arguments]
        tree = read_tree(arguments, subcommands, lambda content: modernize(content, task, changes))
        for change in sorted(changes):
            warnings.warn(f"{change}; the old name still works", FutureWarning, stacklevel=2)
        flags = {position: key for position, key, _ in settings(arguments) if key != "config"}
        resolve = Interpolation(tree, list(flags.values()))
        for position in flags:
            arguments[position] = resolve_flag(arguments[position], resolve)
        return arguments, lambda content: resolve(modernize(content, task))


def resolve_flag(argument: str, resolve: Callable[[str], Any]) -> str:
    """Return ``--key=value`` or a value with its interpolations resolved, written as an argument again."""
    if MARK not in argument:
        return argument
    name, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    resolved = resolve(value)
    return name + equals + (resolved if isinstance(resolved, str) else json.dumps(resolved))
