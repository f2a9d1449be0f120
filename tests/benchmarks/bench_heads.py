"""Measure training beside the loop that people write today, both sides in one run.

    python -m tests.benchmarks.bench_heads                  # everything, about half an hour on two cores
    python -m tests.benchmarks.bench_heads --only speed     # one section
    python -m tests.benchmarks.bench_heads --markdown       # the table as the README shows it

The usual loop: activations in a pandas table, looked up item by item; a ``DataLoader`` of batch 32; the published head in
plain modules, its bridge run on all three faces; default Adam. ``defaults`` and ``race`` measure what ``train_heads.py`` does
without options on the demo store. Sections ``precision``, ``precision_maps``, ``accuracy`` and ``real`` show what heads reach on
the demo trials and on real photographs (shared/data/orl_faces).
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from torch.utils.data import DataLoader, Dataset

from featurestore import FeatureStore
from featurestore.caching.extractor import load_extractor, load_part
from featurestore.caching.job import CachingRequest as PassRequest
from featurestore.caching.job import prepare_job as prepare_pass
from featurestore.caching.planning import make_plan
from featurestore.caching.run import cache_layers
from featurestore.checkpoints.weights import open_weights
from featurestore.demo.dataset import make_faces
from featurestore.memory import keep_freed_memory
from featurestore.networks.registry import get_backbone
from featurestore.photos.decode import decode
from featurestore.photos.keys import find_faces
from featurestore.store.lock import store_lock
from heads.checkpoints import load_head
from heads.features import Features
from heads.finetuning import FinetunedHead, NetworkPart
from heads.grid import GridRequest, plan_grid
from heads.models.base import Head
from heads.published import export
from heads.registry import draw_head
from heads.runs_table import write_runs_table
from heads.schedule import run_grid
from heads.scores import ceiling_scores
from heads.splits import split_trials
from heads.train import Examples, Settings, train_epoch, validate
from heads.trials.matching import load_trials
from tests.benchmarks.measure import (
    MAXP_5_3,
    ROOT,
    Line,
    compare,
    empty_cache,
    fill_store,
    in_fresh_process,
    peak_anonymous,
    run_sections,
    section_options,
)
from tests.heads.published import Published

SHARED = Path(os.environ.get("FEATURESTORE_SHARED", ROOT.parent / "shared"))
LAYERS = {"maxp_5_3": (MAXP_5_3, 5, 25.0), "fc7-relu": ((4096,), 7, 10.0)}
BATCH = 1024  # ours; the usual loop's is 32
DEMO_FACES, DEMO_VIEWS = 100, 5
DEMO_STORE, DEMO_TRIALS = ROOT / "store" / "demo.zarr", ROOT / "store" / "demo_faces" / "trials.csv"


class UsualTrials(Dataset):
    """Trials as people hold them: a table of trials, and a table of activations by face."""

    def __init__(self, trials: pd.DataFrame, activations: pd.DataFrame) -> None:
        self.trials, self.activations = trials, activations

    def __len__(self) -> int:
        return len(self.trials)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        trial = self.trials.iloc[i]
        three = [torch.from_numpy(self.activations.loc[trial[f"item_{k}"], "activation"]) for k in (1, 2, 3)]
        return (*three, torch.tensor(trial["odd"]))


def usual(items: np.ndarray, odd: np.ndarray, rows: torch.Tensor) -> UsualTrials:
    trials = pd.DataFrame(items, columns=["item_1", "item_2", "item_3"]).assign(odd=odd)
    return UsualTrials(trials, pd.DataFrame({"activation": list(rows.numpy())}))


def usual_steps(head: torch.nn.Module, batches: Iterator, steps: int, optimizer: torch.optim.Optimizer) -> int:
    """Train for ``steps`` batches; returns how many trials that were."""
    seen = 0
    for _ in range(steps):
        *three, odd = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(head(*three), odd).backward()
        optimizer.step()
        seen += len(odd)
    return seen


def forever(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


def random_examples(n: int, items: int, seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    three = np.stack([rng.choice(items, 3, replace=False) for _ in range(n)])
    none = np.empty(0, np.int64)
    return Examples(three, rng.integers(0, 3, n), np.arange(n), none, none)


def speed(folder: Path) -> list[Line]:
    """Triplets/s of a training step, 100 faces; and that the deduplicated step has the plain one's gradient."""
    lines = []
    for layer, (shape, block, wanted) in LAYERS.items():
        fill_store(folder / f"{layer}.zarr", 100, shape, 100, layer)
        rows = FeatureStore.open(folder / f"{layer}.zarr").rows(layer)
        examples = random_examples(8 * BATCH, 100, 0)
        features, head = Features([rows]), draw_head("conv", shape, 0)
        head.standardise(*features.statistics(np.arange(100)))
        optimizer = torch.optim.Adam(head.parameters(), lr=5e-4, fused=True)
        settings = Settings(batch_size=BATCH)
        data = usual(examples.items, examples.labels, rows.gather(range(100)))
        plain = Published(block, head.n_features, conv=True, parallel=False)
        batches, adam = forever(DataLoader(data, 32, shuffle=True)), torch.optim.Adam(plain.parameters(), lr=5e-4)

        def ours(head=head, features=features, examples=examples, settings=settings, optimizer=optimizer) -> float:
            some = Examples(examples.items, examples.labels, examples.train[: 4 * BATCH], *[examples.test] * 2)
            return train_epoch(head, features, some, settings, optimizer, 1).examples_per_second

        def theirs(plain=plain, batches=batches, adam=adam, steps=8 if block == 5 else 60) -> float:
            start = time.perf_counter()
            return usual_steps(plain, batches, steps, adam) / (time.perf_counter() - start)

        what = f"training, {layer}, conv head ({sum(p.numel() for p in head.parameters()) / 1e6:.1f} M), 100 faces"
        lines.append(compare(what, ours, theirs, wanted, "triplets/s", rounds=3))
        lines.append(gradient_difference(folder, layer, shape, block, rows.gather(range(100)), examples))
    return lines


