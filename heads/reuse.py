"""Why a run that was finished before is not read but done again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from featurestore import FeatureStore
from featurestore.errors import FeatureStoreError
from featurestore.keys import KEY
from featurestore.photos.csv_files import read_csv
from featurestore.text import listing
from heads.run_files import read_json, read_result
from heads.runs import Run
from heads.tasks import Task, photographs_file, photographs_of

_SAME = ("layer", "head", "options", "settings", "sources")  # what makes a run the same to a person


def why_not_reused(folder: Path, store: FeatureStore, parts: list[tuple[Task, list[Run]]]) -> Iterator[str]:
    """A sentence for each task some of whose runs have been finished with other photographs, or another file of trials."""
    earlier = [config for path in sorted(folder.glob("*/config.json")) if (config := _finished(path.parent))]
    for task, runs in parts:
        new = [run.config(task) for run in runs if read_result(folder / run.name(task)) is None]
        reasons = (_reason(was, config, task, folder, store) for config in new for was in earlier)
        yield from dict.fromkeys(reason for reason in reasons if reason)


def _finished(folder: Path) -> Any:
    try:
        return read_json(folder / "config.json") if read_result(folder) else None
    except (OSError, ValueError):
        return None


def _reason(was: dict[str, Any], now: dict[str, Any], task: Task, folder: Path, store: FeatureStore) -> str:
    if any(was.get(name) != now[name] for name in _SAME):
        return ""
    if was.get("trials") == now["trials"] and was.get("split") == now["split"]:
        if was.get("photographs") == now["photographs"]:
            return f"runs of an earlier version of this program (their version is {was.get('version')}) are done again"
        changed = _changed(photographs_file(folder, str(was.get("photographs"))), store, task)
        return f"photographs have changed since earlier runs, which are done again: {changed}"
    about = task.description()
    same_request = all(was.get(name) == about.get(name) for name in ("trials_file", "where", "sessions", "views"))
    if same_request and was.get("trials") != now["trials"] and was.get("trials_sha256") != about.get("trials_sha256"):
        return f"{about['trials_file']} has changed since earlier runs, which are done again"
    return ""


def _changed(earlier: Path, store: FeatureStore, task: Task) -> str:
    """Which photographs are others than those of ``earlier``."""
    names = ["source", *KEY]
    try:
        was = read_csv(earlier, dtype=str, keep_default_na=False).set_index(names)["image_sha256"]
    except (FeatureStoreError, OSError, KeyError):
        return "which ones was not recorded"
    now = photographs_of(store, task.sources, task.items).set_index(names)["image_sha256"]
    both = pd.concat([was, now], axis=1, keys=["was", "now"])
    return listing(("/".join(key[1:]) for key in both.index[both["was"] != both["now"]]), 5)
