"""Heads on cached rows: odd-one-out and multi-view identity. The backbone runs only to be fine-tuned."""

from featurestore.discovery import exported

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
__getattr__ = exported(__name__, _WHERE)
