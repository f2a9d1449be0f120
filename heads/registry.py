"""The heads by name. What there is, is listed without torch.

A head is a module of ``heads.models`` that defines ``build(shape, **options)``; it is discovered automatically, named after its
file, and described by its docstring.
"""

import ast
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from featurestore.discovery import modules_defining
from featurestore.errors import FeatureStoreError
from featurestore.text import near_matches
from heads import models

if TYPE_CHECKING:
    from heads.models.base import Head

_MODULES = {
    name.rpartition(".")[2].replace("_", "-"): (name, path) for name, path in modules_defining(models, "build").items()
}
HEADS: dict[str, str] = {
    name: (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").partition("\n")[0]
    for name, (_, path) in _MODULES.items()
}
_STORED_AS = {"l2": "pull"}  # the options that files know by another name


def check_head(name: str) -> None:
    """FeatureStoreError, with near matches, if there is no head of that name."""
    if name not in HEADS:
        raise FeatureStoreError(f"there is no head {name!r}. {near_matches(name, HEADS)}")


def build_head(name: str, shape: tuple[int, ...], **options: Any) -> "Head":
    """An untrained head of that name for rows of ``shape``, with weights still to be drawn (``reset``) or loaded.

    Options: ``parallel`` (conv, fc: one bridge for each of the three), ``rank``, ``measure`` (``cosine`` or ``dot``) and
    ``l2`` (similarity), ``measure`` (zero-shot), ``faces`` (identity). FeatureStoreError for an unknown name.
    """
    import torch

    check_head(name)
    module = importlib.import_module(_MODULES[name][0])
    with torch.device("meta"):
        head: Head = module.build(tuple(shape), **options)
    head.architecture = {"head": name, "shape": list(shape), **options}
    return head


def draw_head(name: str, shape: tuple[int, ...], seed: int, **options: Any) -> "Head":
    """A head with initial weights that depend on ``seed`` and the architecture alone, in training mode, on the CPU."""
    import torch

    head = build_head(name, shape, **options).to_empty(device="cpu")
    head.reset(torch.Generator().manual_seed(seed))
    return head


def stored_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """A head's options under the names that run folders and checkpoints know them by."""
    return {_STORED_AS.get(name, name): value for name, value in options.items()}


def options_from_file(options: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse."""
    ours = {stored: name for name, stored in _STORED_AS.items()}
    return {ours.get(name, name): value for name, value in options.items()}
