"""Tables of finished runs: each run beside those it may be compared with, and each layer × head over its seeds and folds.

Runs are compared within a *group*: the same trials, the same photographs, tested on the same part.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.text import listing
from heads.run_files import read_predictions, read_result, require_file, write_csv
from heads.scores import ANSWERS, CEILING_COLUMNS, FACES_SHOWN_COLUMNS, difference, paired_test, score
from heads.trials.same_person import SAME_PERSON

_FRONT = (
    "group",
    "validation_rank",
    "name",
    "layer",
    "head",
    "finetune_from",
    "lr",
    "seed",
    "fold",
    "validation_loss",
    "validation_accuracy",
    "train_accuracy",
    "accuracy",
    "low",
    "high",
    "cluster_low",
    "cluster_high",
    "clusters",
    "n_test",
    "chance",
    *FACES_SHOWN_COLUMNS,
    *CEILING_COLUMNS,
    "p_zero_shot",
    "p_zero_shot_cluster",
    "weights",
    "trials_file",
    "where",
    "sessions",
    "views",
    "held_out",
    "n_train",
    "n_validation",
)


@dataclass(frozen=True)
class FinishedRun:
    """A run's results by name, its ``settings`` among them, and whether each of its test trials was answered right.

    ``correct`` is bool (n,), ``table`` what the trials showed.
    """

    row: dict[str, Any]
    settings: dict[str, Any]
    correct: np.ndarray
    table: pd.DataFrame

    @property
    def group(self) -> tuple[str, str, str]:
        """What runs must share to be compared: trials, photographs, and the split or set of folds."""
        return self.row["trials"], self.row["photographs"], self.row["test"]

    @property
    def without_seed(self) -> dict[str, Any]:
        """Layer, head, sources, options and settings: what runs share that differ in seed and fold alone."""
        return {name: value for name, value in self.settings.items() if name != "seed"}


@dataclass(frozen=True)
class Answers:
    """What one layer and head answered to the trials of a group: a mean over seeds, of folds one after the other.

    ``values`` (n,) are shares of seeds that were right, 0 … 1 (bool with one seed), ``table`` the trials, ``runs`` who answered,
    ``splits`` the hashes of what was tested, fold by fold.
    """

    runs: tuple[FinishedRun, ...]
    values: np.ndarray
    table: pd.DataFrame
    by_seed: tuple[float, ...]
    splits: tuple[str, ...]

    @property
    def group(self) -> tuple[str, str, str]:
        """What they share with others that may be compared."""
        return self.runs[0].group

    @property
    def row(self) -> dict[str, Any]:
        """Settings that all have."""
        return self.runs[0].row

    @property
    def validation_loss(self) -> float:
        """Mean over seeds and folds; NaN if one has none."""
        return _mean(self.runs, "validation_loss")


_TEXTS = ("split", "split_name", "trials", "photographs")
_COUNTS = ("n_train", "n_validation", "n_left_out", "n_set_aside")
_ABOUT = (
    "test",
    "fold",
    "split_kind",
    "trials_file",
    "trials_sha256",
    "where",
    "sessions",
    "views",
    "held_out",
    *_COUNTS,
    "backbone",
    "weights",
)


def finished_runs(folder: Path) -> list[FinishedRun]:
    """All finished runs under ``folder``. What a test showed is kept in memory once for all its runs."""
    runs: list[FinishedRun] = []
    shown: dict[tuple[str, ...], pd.DataFrame] = {}
    newest = sorted(folder.glob("*/predictions.csv"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in newest:  # participants may have been corrected since an older one
        result = read_result(path.parent)
        if result is None or result["name"] != path.parent.name:  # unfinished, damaged, or a copy
            continue
        try:
            config = json.loads((path.parent / "config.json").read_text("utf-8"))
            settings = {"layer": config["layer"], "head": config["head"], "sources": " ".join(config["sources"])}
            settings |= {"dtype": config.get("dtype", "float32"), **config["settings"], **config["options"]}
            about = {name: config[name] for name in _TEXTS} | {name: config.get(name, "") for name in _ABOUT}
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not a run of ours, or one that is being written
        if not _is_plain(about, result):
            continue
        test = (config["trials"], config["split"], config["photographs"])
        answered = read_predictions(path.parent, ["correct"] if test in shown else None)
        if answered is None:
            continue
        table = shown.setdefault(test, answered.drop(columns=list(ANSWERS), errors="ignore"))
        correct = answered["correct"].to_numpy(bool)
        about["test"] = about["test"] or about["split_name"]  # before there were folds
        row = {**_with_losses(result, path.parent), **about, **settings}
        row.pop("normalised", None)  # of version 0.1: over the ceiling of other trials
        row |= score(table, correct, result["chance"], about["trials_file"] == SAME_PERSON)
        runs.append(FinishedRun(row, settings, correct, table))
    return runs


def _is_plain(about: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether what runs are put in groups and in order by is text and numbers, as it was written."""
    texts = all(isinstance(about[name], str) for name in (*_TEXTS, "test"))
    return (
        texts
        and isinstance(about["fold"], str | int | None)
        and isinstance(result.get("validation_loss"), float | int | None)
    )


