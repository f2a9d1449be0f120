"""Discovery of networks, checkpoint formats and heads: each is one file in its folder."""

import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType


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


def load_modules(package: ModuleType, name: str) -> list[ModuleType]:
    """Those modules, imported."""
    return [importlib.import_module(module) for module in modules_defining(package, name)]
