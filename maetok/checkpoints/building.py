"""Build networks from their descriptions: ``class_path`` and ``init_args``, as in configs and checkpoints."""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import partial
from importlib import import_module
from typing import Any, get_origin, get_type_hints

from torch import nn
from torch.distributed.fsdp import FSDPModule


def build_network(description: Any, key: str) -> nn.Module:
    """Build the network that a config describes; raise ValueError, naming the key, if that fails."""
    if not isinstance(description, dict) or "class_path" not in description:
        raise ValueError(
            f"{key}={description!r} has no class_path; files that a config names are filled in only in the config.yaml "
            "that a run saves: give that one as --config"
        )
    try:
        return build(description)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{key}.class_path={description['class_path']} cannot be built with the init_args of the config: {error}"
        ) from error


def build(description: Mapping[str, Any]) -> Any:
    """Call the class or function ``class_path`` with its ``init_args``, converted to the types of its signature."""
    target = imported(description["class_path"])
    hints = get_type_hints(target.__init__ if isinstance(target, type) else target)  # type: ignore[misc]
    arguments = {**description.get("init_args", {}), **description.get("dict_kwargs", {})}
    return target(**{name: argument(value, hints.get(name)) for name, value in arguments.items()})


def argument(value: Any, hint: Any) -> Any:
    """Convert a value of a config to the type of its parameter: an object, a builder, a dataclass or a tuple."""
    if isinstance(value, dict) and "class_path" in value:
        if get_origin(hint) is Callable:
            return partial(imported(value["class_path"]), **value.get("init_args", {}))
        return build(value)
    if isinstance(value, dict) and is_dataclass(hint):
        return hint(**value)  # type: ignore[operator]
    return tuple(value) if isinstance(value, list) else value


def imported(path: str) -> Any:
    """Return what a dotted path names: a class or function of a module, or a method of a class."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name != module or "." not in module:  # the module exists, but one of its imports fails
            raise
        return getattr(imported(module), name)


def own_class_path(network: nn.Module) -> str:
    """Return the dotted path of a network's class, without the class that sharding mixes in."""
    kind = next(kind for kind in type(network).__mro__ if not issubclass(kind, FSDPModule))
    return f"{kind.__module__}.{kind.__qualname__}"