def gradient_difference(
    folder: Path, layer: str, shape: tuple[int, ...], block: int, rows: torch.Tensor, examples: Examples
) -> Line:
    """One step on 256 triplets, dropout off, same weights; the largest difference by layer, relative to the largest.

    In float64: among so many float32 numbers a few lie so near a ReLU's corner that rounding decides their side. (The
    tests compare float32 on fewer triplets, and with the published implementation's numbers.)
    """
    rows = rows.double()
    export(draw_head("conv", shape, 1), folder / "head.pth", layer)
    plain = Published(block, rows[0].numel(), conv=True, parallel=False).eval()
    plain.load_state_dict(torch.load(folder / "head.pth"))
    head = load_head(folder / "head.pth", layer, shape).double()
    plain = plain.double()
    triplets, odd = torch.from_numpy(examples.items[:256]), torch.from_numpy(examples.labels[:256])
    head.accumulate(rows, triplets, odd, generator=None)
    F.cross_entropy(plain(*(rows[triplets[:, k]] for k in range(3))), odd).backward()
    worst = 0.0
    for mine, other in zip(modules(head), modules(plain), strict=True):
        a, b = (torch.cat([m.weight.grad.flatten(), m.bias.grad]) for m in (mine, other))
        worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return Line(f"gradient, {layer}: deduplicated against plain", f"{worst:.1e}", "", worst, "< 1e-5", worst < 1e-5)


def modules(head: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in head.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]


# --- the demo trials ----------------------------------------------------------------------------------------------------


def run_pass(images: Path, store: Path, layers: list[str]) -> None:
    job = prepare_pass(PassRequest(store=store, faces=find_faces(images), layers=layers, weights="random:0"))
    with store_lock(store, "benchmark"):
        cache_layers(job, make_plan(job))


def demo(layers: tuple[str, ...] = ("maxp_5_3", "fc7-relu")) -> tuple[Path, Path]:
    """The demo store and its trials, made where ``make demo`` makes them, if they are not there."""
    if not DEMO_TRIALS.exists():
        make_faces(DEMO_TRIALS.parent)
    run_pass(DEMO_TRIALS.parent / "faces.csv", DEMO_STORE, list(layers))
    return DEMO_STORE, DEMO_TRIALS


