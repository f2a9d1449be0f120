"""What a fine-tuned run begins with and leaves behind: its head, the rows it takes, and the tuned network."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from featurestore import FeatureStore
from featurestore.caching.extractor import load_part
from featurestore.caching.provenance import recipe_of, weights_of
from featurestore.checkpoints.weights import TUNED, TUNED_FROM, Weights
from featurestore.errors import FeatureStoreError
from featurestore.store.reader import Source
from featurestore.store.rows import Rows
from heads.checkpoints import load_head, write_tensors
from heads.computed_rows import ComputedRows, Record, rows_of_photographs
from heads.features import Features
from heads.finetuning import FinetunedHead, NetworkPart
from heads.models.base import Head
from heads.tasks import Task
from heads.train import Preparation

if TYPE_CHECKING:
    from heads.runs import Run

_SAY_EVERY = 10.0  # seconds
_FLOAT32 = np.dtype(np.float32)


def weights_of_all(sources: Sequence[Source], weights: str | None, backbone: str | None) -> Weights:
    """The weights that all ``sources`` were made with; FeatureStoreError if they are of several networks."""
    if "imported" in sources[0].attributes:
        raise FeatureStoreError(
            f"{sources[0].name} was imported, so the network that made it is not known here and cannot be fine-tuned."
        )
    opened = weights_of(sources[0], weights, backbone)
    networks = {(each.attributes["backbone"], each.attributes["weights"], recipe_of(each).size) for each in sources}
    if len(networks) > 1:
        raise FeatureStoreError(
            f"the trials show rows of several networks ({', '.join(each.name for each in sources)}), and one can be fine-tuned. "
            "Choose one `source`."
        )
    return opened


def finetuned_head(task: Task, run: "Run", start: Path, weights: Weights) -> FinetunedHead:
    """The head as training begins: that of the frozen run in folder ``start`` behind the network's part."""
    source = FeatureStore.open(task.store).source(task.sources[0])
    part = NetworkPart.of(weights.backbone, str(run.settings.finetune_from), run.layer, recipe_of(source).size)
    head = load_head(start / "weights.safetensors", run.layer)
    return FinetunedHead(part, weights.backbone, load_part(weights.backbone, part.first, part.end, weights), head)


def finetuning_features(
    task: Task,
    run: "Run",
    head: FinetunedHead,
    weights: Weights,
    folder: Path,
    say: Callable[[Preparation], None],
) -> Features:
    """The rows that a fine-tuned head takes: cached ones, or computed from the photographs into a file of ``folder``.

    With ``augment`` also the mirrored photographs' rows of the training items: both are computed once, and each epoch
    chooses between them. FeatureStoreError for photographs that are not there, or not what they were.
    """
    store, settings = FeatureStore.open(task.store), run.settings
    sources = [store.source(name) for name in task.sources]
    device = torch.device(settings.device)
    shown, trained = (np.unique(task.items[which]) for which in (task.split.part >= 0, task.split.part == 0))
    jobs = [
        (i, False, items) for i, items in enumerate(by_source(sources, shown)) if not _cached(sources[i], head.part)
    ]
    if settings.augment:
        jobs += [(i, True, items) for i, items in enumerate(by_source(sources, trained))]
    counted = _Counted(sum(len(items) for _, _, items in jobs), say)
    computed: dict[tuple[int, bool], ComputedRows] = {}
    for i, mirrored, items in jobs:
        computed[i, mirrored] = rows_of_photographs(
            sources[i], head.part.start, head.shape, weights, items, folder, device, mirrored, counted.add
        )
    plain: list[Rows | ComputedRows] = [
        computed.get((i, False)) or source.rows(head.part.start) for i, source in enumerate(sources)
    ]
    keep = shown if device.type != "cpu" else None
    mirrored_rows = None
    if settings.augment:
        parts = [computed[i, True] for i in range(len(sources))]
        mirrored_rows = Features(parts, device, trained if keep is not None else None)
    return Features(plain, device, keep, mirrored_rows)


class _Counted:
    """Tells how many photographs are done, at the beginning, the end, and every ten seconds."""

    def __init__(self, total: int, say: Callable[[Preparation], None]) -> None:
        self._total, self._say, self._done, self._told = total, say, 0, 0.0

    def add(self, n: int) -> None:
        """``n`` more are done."""
        self._done += n
        if time.monotonic() - self._told >= _SAY_EVERY or self._done == self._total:
            self._told = time.monotonic()
            self._say(Preparation(self._done, self._total))


def _cached(source: Source, part: NetworkPart) -> bool:
    return part.first in source.layers


def by_source(sources: Sequence[Source], items: np.ndarray) -> list[np.ndarray]:
    """Distinct ``items``, whose numbers run through all sources, as row numbers (ascending) of each."""
    items = np.unique(items)
    starts = np.cumsum([0, *(source.n_items for source in sources)])
    return [items[(items >= a) & (items < b)] - a for a, b in pairwise(starts)]


def without_backbone(
    head: FinetunedHead, features: Features, task: Task, run: "Run", folder: Path
) -> tuple[Head, Features]:
    """The head alone and the rows of its layer that its tuned backbone gives to the task's items, each computed once."""
    items = np.unique(task.items[task.split.part >= 0])
    store = FeatureStore.open(task.store)
    layer = store.source(task.sources[0]).layer(run.layer)
    count = sum(store.source(name).n_items for name in task.sources)
    described = replace(layer, n_items=count, dtype=_FLOAT32)
    with torch.no_grad():
        parts = (
            head.layer_rows(features.gather(few)).float().cpu().numpy()
            for few in torch.from_numpy(items).split(min(head.chunk, 256))
        )
        rows = ComputedRows(described, items, Record(layer.shape, _FLOAT32), parts, folder)
    return head.head, Features([rows], features.device, items if features.device.type != "cpu" else None)


def save_network(head: FinetunedHead, weights: Weights, path: Path, run: str) -> None:
    """The whole network under its own keys, with the tuned part in its place: weights that layers can be cached with.

    Layers behind the head's are as they were.
    """
    state = weights.read(weights.keys)
    tuned = head.backbone.state_dict()
    state |= {key: values for key, values in tuned.items() if key in weights.keys}
    about = {
        "weights": f"{run}, fine-tuned from {weights.described}",
        "random": weights.random or weights.random_start,
    }
    write_tensors(path / TUNED, state, {TUNED_FROM: json.dumps(about)})  # one entry: several have no fixed order
