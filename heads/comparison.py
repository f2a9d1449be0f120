"""Paired comparisons of finished runs, layers and heads on the same trials."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.text import listing, near_matches
from heads.runs_table import Answers, FinishedRun, answers, finished_runs
from heads.scores import cluster_text, difference, paired_test


def compare(folder: Path, names: Sequence[str]) -> pd.DataFrame:
    """A row for each pair of ``names``: the difference in accuracy on the same trials, with interval and p.

    A name is a run's (or the beginning of one), ``LAYER:HEAD``, ``LAYER:HEAD:START`` for one fine-tuned from layer ``START`` (or
    ``input``), or a layer, which is compared head by head; without START the frozen network is meant. Of a layer and head that
    was trained with several settings, those with the lowest validation loss are taken; seeds are averaged and
    folds pooled, but beside a run of one fold only this fold counts. ``p`` is of a t-test over faces (and participants),
    ``p_holm`` corrected for the rows of the same test (Holm 1979), ``p_mcnemar`` McNemar's exact test, which takes trials for
    independent (with one seed). FeatureStoreError for names that are not there, for pairs that were tested on different
    trials, and for runs that are compared with themselves.
    """
    names = list(dict.fromkeys(names))
    if len(names) < 2:
        raise FeatureStoreError("a comparison needs two names or more: runs, layers, or LAYER:HEAD.")
    runs = finished_runs(folder)
    if not runs:
        raise FeatureStoreError(f"there are no finished runs in {folder}.")
    single = {name: run for name in names if (run := _run_called(runs, name))}
    tests = {run.row["split"] for run in single.values()}
    if len(tests) > 1:
        raise _different({name: [run.row["split_name"]] for name, run in single.items()})
    if tests:
        runs = [run for run in runs if run.row["split"] in tests]
    found = list(answers(runs, pool=not tests))
    chosen = {name: [_alone(single[name])] if name in single else _best(found, runs, name, folder) for name in names}
    rows = [row for one, other in combinations(names, 2) for row in _pair(one, chosen[one], other, chosen[other])]
    table = pd.DataFrame(rows)
    return table.assign(p_holm=table.groupby("test")["p"].transform(lambda p: holm(p.to_numpy(float))))


def _run_called(runs: Sequence[FinishedRun], name: str) -> FinishedRun | None:
    """The run of that name, or the only one whose name begins so."""
    named = [run for run in runs if run.row["name"] == name]
    layers = {run.row["layer"] for run in runs}
    if not named and name not in layers:
        named = [run for run in runs if run.row["name"].startswith(name)]
    return named[0] if len(named) == 1 else None


def _alone(run: FinishedRun) -> Answers:
    return Answers((run,), run.correct, run.table, (float(run.correct.mean()),), (run.row["split"],))


def _best(found: Sequence[Answers], runs: Sequence[FinishedRun], name: str, folder: Path) -> list[Answers]:
    """The best settings of each head on a layer, in each group."""
    layer, head, start = (*name.split(":"), "", "")[:3]
    own = [
        each
        for each in found
        if each.row["layer"] == layer
        and head in ("", each.row["head"])
        and (each.row.get("finetune_from") or "") == start
    ]
    if not own:
        begin = [run.row["name"] for run in runs if run.row["name"].startswith(name)]
        known = sorted({run.row["layer"] for run in runs} | {f"{run.row['layer']}:{run.row['head']}" for run in runs})
        what = f"{len(begin)} runs in {folder} begin" if begin else f"no run in {folder} begins"
        hint = (
            f"Say which: {listing(begin)}." if begin else near_matches(name, [*known, *(r.row["name"] for r in runs)])
        )
        raise FeatureStoreError(
            f"{what} with {name!r}, and no layer or LAYER:HEAD that was tested is called so. {hint}"
        )
    best: dict[tuple[object, ...], Answers] = {}
    for each in sorted(own, key=lambda each: (np.isnan(each.validation_loss), each.validation_loss)):
        best.setdefault((each.splits, each.row["head"], each.row["sources"]), each)
    return list(best.values())


def _pair(one: str, first: list[Answers], other: str, second: list[Answers]) -> list[dict[str, object]]:
    by_head = ":" not in one and ":" not in other and len(first) > 1 and len(second) > 1
    same_test = [(a, b) for a in first for b in second if a.group == b.group and a.splits == b.splits]
    if not same_test:
        raise _different({one: [each.row["test"] for each in first], other: [each.row["test"] for each in second]})
    pairs = [
        (a, b)
        for a, b in same_test
        if not set(_names(a)) & set(_names(b)) and not (by_head and a.row["head"] != b.row["head"])
    ]
    if not pairs:
        raise FeatureStoreError(f"{one} and {other} are the same runs, or have runs in common.")
    several = len({each.row["sources"] for pair in pairs for each in pair}) > 1
    return [_row(_title(one, a, several), a, _title(other, b, several), b) for a, b in pairs]


def _names(each: Answers) -> list[str]:
    return [run.row["name"] for run in each.runs]


def _different(tests: dict[str, list[str]]) -> FeatureStoreError:
    told = "; ".join(f"{name} on {listing(dict.fromkeys(of), 3)}" for name, of in tests.items())
    return FeatureStoreError(
        f"{' and '.join(tests)} were not tested on the same trials: {told}. Train them with the same trials, photographs, "
        "`split`, `split_seed` and `folds`."
    )


def _title(name: str, each: Answers, with_source: bool) -> str:
    title = f"{name}:{each.row['head']}" if name == each.row["layer"] else name
    return f"{title} of {each.row['sources']}" if with_source else title


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
        "clusters": cluster_text(a.table),
        "seeds": f"{len(a.by_seed)}, {len(b.by_seed)}",
        "test": a.row["test"],
    }


def holm(p: np.ndarray) -> np.ndarray:
    """p corrected for as many tests as there are numbers among them (Holm 1979)."""
    order = np.argsort(p)
    known = order[~np.isnan(p[order])]
    stepped = np.maximum.accumulate(p[known] * (len(known) - np.arange(len(known))))
    corrected = np.full(len(p), np.nan)
    corrected[known] = np.minimum(stepped, 1.0)
    return corrected