def demo_examples(store: Path, trials: Path) -> tuple[Examples, float]:
    loaded = load_trials(trials, FeatureStore.open(store))
    split = split_trials(loaded, "trial", seed=0)
    parts = [split.indices(name) for name in ("train", "validation", "test")]
    return Examples(loaded.items, loaded.odd, *parts), ceiling_scores(loaded.table, None)["ceiling"]


def as_by_default(layer: str) -> tuple[Head, Features, Examples, Settings]:
    """What ``train_heads.py --layers LAYER --heads conv`` trains on the demo store, as training begins.

    In a process of its own: the command keeps freed memory, and the usual loop does not.
    """
    keep_freed_memory()
    request = GridRequest(DEMO_STORE, ROOT / "store" / "no_runs", [layer], ["conv"], DEMO_TRIALS, precision="auto")
    ((task, (_, run)),) = plan_grid(request).parts
    features = Features([FeatureStore.open(DEMO_STORE).rows(layer)])
    head = draw_head("conv", features.shape, run.settings.seed, **run.options)
    head.standardise(*features.statistics(task.items[task.split.indices("train")]))
    head.low_precision = run.settings.precision == "bf16"
    return head, features, task.examples, run.settings


def defaults_child(layer: str) -> tuple[float, str]:
    """Triplets/s by default in the last of three short epochs, since the first steps take memory; and the settings."""
    head, features, examples, settings = as_by_default(layer)
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.lr, fused=True)
    short = replace(examples, train=examples.train[: (6 if layer == "maxp_5_3" else 13) * settings.batch_size])
    speeds = [train_epoch(head, features, short, settings, optimizer, 1).examples_per_second for _ in range(3)]
    return speeds[-1], f"batch {settings.batch_size}, {settings.precision}"


def race_child(wanted: str) -> list[tuple[float, float]]:
    """Seconds of training and validation accuracy after each epoch by default, until the latter is as ``wanted``."""
    head, features, examples, settings = as_by_default("maxp_5_3")
    optimizer = torch.optim.Adam(head.parameters(), lr=settings.lr, fused=True)
    spent, curve = 0.0, []
    while len(curve) < 30 and (not curve or curve[-1][1] < float(wanted)):
        spent += train_epoch(head, features, examples, settings, optimizer, len(curve) + 1).seconds
        curve.append((spent, validate(head, features, examples, len(curve) + 1)[1]))
    return curve


def child(name: str, argument: str) -> Any:
    """What ``name``_child returns in a process of its own."""
    return json.loads(in_fresh_process("tests.benchmarks.bench_heads", ["--child", name, argument]))


def defaults(_: Path) -> list[Line]:
    """Triplets/s of the command's defaults on the demo store, conv head."""
    store, trials = demo()
    examples, _ceiling = demo_examples(store, trials)
    lines = []
    for layer, wanted, steps in (("maxp_5_3", 20.0, 4), ("fc7-relu", 15.0, 60)):
        rows = FeatureStore.open(store).rows(layer)
        data = usual(*examples.of(examples.train), rows.gather(range(len(rows))))
        block, shape, settings = LAYERS[layer][1], rows.layer.shape, child("defaults", layer)[1]
        plain = Published(block, int(np.prod(shape)), conv=True, parallel=False)
        batches, adam = forever(DataLoader(data, 32, shuffle=True)), torch.optim.Adam(plain.parameters(), lr=5e-4)

        def ours(layer=layer) -> float:
            return child("defaults", layer)[0]

        def theirs(plain=plain, batches=batches, adam=adam, steps=steps) -> float:
            start = time.perf_counter()
            return usual_steps(plain, batches, steps, adam) / (time.perf_counter() - start)

        what = f"the command's defaults ({settings}) on the demo store, {layer}, conv head"
        lines.append(compare(what, ours, theirs, wanted, "triplets/s", rounds=3))
    return lines


