"""Discovery of networks, checkpoint formats and heads, each one file in its folder; names that are imported when asked for."""

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any


def modules_defining(package: ModuleType, name: str) -> dict[str, Path]:
    """The modules of a package whose text defines ``name`` at its top level, in alphabetical order: full name to file.

    None is imported.
    """
    definition = re.compile(rf"^(def {name}\(|{name}\b.*=)", re.MULTILINE)
    found = {}
    for module in sorted(pkgutil.iter_modules(package.__path__), key=lambda module: module.name):
        path = Path(module.module_finder.path, f"{module.name}.py")  # type: ignore[union-attr]
        if path.exists() and definition.search(path.read_text("utf-8")):
            found[f"{package.__name__}.{module.name}"] = path
    return found


def exported(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package whose names are those of its modules, ``where`` says which.

    Commands print their help without torch, pandas, Dask: a module is imported when one of its names is asked for.
    """

    def find(name: str) -> Any:
        if name in where:
            return getattr(importlib.import_module(f"{package}.{where[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return find


def load_modules(package: ModuleType, name: str) -> list[ModuleType]:
    """Those modules, imported."""
    return [importlib.import_module(module) for module in modules_defining(package, name)]
