"""Old public names that still import, with a warning."""

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def renamed(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a module's ``__getattr__`` that serves old names and warns.

    Args:
        package: dotted name of the package.
        names: the new dotted path of each old name.

    Returns:
        A function that takes a name and returns the object; it raises AttributeError for an unknown name.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, new = names[name].rpartition(".")
        warnings.warn(f"{package}.{name} is now {names[name]}", FutureWarning, stacklevel=2)
        return getattr(import_module(module), new)

    return get
