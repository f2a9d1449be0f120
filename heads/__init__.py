"""Heads on cached rows: odd-one-out and multi-view identity. They know tensors and keys; the backbone never runs."""

from importlib import import_module
from typing import Any

_WHERE = {
    "build_head": "registry",
    "draw_head": "registry",
    "load_head": "checkpoints",
    "export": "published",
    "layer_table": "describe",
    "summary": "describe",
    "draw": "describe",
    "load_trials": "trials.matching",
    "best_run": "runs_table",
    "compare": "comparison",
    "zero_shot_choices": "zero_shot",
    "Features": "features",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    """Load torch and pandas only for those who use them: commands print their help without."""
    if name in _WHERE:
        return getattr(import_module(f"heads.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