def usual_race(
    what: str, plain: torch.nn.Module, x: torch.Tensor, examples: Examples, epochs: int
) -> tuple[float, float]:
    """Best validation accuracy of the usual loop in so many epochs, and the seconds of training that it took."""
    adam = torch.optim.Adam(plain.parameters(), lr=5e-4)
    train, odd = examples.of(examples.train)
    loader = DataLoader(usual(train, odd, x), 32, shuffle=True, generator=torch.Generator().manual_seed(0))
    items, labels = examples.of(examples.validation)
    best, at, spent = 0.0, 0.0, 0.0
    for epoch in range(epochs):
        began = time.perf_counter()
        usual_steps(plain.train(), iter(loader), len(loader), adam)
        spent += time.perf_counter() - began
        plain.eval()
        with torch.no_grad():
            parts = torch.from_numpy(items).split(32)
            logits = torch.cat([plain(*(x[part[:, k]] for k in range(3))) for part in parts])
        reached = float((logits.argmax(1).numpy() == labels).mean())
        click.echo(f"  {what}, epoch {epoch + 1}: validation accuracy {reached:.3f} after {spent:.0f} s", err=True)
        if reached > best:
            best, at = reached, spent
    return best, at


def race(folder: Path) -> list[Line]:
    """Time to the validation accuracy that the usual loop reaches on the demo trials, maxp_5_3, conv head; ours by defaults.

    Twice: the loop as it is, on raw rows with torch's initial weights, whose ReLUs may close in the first steps; and
    helped, with our standardised rows and live initial weights. An epoch each.
    """
    store, trials = demo()
    examples, _ = demo_examples(store, trials)
    rows = FeatureStore.open(store).rows("maxp_5_3")
    features, head = Features([rows]), draw_head("conv", MAXP_5_3, 0)
    x = rows.gather(range(len(rows))).flatten(1)
    torch.manual_seed(0)
    as_it_is = usual_race("usual loop", Published(5, 25088, conv=True, parallel=False), x, examples, 1)
    export(head, folder / "start.pth", "maxp_5_3")
    helped_head = Published(5, 25088, conv=True, parallel=False)
    helped_head.load_state_dict(torch.load(folder / "start.pth"))
    head.standardise(*features.statistics(examples.items[examples.train]))
    helped = usual_race("helped loop", helped_head, (x - head.mean) * head.scale, examples, 1)
    curve = child("race", str(max(as_it_is[0], helped[0])))
    for epoch, (spent, right) in enumerate(curve, start=1):
        click.echo(f"  ours, epoch {epoch}: validation accuracy {right:.3f} after {spent:.0f} s", err=True)
    lines = []
    for what, (wanted, theirs) in (("the usual loop", as_it_is), ("the usual loop helped", helped)):
        seconds = next((spent for spent, right in curve if right >= wanted), float("inf"))
        label = f"time to the validation accuracy of {what}, {wanted:.3f}, demo trials, maxp_5_3, by defaults"
        lines.append(Line(label, f"{seconds:.0f} s", f"{theirs:.0f} s", theirs / seconds, "20", theirs / seconds >= 20))
    return lines


def backbone(_: Path) -> list[Line]:
    """Trials/s of an epoch from the cache against one that runs the frozen network on every trial's three photographs."""
    store, trials = demo()
    examples, _ceiling = demo_examples(store, trials)
    source = FeatureStore.open(store).source()
    features, head = Features([source.rows("maxp_5_3")]), draw_head("conv", MAXP_5_3, 0)
    head.standardise(*features.statistics(examples.items[examples.train]))
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-4, fused=True)
    spec = get_backbone("vggface")
    weights = open_weights("random:0", spec)
    network = load_extractor(spec, ["maxp_5_3"], weights, torch.device("cpu"), torch.float32)
    recipe, paths = spec.default_recipe(), source.items["path"].tolist()
    plain = Published(5, 25088, conv=True, parallel=False)
    adam = torch.optim.Adam(plain.parameters(), lr=5e-4)
    items, odd = examples.of(examples.train)

    def ours() -> float:
        return train_epoch(head, features, examples, Settings(batch_size=BATCH), optimizer, 1).examples_per_second

    def theirs() -> float:
        start = time.perf_counter()
        pixels = [recipe.pixels(decode(Path(paths[item]).read_bytes())) for item in items[:16].ravel()]
        with torch.no_grad():
            maps = network(recipe.normalise(torch.from_numpy(np.stack(pixels))))["maxp_5_3"]
        adam.zero_grad()
        F.cross_entropy(plain(*maps.reshape(16, 3, -1).unbind(1)), torch.from_numpy(odd[:16])).backward()
        adam.step()
        return 16 / (time.perf_counter() - start)

    what = "an epoch from the cache against one that runs the backbone, demo trials, maxp_5_3"
    return [compare(what, ours, theirs, 200, "trials/s", rounds=2)]


