"""What is to be explained: a finished run, some of its test trials, methods; all checked before anything is computed."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch

from featurestore import FeatureStore
from featurestore.conditions import rows_that_meet
from featurestore.devices import choose_device
from featurestore.errors import FeatureStoreError
from featurestore.text import human_bytes, near_matches, with_urls
from featurestore.versions import library_versions
from heads.checkpoints import load_head
from heads.explain.checks import FRACTIONS, KINDS
from heads.explain.methods import METHODS, STEPS, Explained, Method, Trial, find_methods
from heads.legs import Legs
from heads.run_files import read_predictions, read_result
from heads.trials.matching import load_trials
from heads.trials.tables import FACES, ODD_POSITION, VIEWS

TEST = "test"  # ``trials``: those that the run was tested on
_ORDERS = 2  # beside the methods': random, edges
_FORWARD = 0.4  # of a pass forward and backward


@dataclass(frozen=True)
class ExplainRequest:
    """What the user asked for; see the options of pipelines/explain_heads.py. ``run`` is a run's folder."""

    run: Path
    methods: Sequence[str] = ("grad-cam", "lrp")
    trials: str = TEST
    on_error: Literal["stop", "skip"] = "stop"
    n: int | None = 50
    seed: int = 0
    where: Sequence[str] = ()
    explained: Explained = "margin"
    persons: bool = True
    checks: bool = True
    maps: str | None = None
    steps: int = STEPS
    store: Path | None = None
    weights: str | None = None
    backbone: str | None = None
    device: str = "auto"


@dataclass(frozen=True)
class ExplainPlan:
    """What will be explained. ``table`` has a row per trial, ``keys`` its items, ``answers`` (n,) int64 what was answered."""

    request: ExplainRequest
    store: Path
    config: dict[str, Any]
    legs: dict[str, Legs]
    methods: list[Method]
    table: pd.DataFrame
    sources: list[str]
    keys: list[list[tuple[str, str]]]
    answers: np.ndarray
    _checked: set[str] = field(default_factory=set, repr=False)  # sources

    def __len__(self) -> int:
        return len(self.table)

    @property
    def any_legs(self) -> Legs:
        """Those of one source; all have the same shapes."""
        return next(iter(self.legs.values()))

    def items(self, trial: int) -> np.ndarray:
        """Row numbers of a trial's items in its source."""
        return self.legs[self.sources[trial]].source.find(self.keys[trial])

    def trial(self, trial: int, choice: int = 0, pixels: torch.Tensor | None = None) -> Trial:
        """What the methods take."""
        legs, request = self.legs[self.sources[trial]], self.request
        pixels = legs.pixels(self.items(trial)) if pixels is None else pixels
        return Trial(legs, pixels, choice, request.explained, request.steps)

    @property
    def attributes(self) -> dict[str, Any]:
        """What the maps are of, as JSON types: with others they are others."""
        legs, about = self.any_legs, self.config
        return {
            "run": self.request.run.name,
            "store": with_urls(str(self.store)),
            "layer": about["layer"],
            "head": about["head"],
            "sources": list(self.legs),
            "weights": ", ".join(dict.fromkeys(each.source.weights for each in self.legs.values())),
            "recipe": legs.recipe.as_dict(),
            "explained": self.request.explained,
            "maps_layer": legs.maps or "",
            "steps": self.request.steps,
            "persons": self.request.persons,
            "classes": list(getattr(legs.head, "faces", [])),
            "trials": self.request.trials,
            "library_versions": library_versions(),
        }

    def check(self, progress: Callable[[int], object] = lambda n: None) -> None:
        """Compare live activations with the cached rows of all items, once; see ``Legs.check``."""
        for name, legs in self.legs.items():
            if name not in self._checked:
                own = [self.items(i) for i, source in enumerate(self.sources) if source == name]
                legs.check(np.concatenate(own), progress)
                self._checked.add(name)

    def refuse_if_full(self, out: Path) -> None:
        """FeatureStoreError if the disk of ``out``, which is made, cannot take the maps."""
        out.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(out).free
        if self.maps_bytes > free:
            raise FeatureStoreError(
                f"the maps need up to {human_bytes(self.maps_bytes)} in {out}, where {human_bytes(free)} are free. Explain fewer "
                "trials (`n`) or methods, or choose another disk (`out`)."
            )

    @property
    def photographs(self) -> int:
        """Distinct ones."""
        return len({(source, key) for source, keys in zip(self.sources, self.keys, strict=True) for key in keys})

    @property
    def maps_bytes(self) -> int:
        """At most, on the disk; compression saves some, and a person's map is there only where the answer differs."""
        places, size, _, _ = self.any_legs.shape
        return len(self) * len(self.methods) * 2 * places * size**2 * 4

    @cached_property
    def seconds(self) -> float:
        """What computing takes, from measured passes of the network forward and backward over a trial."""
        trial, measured = self.trial(0), []
        for _ in range(3):  # the first one warms up
            start = time.perf_counter()
            METHODS["input-x-gradient"].function(trial)
            measured.append(time.perf_counter() - start)
        once = min(measured)
        passes = sum(
            method.passes * (self.request.steps / STEPS if method.conserves == "change" else 1)
            for method in self.methods
        )
        if self.request.checks:
            passes += _FORWARD * len(KINDS) * len(FRACTIONS) * (len(self.methods) + _ORDERS)
        return once * len(self) * passes


