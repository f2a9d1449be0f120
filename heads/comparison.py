"""Paired comparisons of finished runs, layers and heads on the same trials."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.text import listing, near_matches
from heads.runs_table import Answers, FinishedRun, answers, finished_runs
from heads.scores import clusters_of, difference, paired_test


def compare(folder: Path, names: Sequence[str]) -> pd.DataFrame:
    """A row for each pair of ``names``: the difference in accuracy on the same trials, with interval and p.

    A name is a run's (or the beginning of one), ``LAYER:HEAD``, or a layer, which is compared head by head. Of a layer and
    head that was trained with several settings, those with the lowest validation loss are taken; seeds are averaged and
    folds pooled. ``p`` is of a t-test over faces (and participants), ``p_holm`` corrected for all rows (Holm 1979),
    ``p_mcnemar`` McNemar's exact test, which takes trials for independent (with one seed). FeatureStoreError for
    names that are not there and for pairs that were tested on different trials.
    """
    if len(dict.fromkeys(names)) < 2:
        raise FeatureStoreError("a comparison needs two names or more: runs, layers, or LAYER:HEAD.")
    runs = finished_runs(folder)
    chosen = {name: _chosen(runs, name, folder) for name in dict.fromkeys(names)}
    rows = [row for one, other in combinations(chosen, 2) for row in _pair(one, chosen[one], other, chosen[other])]
    table = pd.DataFrame(rows)
    return table.assign(p_holm=_holm(table["p"].to_numpy(float)))


def _chosen(runs: Sequence[FinishedRun], name: str, folder: Path) -> list[Answers]:
    """What a name stands for: one run, or the best settings of each head on a layer, in each group."""
    named = [run for run in runs if run.row["name"] == name] or [
        run for run in runs if run.row["name"].startswith(name) and "-" in name.removeprefix(run.row["layer"])
    ]
    if len(named) == 1:
        run = named[0]
        return [Answers((run,), run.correct, run.table, (float(run.correct.mean()),), 1)]
    layer, _, head = name.rpartition(":") if ":" in name else (name, "", "")
    found = [each for each in answers(runs) if each.row["layer"] == layer and head in ("", each.row["head"])]
    if not found:
        known = sorted({run.row["layer"] for run in runs} | {f"{run.row['layer']}:{run.row['head']}" for run in runs})
        raise FeatureStoreError(
            f"{len(named) or 'no'} runs in {folder} begin with {name!r}, and no layer or LAYER:HEAD is called so. "
            f"{near_matches(name, [*known, *(run.row['name'] for run in runs)])}"
        )
    best: dict[tuple[object, ...], Answers] = {}
    for each in sorted(found, key=lambda each: (np.isnan(each.validation_loss), each.validation_loss)):
        best.setdefault((each.runs[0].group, each.row["head"], each.row["sources"]), each)
    return list(best.values())


def _pair(one: str, first: list[Answers], other: str, second: list[Answers]) -> list[dict[str, object]]:
    by_head = ":" not in one and ":" not in other and len({each.row["head"] for each in (*first, *second)}) > 1
    rows = []
    for a in first:
        for b in second:
            if a.runs[0].group != b.runs[0].group or len(a.values) != len(b.values):
                continue
            if by_head and len(first) > 1 and len(second) > 1 and a.row["head"] != b.row["head"]:
                continue
            rows.append(_row(_title(one, a), a, _title(other, b), b))
    if rows:
        return rows
    tests = [listing(dict.fromkeys(each.row["test"] for each in side), 3) for side in (first, second)]
    raise FeatureStoreError(
        f"{one} and {other} were not tested on the same trials: {one} on {tests[0]}, {other} on {tests[1]}. Train both with the "
        "same trials, photographs, `split` and `split_seed`."
    )


def _title(name: str, each: Answers) -> str:
    return f"{name}:{each.row['head']}" if name == each.row["layer"] else name


def _row(one: str, a: Answers, other: str, b: Answers) -> dict[str, object]:
    found = difference(a.table, a.values, b.values)
    single = a.values.dtype == bool and b.values.dtype == bool
    return {
        "first": one,
        "second": other,
        "accuracy_first": float(a.values.mean()),
        "accuracy_second": float(b.values.mean()),
        "difference": found.value,
        "low": found.low,
        "high": found.high,
        "p": found.p,
        "p_mcnemar": paired_test(a.values, b.values).p if single else np.nan,
        "n_test": len(a.values),
        "clusters": ", ".join(
            f"{pd.unique(labels.ravel()).size} {kind}" for kind, labels in clusters_of(a.table).items()
        ),
        "seeds": f"{len(a.by_seed)}, {len(b.by_seed)}",
        "test": a.row["test"],
    }


def _holm(p: np.ndarray) -> np.ndarray:
    """p corrected for as many tests as there are numbers among them (Holm 1979)."""
    order = np.argsort(p)
    known = order[~np.isnan(p[order])]
    stepped = np.maximum.accumulate(p[known] * (len(known) - np.arange(len(known))))
    corrected = np.full(len(p), np.nan)
    corrected[known] = np.minimum(stepped, 1.0)
    return corrected