def finetune(folder: Path) -> list[Line]:
    """Trials/s of an epoch of ``--finetune-from relu_5_1``: rows from the cache against photographs through the frozen part.

    500 items, steps of 64 trials. The other sides: the usual loop with three photographs for every trial, and one with our own
    head that computes each of a step's distinct photographs once; that one's frozen part is timed on 32 of them.
    """
    spec, weights = get_backbone("vggface"), open_weights("random:0", get_backbone("vggface"))
    shape = (512, 14, 14)
    fill_store(folder / "relu_5_1.zarr", 500, shape, 100, "relu_5_1")
    features = Features([FeatureStore.open(folder / "relu_5_1.zarr").rows("relu_5_1")])
    make_faces(folder / "faces", 32, 1, n_trials=10)
    paths = sorted((folder / "faces").rglob("*.png"))
    recipe, cpu = spec.default_recipe(), torch.device("cpu")
    front = load_extractor(spec, ["relu_5_1"], weights, cpu, torch.float32)
    part = NetworkPart.of(spec, "relu_5_1", "maxp_5_3", 224)
    head = FinetunedHead(part, spec, load_part(spec, "relu_5_1", "maxp_5_3", weights), draw_head("conv", MAXP_5_3, 0))
    settings = Settings(batch_size=64, finetune_from="relu_5_1", backbone_lr=5e-5)
    optimizer = torch.optim.Adam(head.train().parameters(), lr=5e-4, fused=True)
    examples = random_examples(64, 500, 0)
    distinct = len(np.unique(examples.items))
    usual_part = load_part(spec, "relu_5_1", "maxp_5_3", weights)
    plain = Published(5, 25088, conv=True, parallel=False)
    adam = torch.optim.Adam([*plain.parameters(), *usual_part.parameters()], lr=5e-4)

    def from_photographs(n: int) -> torch.Tensor:
        pixels = [recipe.pixels(decode(paths[i % len(paths)].read_bytes())) for i in range(n)]
        with torch.no_grad():
            return front(recipe.normalise(torch.from_numpy(np.stack(pixels))))["relu_5_1"]

    rates = []

    def ours() -> float:
        rates.append(train_epoch(head, features, examples, settings, optimizer, 1).examples_per_second)
        return rates[-1]

    def usual_loop() -> float:
        start = time.perf_counter()
        maps = usual_part(from_photographs(24))
        adam.zero_grad()
        odd = torch.from_numpy(examples.labels[:8])
        F.cross_entropy(plain(*maps.reshape(8, 3, -1).unbind(1)), odd).backward()
        adam.step()
        return 8 / (time.perf_counter() - start)

    def each_once() -> float:
        start = time.perf_counter()
        from_photographs(16), from_photographs(16)
        return 64 / (64 / rates[-1] + (time.perf_counter() - start) * distinct / 32)

    what = "an epoch of --finetune-from relu_5_1 (conv head on maxp_5_3, 500 photographs) from the cache against"
    return [
        compare(f"{what} the usual loop from photographs", ours, usual_loop, 5, "trials/s", rounds=2),
        compare(f"{what} each photograph of a step once", ours, each_once, 5, "trials/s", rounds=2),
    ]


