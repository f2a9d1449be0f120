"""Explaining a run: maps of every trial, kept as they are made; then checks, regions and tables of them."""

import uuid
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from featurestore.cluster import Calls, whole_worker
from featurestore.devices import reproducible
from featurestore.errors import FeatureStoreError
from featurestore.intervals import clustered_mean
from heads.comparison import holm
from heads.explain.archive import CHOICES, CURVE, Archive, coordinates
from heads.explain.blocks import block_sums
from heads.explain.checks import (
    CHANGES,
    EDGES,
    FRACTIONS,
    HIDDEN,
    KINDS,
    RANDOM,
    baseline_orders,
    curves,
    similarity_to_shuffled,
)
from heads.explain.job import TEST, ExplainPlan, ExplainRequest, plan_explanation
from heads.explain.methods import Trial
from heads.scores import clusters_of, paired_test

MAPS = "maps.zarr"
_TOLERATED = 0.01  # of what is explained, that the sum of relevance may be off
_SHUFFLED = 3  # trials that are explained again with shuffled weights
_LOGITS, _BASELINE = "logits", "baseline_logits"


def explain(
    plan: ExplainPlan, out: Path, progress: Callable[[int], object] = lambda n: None, calls: Calls | None = None
) -> Archive:
    """Compute what ``out``/maps.zarr lacks of a plan, and return it; every map that is there already is left as it is.

    Live activations are first compared with the cached rows of all items, unless ``plan.check`` did so. ``progress`` is told
    how many trials were explained. ``calls`` explains them as tasks of a cluster.
    """
    plan.check()
    n, square = len(plan), plan.any_legs.shape[:3]
    archive = Archive.make(out / MAPS, coordinates(plan.table, plan.keys, plan.answers), plan.attributes)
    classes = plan.trial(0).logits().shape
    for name in (_LOGITS, _BASELINE):
        archive.add(name, (n, *classes), ("trial", "class"))
    for method in plan.methods:
        archive.add_method(method.name, n, square)
    orders = [*(method.name for method in plan.methods), RANDOM, EDGES] if plan.request.checks else []
    for order in orders:
        archive.add_curve(order, n)
    wanted = [_LOGITS, _BASELINE, *(method.name for method in plan.methods), *(CURVE + order for order in orders)]
    missing = {i: [name for name in wanted if not archive.done(name, i)] for i in range(n)}
    begun = {i: lacking for i, lacking in missing.items() if lacking}
    progress(n - len(begun))
    if calls:
        shared = _portable(plan), uuid.uuid4().hex, out.absolute()
        for _ in calls(_explain_on_worker, ((*shared, *each) for each in begun.items())):
            progress(1)
    else:
        with reproducible():
            for each in begun.items():
                _explain_trial(plan, archive, *each)
                progress(1)
    logits = archive.read(_LOGITS)
    archive.add("chosen", (n,), ("trial",), "int64")
    archive.add("probability", logits.shape, ("trial", "class"))
    for i, row in enumerate(logits):
        if not archive.done("probability", i):
            archive.write("chosen", i, np.asarray(row.argmax(), np.int64))
            archive.write("probability", i, np.exp(row - row.max()) / np.exp(row - row.max()).sum())
    return archive


def _portable(plan: ExplainPlan) -> ExplainRequest:
    """The request with absolute paths, so that a worker makes the same plan of it."""
    request = plan.request

    def absolute(given: str | None) -> str | None:
        path = Path(given).expanduser() if given else None
        return str(path.absolute()) if path and path.exists() else given

    return replace(
        request,
        run=request.run.absolute(),
        store=plan.store,
        trials=request.trials if request.trials == TEST else absolute(request.trials) or "",
        weights=absolute(request.weights),
        methods=tuple(request.methods),
        where=tuple(request.where),
    )


@lru_cache(maxsize=1)
def _planned(request: ExplainRequest, explanation: str) -> ExplainPlan:
    """A worker's, kept from one task of an ``explanation`` to the next."""
    return plan_explanation(request)


def _explain_on_worker(request: ExplainRequest, explanation: str, out: Path, i: int, missing: list[str]) -> None:
    with whole_worker(), reproducible():
        _explain_trial(_planned(request, explanation), Archive(out / MAPS), i, missing)


def _explain_trial(plan: ExplainPlan, archive: Archive, i: int, missing: list[str]) -> None:
    """A trial's photographs are read once, whatever is missing."""
    trial = plan.trial(i)
    logits = trial.logits()
    if not bool(torch.isfinite(logits).all()):
        raise FeatureStoreError(
            f"the head's logits of trial {plan.table.index[i]} are not finite numbers: {logits.tolist()}."
        )
    choices = [int(logits.argmax()), int(plan.answers[i])]
    asked = choices[: 2 if plan.request.persons and choices[0] != choices[1] >= 0 else 1]
    if _LOGITS in missing:
        archive.write(_LOGITS, i, logits.cpu().numpy())
    if _BASELINE in missing:
        with torch.no_grad():
            baseline = trial.legs.run(torch.zeros_like(trial.inputs())).logits[0]
        archive.write(_BASELINE, i, baseline.cpu().numpy())
    for method in plan.methods:
        if method.name in missing:
            maps = np.full((len(CHOICES), *trial.legs.shape[:3]), np.nan, np.float32)
            for place, choice in enumerate(asked):
                maps[place] = method.function(plan.trial(i, choice, trial.pixels)).cpu().numpy()
                if not np.isfinite(maps[place]).all():
                    raise FeatureStoreError(
                        f"{method.name} gives numbers that are not finite for trial {plan.table.index[i]}. Leave the method out."
                    )
            archive.write(method.name, i, maps)
    lacking = [name.removeprefix(CURVE) for name in missing if name.startswith(CURVE)]
    if lacking:
        orders = baseline_orders(trial, plan.table.index[i])
        orders |= {method.name: block_sums(archive.read(method.name, i)[0]) for method in plan.methods}
        chosen = Trial(trial.legs, trial.pixels, choices[0], "margin")
        for order, found in curves(chosen, {order: orders[order] for order in lacking}).items():
            archive.write(CURVE + order, i, found)


