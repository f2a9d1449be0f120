"""What fine-tuning will train, where its rows come from, and what it costs: checked before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featurestore import FeatureStore
from featurestore.caching.extractor import refuse_absent
from featurestore.caching.provenance import recipe_of
from featurestore.checkpoints.weights import Weights
from featurestore.errors import FeatureStoreError
from featurestore.text import listing
from heads.computed_rows import absent_photographs, record_of
from heads.finetuned_runs import by_source, weights_of_all
from heads.finetuning import INPUT, Block, NetworkPart, blocks, part_shape
from heads.runs import Run
from heads.tasks import Task


@dataclass(frozen=True)
class FinetuningPlan:
    """One kind of run: its part of the network, all blocks up to its end, the weights by name.

    ``cached``: rows of ``part.start`` are in the store. ``photographs`` have to be read, mirrored ones counted too, which takes
    ``bytes_of_rows`` on the disk while a run is trained; ``network_bytes`` is the tuned network that each run keeps.
    """

    part: NetworkPart
    blocks: tuple[Block, ...]
    weights: str
    cached: bool
    photographs: int
    bytes_of_rows: int
    network_bytes: int

    @property
    def trained(self) -> list[Block]:
        """Those whose ``requires_grad`` is set."""
        return [block for block in self.blocks if block.trainable]

    @property
    def parameters(self) -> int:
        """How many of the network's are trained."""
        return sum(block.parameters for block in self.trained)


def plan_finetuning(store: FeatureStore, parts: Sequence[tuple[Task, Sequence[Run]]]) -> dict[str, FinetuningPlan]:
    """For each kind of fine-tuned run. FeatureStoreError for what cannot be fine-tuned, and for photographs that are gone."""
    plans: dict[str, FinetuningPlan] = {}
    opened: dict[tuple[str, ...], Weights] = {}
    for task, runs in parts:
        for run in runs:
            if not run.settings.finetune_from:
                continue
            if task.sources not in opened:
                sources = [store.source(name) for name in task.sources]
                opened[task.sources] = weights_of_all(sources, run.weights, run.backbone)
            plan = _plan(store, task, run, opened[task.sources])
            if run.kind not in plans or plan.bytes_of_rows > plans[run.kind].bytes_of_rows:
                plans[run.kind] = plan
    return plans


def _plan(store: FeatureStore, task: Task, run: Run, weights: Weights) -> FinetuningPlan:
    sources = [store.source(name) for name in task.sources]
    spec = weights.backbone
    part = NetworkPart.of(spec, str(run.settings.finetune_from), run.layer, recipe_of(sources[0]).size)
    refuse_absent(spec, [part.end], weights)
    found = tuple(blocks(spec, part))
    if not any(block.trainable for block in found):
        raise FeatureStoreError(
            f"between {part.start} and {part.end} {spec.name} has no weights, so there is nothing to fine-tune. Begin earlier."
        )
    shape = part_shape(spec, part)
    cached = [part.first in source.layers for source in sources]
    photographs = rows = 0
    shown, trained = task.items[task.split.part >= 0], task.items[task.split.part == 0]
    for source, is_cached, items, mirrored in zip(
        sources, cached, by_source(sources, shown), by_source(sources, trained), strict=True
    ):
        needed = ([] if is_cached else [items]) + ([mirrored] if run.settings.augment else [])
        n = sum(map(len, needed))
        photographs += n
        rows += n * record_of(source, part.start, shape).bytes
        absent = absent_photographs(source, np.concatenate(needed)) if needed else []
        if absent:
            why = "`augment` mirrors the photographs" if is_cached else f"{part.start} is not cached in {source.name}"
            raise FeatureStoreError(
                f"{why}, and {len(absent)} of {n} photographs that this takes are not there: {listing(absent, 3)}. "
                f"Put them back, or fine-tune from a cached layer{' without `augment`' if run.settings.augment else ''}: "
                f"{listing(source.layers)}."
            )
    network = sum(4 * int(np.prod(shape)) for shape in spec.weight_shapes().values())
    return FinetuningPlan(part, found, weights.described, all(cached), photographs, rows, network)


def start_text(start: str) -> str:
    """Where the trained part begins, in words."""
    return "the images" if start == INPUT else start