def memory_child(store: str) -> int:
    """Peak RssAnon, as the command is run, of an epoch over a whole store that is not in memory."""
    keep_freed_memory()
    empty_cache(Path(store))
    rows = FeatureStore.open(store).rows("maxp_5_3")
    features, head = Features([rows]), draw_head("conv", MAXP_5_3, 0)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-4, fused=True)
    examples = random_examples(4 * 256, len(rows), 0)

    def epoch() -> None:
        head.standardise(*features.statistics(np.arange(0, len(rows), 2)))
        train_epoch(head, features, examples, Settings(batch_size=256), optimizer, 1)

    return peak_anonymous(epoch)


def memory(folder: Path) -> list[Line]:
    """RssAnon in a fresh process, from a store of the demo's size and one ten times larger."""
    peaks = []
    for n in (500, 5000):
        fill_store(folder / f"{n}.zarr", n, MAXP_5_3, 250)
        peaks.append(child("memory", str(folder / f"{n}.zarr")))
    ratio, mib = peaks[1] / peaks[0], [f"{peak / 2**20:,.0f} MiB" for peak in peaks]
    what = "anonymous memory of training from the disk, conv head on maxp_5_3, from a store 10 × larger"
    return [Line(what, mib[1], mib[0], ratio, "≤ 1.1", ratio <= 1.1)]


# --- what heads reach ---------------------------------------------------------------------------------------------------


def reached(what: str, result: dict, base: float, wanted: float, label: str) -> Line:
    score = f"{result['accuracy']:.3f} [{result['low']:.3f}, {result['high']:.3f}]"
    return Line(what, score, f"{base:.3f}", result["accuracy"] / base, label, result["accuracy"] >= wanted)


def results(request: GridRequest) -> dict[tuple[str, str], list[dict]]:
    """Results of a grid by layer and head."""
    grid = plan_grid(request)
    found: dict[tuple[str, str], list[dict]] = {}
    for task, runs in grid.parts:

        def done(run, result) -> None:
            if not isinstance(result, dict):
                raise result
            found.setdefault((run.layer, run.head), []).append(result)

        run_grid([(task, runs)], grid.out, done=done)
    write_runs_table(grid.out)
    return found


def equal_precision(folder: Path, layer: str, heads: list[str], epochs: int) -> list[Line]:
    """Test accuracy at the precision that is chosen by default, beside float32: five seeds, their difference by seed."""
    store, trials = demo()
    found, used = [], {}
    for name in ("auto", None):
        request = GridRequest(
            store, folder / str(name), [layer], heads, trials, seeds=range(5), precision=name, settings=Settings(epochs=epochs)
        )  # fmt: skip
        used |= {run.head: run.settings.precision for _, runs in plan_grid(request).parts for run in runs if name}
        found.append(results(request))
    lines = []
    for head in heads:
        fast, plain = (np.array([result["accuracy"] for result in each[layer, head]]) for each in found)
        mean = float((fast - plain).mean())
        half = float(stats.t.ppf(0.975, len(fast) - 1) * (fast - plain).std(ddof=1) / len(fast) ** 0.5)
        what = (
            f"test accuracy, {layer}, {head}, at {used[head]} beside fp32, mean of five seeds, ≤ {epochs} epochs: "
            f"difference {mean:+.4f} [{mean - half:+.4f}, {mean + half:+.4f}]"
        )
        equal = abs(mean) <= half
        lines.append(
            Line(what, f"{fast.mean():.4f}", f"{plain.mean():.4f}", fast.mean() / plain.mean(), "equal", equal)
        )
    return lines


def precision(folder: Path) -> list[Line]:
    """Heads on vectors, trained to the end."""
    return equal_precision(folder, "fc7-relu", ["conv", "fc"], 100)


def precision_maps(folder: Path) -> list[Line]:
    """The conv head on maps: 103 million weights, so three epochs."""
    return equal_precision(folder, "maxp_5_3", ["conv"], 3)


def accuracy(folder: Path) -> list[Line]:
    """Demo trials: held-out trials, then held-out faces, beside zero-shot."""
    store, trials = demo()
    lines = []
    found = results(GridRequest(store, folder / "runs", trials=trials, layers=["maxp_5_3", "fc7-relu"]))
    for (layer, head), (result,) in found.items():
        if head == "zero-shot":
            continue
        base = found[layer, "zero-shot"][0]
        what = f"demo trials, {layer}, {head}: accuracy beside zero-shot (ceiling {result['ceiling']:.3f})"
        lines.append(reached(what, result, base["accuracy"], base["high"], "> zero-shot"))
    return lines