def _with_losses(result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Version 0.1 kept the validation loss in the metrics alone."""
    if "validation_loss" in result or not result.get("best_epoch"):
        return result
    try:
        require_file(folder / "metrics.csv")
        metrics = pd.read_csv(folder / "metrics.csv").set_index("epoch")
        return {**result, "validation_loss": float(metrics.loc[result["best_epoch"], "validation_loss"])}
    except (OSError, ValueError, KeyError, TypeError):
        return result


def _mean(runs: Sequence[FinishedRun], name: str) -> float:
    """Of a result of several runs; NaN where one has none."""
    values = [run.row.get(name) for run in runs]
    return float(np.mean([np.nan if value is None or value == "" else float(value) for value in values]))


def runs_table(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """A row per run, in groups, those with the most test trials first; within a group the lowest validation loss.

    A test chooses nothing: choose by validation loss, then read the accuracy. Of folds, each is ranked by itself.
    ``p_zero_shot`` is McNemar's exact test against the untrained layer, ``p_zero_shot_cluster`` one over faces (participants).
    """
    if not runs:
        return pd.DataFrame()
    numbers = _group_numbers(runs)
    untrained = [run for run in runs if run.row["head"] == "zero-shot"]
    rows = []
    for run in runs:
        row = {"group": numbers[run.group], **run.row}
        other = _baseline(run, [each for each in untrained if each.row["split"] == run.row["split"]])
        if other is not None and other is not run:
            row["p_zero_shot"] = paired_test(run.correct, other.correct).p
            row["p_zero_shot_cluster"] = difference(run.table, run.correct, other.correct).p
        rows.append(row)
    table = pd.DataFrame(rows)
    table["validation_loss"] = table.get("validation_loss", pd.Series(np.nan, table.index)).astype(float)
    table["validation_rank"] = table.groupby(["group", "split"])["validation_loss"].rank(method="first").astype("Int64")
    table = table.reindex(columns=[*_FRONT, *(name for name in table if name not in _FRONT)])
    return table.sort_values(["group", "fold", "validation_rank", "name"], ignore_index=True, na_position="last")


_Compared = TypeVar("_Compared", FinishedRun, "Answers")


def _baseline(one: _Compared, untrained: Sequence[_Compared]) -> _Compared | None:
    """The zero-shot run that belongs to ``one``: of its measure, or the only one of its layer."""
    same = [
        other
        for other in untrained
        if other.group == one.group and all(other.row[name] == one.row[name] for name in ("layer", "sources", "dtype"))
    ]
    own = [other for other in same if other.row.get("measure") == one.row.get("measure")]
    return own[0] if own else same[0] if len(same) == 1 else None


def _group_numbers(runs: Sequence[FinishedRun]) -> dict[tuple[str, str, str], int]:
    """1 for the group with the most test trials."""
    size: dict[tuple[str, str, str], dict[str, int]] = {}
    for run in runs:
        size.setdefault(run.group, {})[run.row["split"]] = len(run.correct)
    order = sorted(size, key=lambda group: (-sum(size[group].values()), group[2], group))
    return {group: number for number, group in enumerate(order, start=1)}


def answers(runs: Sequence[FinishedRun], pool: bool = True) -> Iterator[Answers]:
    """Runs that differ in seed and fold alone, brought together. A seed of which a fold is missing is left out.

    ``pool=False``: folds stay apart, as tests of their own.
    """
    together: dict[tuple[Any, ...], list[FinishedRun]] = {}
    for run in runs:
        apart = "" if pool else run.row["split"]
        together.setdefault((run.group, apart, str(run.without_seed)), []).append(run)
    for same in together.values():
        folds = {run.row["split"]: run for run in sorted(same, key=lambda run: str(run.row["fold"]))}
        wanted = int(str(same[0].row["fold"]).rpartition(" ")[2]) if pool and same[0].row["fold"] else 1
        seeds: dict[Any, dict[str, FinishedRun]] = {}
        for run in same:
            seeds.setdefault(run.row.get("seed"), {})[run.row["split"]] = run
        whole = {seed: of for seed, of in seeds.items() if len(of) == wanted}
        if not whole:
            continue
        right = np.stack([np.concatenate([of[split].correct for split in folds]) for of in whole.values()])
        table = pd.concat([run.table for run in folds.values()], ignore_index=True)
        values = right[0] if len(right) == 1 else right.mean(axis=0)
        used = tuple(run for of in whole.values() for run in of.values())
        yield Answers(used, values, table, tuple(right.mean(axis=1)), tuple(folds))


def summary_table(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """A row per layer × head (and other settings) of each group, the lowest mean validation loss first.

    ``accuracy`` is the mean over ``n_seeds`` seeds and ``sd`` their standard deviation; of folds, all answers are pooled.
    The interval is over faces (and participants); ``over_zero_shot`` the difference to the untrained layer, with its own.
    """
    numbers = _group_numbers(runs)
    found = list(answers(runs))
    untrained = [each for each in found if each.row["head"] == "zero-shot"]
    rows = []
    for each in found:
        run = each.runs[0]
        scores = score(each.table, each.values, run.row["chance"], run.row["trials_file"] == SAME_PERSON)
        row = {
            "group": numbers[run.group],
            **run.without_seed,
            "n_seeds": len(each.by_seed),
            "n_folds": len(each.splits),
            "validation_loss": each.validation_loss,
            "train_accuracy": _mean(each.runs, "train_accuracy"),
            **scores,
            "accuracy": float(np.mean(each.by_seed)),
            "sd": float(np.std(each.by_seed, ddof=1)) if len(each.by_seed) > 1 else np.nan,
            **{name: run.row[name] for name in _ABOUT if name != "fold" and name not in _COUNTS},
            **{name: _mean(each.runs, name) for name in _COUNTS},
            "runs": " ".join(run.row["name"] for run in each.runs),
        }
        other = _baseline(each, untrained)
        if other is not None and other is not each and other.splits == each.splits:
            gain = difference(each.table, each.values, other.values)
            row |= {"over_zero_shot": gain.value, "over_low": gain.low, "over_high": gain.high, "p_zero_shot": gain.p}
        rows.append(row)
    table = pd.DataFrame(rows)
    if table.empty:
        return table
    first = [
        "group",
        "layer",
        "head",
        "lr",
        "n_seeds",
        "n_folds",
        "validation_loss",
        "train_accuracy",
        "accuracy",
        "sd",
    ]
    table = table.reindex(columns=[*first, *(name for name in table if name not in first)])
    return table.sort_values(["group", "validation_loss", "layer", "head"], ignore_index=True, na_position="last")


def write_runs_table(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make ``runs.csv`` and ``summary.csv`` from the folders; returns both."""
    runs = finished_runs(folder)
    tables = runs_table(runs), summary_table(runs)
    write_csv(folder / "runs.csv", tables[0])
    write_csv(folder / "summary.csv", tables[1])
    return tables


def best_run(folder: Path | str, **columns: Any) -> "pd.Series[Any]":
    """The run with the lowest validation loss among those of ``folder`` whose columns have the values given.

    For example ``best_run("store/runs", head="conv", layer="fc7-relu")``. FeatureStoreError if there is none, or if they are
    of several groups or folds: their losses are of other trials and cannot be compared.
    """
    table = runs_table(finished_runs(Path(folder)))
    if table.empty:
        raise FeatureStoreError(f"there are no finished runs in {folder}.")
    unknown = [name for name in columns if name not in table.columns]
    if unknown:
        raise FeatureStoreError(
            f"the table of runs in {folder} has no column {listing(unknown)}, but {listing(table, 40)}."
        )
    for name, value in columns.items():
        table = table[table[name] == value]
    asked = ", ".join(f"{name}={value!r}" for name, value in columns.items()) or "anything"
    if table.empty:
        raise FeatureStoreError(f"no finished run in {folder} has {asked}.")
    tests = table.drop_duplicates(["group", "split"])
    if len(tests) > 1:
        told = (
            f"group={row.group}{f', fold={row.fold!r}' if row.fold else ''}: {row.test}" for row in tests.itertuples()
        )
        raise FeatureStoreError(
            f"runs with {asked} in {folder} are of {len(tests)} tests, whose losses cannot be compared. Say which: "
            f"{listing(told, 5)}."
        )
    if table["validation_loss"].isna().all() and len(table) > 1:
        raise FeatureStoreError(f"the {len(table)} runs with {asked} in {folder} have no validation loss to choose by.")
    return table.sort_values("validation_loss", na_position="last").iloc[0]