def completeness(plan: ExplainPlan, archive: Archive) -> pd.DataFrame:
    """How far the sum of relevance is off what it should be, as a share of that, for methods that promise it.

    Rows: method, n, ``off`` (median), ``within`` (share of trials that are off by 1 % at most).
    """
    logits, baseline = archive.read(_LOGITS).astype(np.float64), archive.read(_BASELINE).astype(np.float64)
    rows = []
    for method in plan.methods:
        if not method.conserves:
            continue
        off = []
        for i, (own, without) in enumerate(zip(logits, baseline, strict=True)):
            trial = plan.trial(i, int(own.argmax()), torch.empty(0))
            value = float(trial.value(torch.from_numpy(own)[None]))
            if method.conserves == "change":
                value -= float(trial.value(torch.from_numpy(without)[None]))
            off.append(
                abs(float(archive.read(method.name, i)[0].sum(dtype=np.float64)) - value) / max(abs(value), 1e-12)
            )
        within = float(np.mean(np.array(off) <= _TOLERATED))
        rows.append({"method": method.name, "n": len(off), "off": float(np.median(off)), "within": within})
    return pd.DataFrame(rows, columns=["method", "n", "off", "within"])


def curve_table(plan: ExplainPlan, archive: Archive) -> pd.DataFrame:
    """Deletion and insertion: a row for each order, kind and fraction, with the mean margin and its interval over faces."""
    clusters = _clusters(plan)
    rows = []
    for order in _orders(plan):
        values = archive.read(CURVE + order).astype(np.float64)
        for k, kind in enumerate(KINDS):
            for f, fraction in enumerate(FRACTIONS):
                mean = clustered_mean(values[:, k, f], clusters)
                row = {"method": order, "kind": kind, "fraction": fraction, "value": mean.value}
                rows.append({**row, "low": mean.low, "high": mean.high, "n": len(values)})
    return pd.DataFrame(rows)


def curve_tests(plan: ExplainPlan, archive: Archive) -> pd.DataFrame:
    """Each method's curves against random and against edges: paired over trials, over faces, Holm-corrected.

    Rows: method, kind, against, ``difference`` (of the area under the curve over the fractions, divided by their range: of the
    mean margin; negative deletion and positive insertion speak for the method), low, high, p, p_corrected, and for deletion
    ``flips`` and ``flips_against``: choices that change with a tenth hidden, with McNemar's ``p_flips``.
    """
    clusters = _clusters(plan)
    values = {order: archive.read(CURVE + order).astype(np.float64) for order in _orders(plan)}
    tenth = FRACTIONS.index(HIDDEN)
    rows = []
    for method in plan.methods:
        for against in (RANDOM, EDGES):
            for k, kind in enumerate(KINDS):
                own, other = (_area(values[name][:, k]) for name in (method.name, against))
                mean = clustered_mean(own - other, clusters)
                row = {"method": method.name, "kind": kind, "against": against, "difference": mean.value}
                row |= {"low": mean.low, "high": mean.high, "p": mean.p, "n": len(own)}
                if kind == KINDS[0]:
                    flips = [values[name][:, 0, tenth] < 0 for name in (method.name, against)]
                    row |= {"flips": int(flips[0].sum()), "flips_against": int(flips[1].sum())}
                    row["p_flips"] = paired_test(*flips).p
                rows.append(row)
    table = pd.DataFrame(rows)
    table["p_corrected"] = holm(table["p"].to_numpy(float))
    return table


def shuffled_table(plan: ExplainPlan, progress: Callable[[], object] = lambda: None) -> pd.DataFrame:
    """See ``similarity_to_shuffled``; of a few trials of one source.

    ``explains`` is False for a method that hardly changes when the network's layers are shuffled, on the average of the stages.
    """
    own = [i for i, source in enumerate(plan.sources) if source == plan.sources[0]][:_SHUFFLED]
    trials = []
    for i in own:
        trial = plan.trial(i)
        trials.append(plan.trial(i, int(trial.logits().argmax()), trial.pixels))
    with reproducible():
        table = similarity_to_shuffled(trials, plan.methods, progress=progress)
    mean = table[table["share"] > 0].groupby("method")["correlation"].mean()
    return table.assign(explains=table["method"].map(mean < CHANGES))


def _area(values: np.ndarray) -> np.ndarray:
    """Mean height (n,) of curves (n, FRACTIONS)."""
    return np.asarray(np.trapezoid(values, FRACTIONS, axis=1)) / FRACTIONS[-1]


def _orders(plan: ExplainPlan) -> list[str]:
    return [*(method.name for method in plan.methods), RANDOM, EDGES]


def _clusters(plan: ExplainPlan) -> list[np.ndarray]:
    return list(clusters_of(plan.table).values())