def plan_explanation(request: ExplainRequest) -> ExplainPlan:
    """Read the run and its trials, load the network, and check that every method applies; nothing is written.

    FeatureStoreError for a run that is not finished or not there, trials whose items are not in the store, and all that
    ``Legs`` refuses.
    """
    methods = find_methods(request.methods)
    config = _config(request.run)
    store = FeatureStore.open(request.store or config["store"])
    start = config.get("settings", {}).get("finetune_from") or config["layer"]
    head = load_head(request.run / "weights.safetensors", start, backbone=request.backbone)
    device = choose_device(request.device)
    table = _trials(request, config, store)
    sources = table["source"].tolist() if "source" in table else [config["sources"][0]] * len(table)
    legs = {
        name: Legs(
            store.source(name),
            head,
            maps=request.maps,
            weights=request.weights,
            backbone=request.backbone,
            device=device,
        )
        for name in dict.fromkeys(sources)
    }
    for method in methods:
        method.refuse_useless(next(iter(legs.values())))
    names = list(zip(FACES, VIEWS, strict=True)) if FACES[0] in table else [("face_id", "view")]
    keys = [[(row[face], row[view]) for face, view in names] for row in table.to_dict("records")]
    if FACES[0] in table:
        answers = table[ODD_POSITION].to_numpy(np.int64) - 1
    else:
        answers = pd.Index(getattr(head, "faces", ())).get_indexer(table["face_id"]).astype(np.int64)
    return ExplainPlan(request, store.path.resolve(), config, legs, methods, table, sources, keys, answers)


def _config(run: Path) -> dict[str, Any]:
    if not run.is_dir():
        others = sorted(path.parent.name for path in run.parent.glob("*/result.json"))
        hint = near_matches(run.name, others) if others else "Train one: pipelines/train_heads.py"
        raise FeatureStoreError(f"there is no run {run.name!r} in {run.parent}. {hint}")
    if read_result(run) is None or not (run / "weights.safetensors").is_file():
        raise FeatureStoreError(
            f"the run {run} is not finished, or has no weights, so there is nothing to explain. Finish it: the same command of "
            "pipelines/train_heads.py goes on where it stopped."
        )
    config: dict[str, Any] = json.loads((run / "config.json").read_text("utf-8"))
    missing = [name for name in ("layer", "head", "sources", "store") if name not in config]
    if missing:
        raise FeatureStoreError(
            f"{run / 'config.json'} says nothing of {missing[0]}: it was not written by this program."
        )
    return config


def _trials(request: ExplainRequest, config: dict[str, Any], store: FeatureStore) -> pd.DataFrame:
    """Those asked for, with source, faces, views and odd_position (or face_id and view), indexed by their place among all."""
    if request.trials == TEST:
        table = read_predictions(request.run)
        if table is None:
            raise FeatureStoreError(f"{request.run / 'predictions.csv'} cannot be read. Train the run again.")
    elif config["head"] == "identity":
        raise FeatureStoreError("an identity head has no trials but its own test views: `trials` test.")
    else:
        table = load_trials(Path(request.trials), store, config["sources"][0], on_error=request.on_error).table
    n = len(table)
    for condition in request.where:
        table = table[rows_that_meet(condition, table)]
    if not len(table):
        raise FeatureStoreError(
            f"none of the {n:,} trials ({request.trials}) meets `where` {' and '.join(request.where)}."
        )
    if request.n is not None and request.n < len(table):
        chosen = np.random.default_rng(request.seed).choice(len(table), request.n, replace=False)
        table = table.iloc[np.sort(chosen)]
    return table
