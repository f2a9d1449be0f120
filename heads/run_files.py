"""The files of a run's folder: results and tables, each whole or not at all, and TensorBoard's events."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.files import write_atomically
from featurestore.keys import KEY
from heads.train import Epoch
from heads.trials.tables import FACES, ODD, VIEWS

_SHOWN = {*FACES, *VIEWS, ODD}, {*KEY}  # of trials, and of photographs that were named
_TEXT = dict.fromkeys([*FACES, *VIEWS, ODD, *KEY, "predicted", "participant", "session"], str)


def read_json(path: Path) -> Any:
    """What a document of a run holds; OSError or ValueError where it is no file or no JSON."""
    require_file(path)
    try:
        document = json.loads(path.read_text("utf-8"))
        json.dumps(document, ensure_ascii=False).encode("utf-8")  # half a pair of surrogates is no text
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deep") from error
    return document


def require_file(path: Path) -> None:
    """OSError for anything but a file: a pipe or a device would be read for ever."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")


def read_result(folder: Path) -> dict[str, Any] | None:
    """A finished run's result; None for a run that is unfinished or whose files are damaged, which is trained again."""
    try:
        result = read_json(folder / "result.json")
        if result["state"] != "finished" or not isinstance(read_json(folder / "config.json"), dict):
            return None
        answered = read_predictions(folder, ["correct"])
        whole = answered is not None and len(answered) == result["n_test"] and {"name", "chance"} <= result.keys()
        return result if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_predictions(folder: Path, columns: list[str] | None = None) -> pd.DataFrame | None:
    """A run's ``predictions.csv``, or some columns, faces and views as text; None where it is not there or not one."""
    try:
        path = folder / "predictions.csv"
        require_file(path)
        table = pd.read_csv(path, usecols=columns, dtype=_TEXT, keep_default_na=False)
        names = set(pd.read_csv(path, nrows=0).columns)
        whole = any(shown <= names for shown in _SHOWN) and table["correct"].dtype == bool
        return table if whole else None
    except (OSError, ValueError, KeyError):
        return None


def write_document(path: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Whole or not at all, and as it is read again: NaN becomes null, which JSON has."""
    document = {key: None if isinstance(value, float) and value != value else value for key, value in document.items()}
    _write(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Whole or not at all."""
    _write(path, table.to_csv(index=False))


def _write(path: Path, text: str) -> None:
    """A file that has this content already is left as it is."""
    try:
        if path.exists() and path.read_text("utf-8") == text:
            return
        write_atomically(path, text)
    except OSError as error:
        raise FeatureStoreError(
            f"{path} could not be written: {error}. If the disk is full, free some space and run the same command again: "
            "it resumes from the last checkpoint."
        ) from None


class TrainingCurves:
    """TensorBoard's event file of a run, made at the first epoch: a zero-shot run has none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._to: Any = None

    def __enter__(self) -> "TrainingCurves":
        return self

    def add(self, epoch: Epoch) -> None:
        """Losses, accuracies and speed after an epoch."""
        if self._to is None:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to load

            self._to = SummaryWriter(str(self._folder), purge_step=epoch.epoch)
        for name in ("loss", "accuracy"):
            self._to.add_scalar(f"{name}/train", getattr(epoch, f"train_{name}"), epoch.epoch)
            self._to.add_scalar(f"{name}/validation", getattr(epoch, f"validation_{name}"), epoch.epoch)
        self._to.add_scalar("examples_per_second", epoch.examples_per_second, epoch.epoch)

    def __exit__(self, *_: object) -> None:
        if self._to is not None:
            self._to.close()