def faces(folder: Path) -> list[Line]:
    """Demo faces that no training trial shows: many trials, since only those with three such faces are left."""
    store, _ = demo()
    make_faces(folder / "many", DEMO_FACES, DEMO_VIEWS, n_trials=60_000)
    trials = folder / "many" / "trials.csv"
    request = GridRequest(
        store, folder / "runs", trials=trials, split="face", heads=["similarity"], layers=["fc7-relu"]
    )
    found = results(request)
    (result,), (base,) = found["fc7-relu", "similarity"], found["fc7-relu", "zero-shot"]
    shown = f"{result['n_test']} trials, fc7-relu, zero-shot {base['accuracy']:.3f}"
    what = f"demo faces never seen ({shown}): similarity beside chance"
    score = f"{result['accuracy']:.3f} [{result['low']:.3f}, {result['high']:.3f}]"
    return [Line(what, score, "0.333", result["accuracy"] * 3, "> chance", result["low"] > 1 / 3)]


def real(folder: Path) -> list[Line]:
    """Real photographs, seeded random weights: identity across views, and same-person trials of people never trained on."""
    images = SHARED / "data" / "orl_faces"
    if not images.is_dir():
        click.echo("  shared/data/orl_faces is not on this machine: skipped", err=True)
        return []
    store = ROOT / "store" / "orl_faces.zarr"
    run_pass(images, store, ["maxp_5_3", "fc7-relu"])
    lines = []
    layers = ["maxp_5_3", "fc7-relu"]
    found: dict[str, list[dict]] = {}
    for seed in (0, 1, 2):
        settings = Settings(epochs=40, batch_size=64)
        views = GridRequest(
            store, folder / "runs", heads=["identity"], layers=layers, split_seed=seed, fractions=(0.7, 0, 0.3), settings=settings
        )  # fmt: skip
        for (layer, _), (result,) in results(views).items():
            found.setdefault(layer, []).append(result)
    for layer, of_layer in found.items():
        mean = {key: float(np.mean([result[key] for result in of_layer])) for key in ("accuracy", "low", "high")}
        what = (
            f"ORL photographs, {layer}: which of 40 people, trained on 7 views, tested on 3 (mean of 3 draws of views)"
        )
        lines.append(reached(what, mean, 1 / 40, 0.97, "0.97"))
    for seed in (0, 1, 2):
        people = GridRequest(
            store, folder / "runs", heads=["similarity"], layers=layers, trials="same-person", n_trials=12_000,
            split="face", split_seed=seed, fractions=(0.6, 0.15, 0.25), settings=Settings(epochs=25, patience=6),
        )  # fmt: skip
        of_heads = results(people)
        for layer in layers:
            (base,), (result,) = of_heads[layer, "zero-shot"], of_heads[layer, "similarity"]
            what = (
                f"ORL photographs, {layer}: same-person trials of 10 people never seen, split {seed}, beside zero-shot"
            )
            lines.append(reached(what, result, base["accuracy"], max(0.95, base["accuracy"]), "0.95, zero-shot"))
    return lines


SECTIONS: dict[str, Callable[[Path], list[Line]]] = {
    "speed": speed, "defaults": defaults, "race": race, "precision": precision, "precision_maps": precision_maps,
    "backbone": backbone, "finetune": finetune, "memory": memory, "accuracy": accuracy, "faces": faces, "real": real,
}  # fmt: skip


@click.command()
@section_options(SECTIONS)
@click.option("--child", "task", nargs=2, hidden=True)
def main(only: tuple[str, ...], markdown: bool, task: tuple[str, str] | None) -> None:
    """Compare training with the usual loop, and show what heads reach; nothing is asserted."""
    if task:
        click.echo(json.dumps(globals()[f"{task[0]}_child"](task[1])))
        return
    run_sections(SECTIONS, only, markdown)


if __name__ == "__main__":
    main()
