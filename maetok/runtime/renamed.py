"""Old public names that still import, with a warning, and old commands that name the new ones."""

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
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


class MovedCommands(MetaPathFinder, InspectLoader):
    """Answers ``python -m OLD`` for commands that moved with the new command; importing an old module names it too.

    Args:
        names: the new module of each old one.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        """Return a spec for an old module, and None for any other."""
        return spec_from_loader(fullname, self) if fullname in self.names else None

    def get_source(self, fullname: str) -> str:
        """Return code that ends the process when it runs as a command, and raises ModuleNotFoundError on import."""
        new = self.names[fullname]
        return (
            f"if __name__ == '__main__':\n    raise SystemExit('python -m {fullname} is now python -m {new}')\n"
            f"raise ModuleNotFoundError('{fullname} is now {new}', name='{fullname}')\n"
        )

    def register(self) -> None:
        """Ask this finder for modules that no other finder knows."""
        sys.meta_path.append(self)
