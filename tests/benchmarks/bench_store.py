"""Measure the store and the pass beside what people use today, both sides in one run.

python -m tests.benchmarks.bench_store                 # everything, about 10 minutes on two cores
python -m tests.benchmarks.bench_store --only gather   # one section
python -m tests.benchmarks.bench_store --markdown      # the table as the README shows it
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import cv2
import dask
import dask.array as da
import numpy as np
import tensorstore
import torch
import zarr

from featurestore import FeatureStore
from featurestore.caching.job import CachingRequest, prepare_job
from featurestore.caching.planning import make_plan
from featurestore.caching.run import cache_layers
from featurestore.checkpoints.seeded import draw_weights
from featurestore.memory import keep_freed_memory
from featurestore.networks.registry import get_backbone
from featurestore.photos.decode import decode
from featurestore.photos.keys import find_faces
from featurestore.store.lock import store_lock
from featurestore.store.rows import Rows
from featurestore.store.writer import SourceWriter
from tests.benchmarks.measure import (
    MAXP_5_3,
    ROOT,
    Line,
    compare,
    fill_store,
    in_fresh_process,
    peak_anonymous,
    rate,
    run_sections,
    section_options,
)

BATCH = 16
VGGFACE2 = 3_310_080  # photographs, as many whole shards as that takes


def gather(folder: Path) -> list[Line]:
    """96 random rows of maxp_5_3, page cache warm."""
    lines = []
    rng = np.random.default_rng(1)
    for name, slots, n_items, wanted in (("one shard", 1024, 1024, 0.95), ("many shards", 256, 4096, 0.95)):
        path = folder / f"gather-{slots}.zarr"
        shard = fill_store(path, n_items, MAXP_5_3, slots)
        bare_path = folder / "bare.bin"
        with bare_path.open("wb") as file:
            for _ in range(n_items // slots):
                shard.tofile(file)
        bare = torch.from_numpy(np.memmap(bare_path, np.float32, "c", shape=(n_items, shard.shape[1])))
        rows = FeatureStore.open(path).rows("maxp_5_3")
        array = zarr.open_array(path / "bench" / "maxp_5_3", mode="r")
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path / "bench" / "maxp_5_3")}}
        stored = tensorstore.open(spec, read=True).result()
        out = torch.empty(96, *MAXP_5_3)
        flat = torch.empty(96, shard.shape[1])
        picks = [torch.from_numpy(rng.integers(0, n_items, 96)) for _ in range(40)]
        assert torch.equal(rows.gather(picks[0]).view(96, -1), bare[picks[0]])
        gigabytes = out.nbytes / 1e9

        def each(
            read: Callable[[torch.Tensor], object], picks: list = picks, gigabytes: float = gigabytes
        ) -> Callable[[], float]:
            return lambda: rate(lambda: [read(pick) for pick in picks], gigabytes * len(picks))

        def few(
            read: Callable[[torch.Tensor], object], picks: list = picks[:3], gigabytes: float = gigabytes
        ) -> Callable[[], float]:
            return lambda: rate(lambda: [read(pick) for pick in picks], gigabytes * len(picks))

        ours = each(lambda pick, rows=rows, out=out: rows.gather(pick, out=out))
        lines.append(
            compare(
                f"gather 96 rows, {name}, against index_select on a bare np.memmap",
                ours,
                each(lambda pick, bare=bare, flat=flat: torch.index_select(bare, 0, pick, out=flat)),
                wanted,
                "GB/s",
                41,
            )
        )
        lines.append(
            compare(
                f"gather 96 rows, {name}, against TensorStore",
                ours,
                few(lambda pick, stored=stored: stored[pick.numpy()].read().result()),
                4,
                "GB/s",
            )
        )
        lines.append(
            compare(
                f"gather 96 rows, {name}, against zarr-python",
                ours,
                few(lambda pick, array=array: array.oindex[pick.numpy()]),
                50,
                "GB/s",
                3,
            )
        )
        bare_path.unlink()
    return lines


def write(folder: Path) -> list[Line]:
    """Shards of 256 rows of maxp_5_3 against tofile of the same bytes, with and without waiting for the disk."""
    path = folder / "write.zarr"
    rows = fill_store(path, 256, MAXP_5_3, 256)
    writer = SourceWriter(path, "bench", {})
    numbers = iter(range(10**9))

    def ours() -> None:
        shard_writer = writer.open_shard("maxp_5_3", next(numbers) % 4, end=256)
        for first in range(0, 256, 64):
            shard_writer.write(range(first, first + 64), rows[first : first + 64])
        shard_writer.commit()

    def tofile() -> None:
        target = folder / f"bare-{next(numbers) % 4}.bin"
        with target.open("wb") as file:
            rows.tofile(file)
            file.flush()
            os.fdatasync(file.fileno())

    def unsynced(work: Callable[[], None]) -> None:
        sync, os.fdatasync = os.fdatasync, lambda fd: None
        try:
            work()
        finally:
            os.fdatasync = sync

    gigabytes = rows.nbytes / 1e9
    return [
        compare("write a shard against ndarray.tofile, into the page cache", lambda: rate(lambda: unsynced(ours), gigabytes, 4),
                lambda: rate(lambda: unsynced(tofile), gigabytes, 4), 0.8, "GB/s", 15),
        compare("write a shard against ndarray.tofile, both flushed to disk", lambda: rate(ours, gigabytes, 4),
                lambda: rate(tofile, gigabytes, 4), 0.8, "GB/s", 15),
    ]  # fmt: skip


def scan(folder: Path) -> list[Line]:
    """The mean of a whole layer, lazily."""
    path = folder / "scan.zarr"
    fill_store(path, 4096, MAXP_5_3, 256)
    store = FeatureStore.open(path)
    array = path / "bench" / "maxp_5_3"
    gigabytes = 4096 * int(np.prod(MAXP_5_3)) * 4 / 1e9
    with dask.config.set(scheduler="threads"):
        return [
            compare("full scan: store.dask(layer).mean() against dask.array.from_zarr", lambda: rate(
                lambda: store.dask("maxp_5_3").mean().compute(), gigabytes),
                lambda: rate(lambda: da.from_zarr(str(array)).mean().compute(), gigabytes), 2, "GB/s", 3)
        ]  # fmt: skip


def index(folder: Path) -> list[Line]:
    """Open a store of as many items as VGGFace2 has photographs, with its rows, then find 10,000 keys."""
    path = folder / "index.zarr"
    fill_store(path, VGGFACE2, (16,), 256, "tiny")
    picks = np.random.default_rng(2).integers(0, VGGFACE2, 10_000)
    keys = [(f"n{i // 100:06d}", f"{i % 100:04d}_01") for i in picks]
    opening, finding = [], []
    for _ in range(5):
        start = time.perf_counter()
        store = FeatureStore.open(path)
        store.rows("tiny")
        store.find(keys[:1])  # reads all keys and builds their index
        middle = time.perf_counter()
        found = store.find(keys)
        finding.append(time.perf_counter() - middle)
        opening.append(middle - start)
        assert np.array_equal(found, picks)
    seconds, milliseconds = statistics.median(opening), 1000 * statistics.median(finding)
    mib = (
        int(in_fresh_process("tests.benchmarks.bench_store", ["--child", "memory", "index", str(folder), "0"])) / 2**20
    )
    group = zarr.open_group(path / "bench", mode="r")
    what = f"a store of {VGGFACE2:,} items"
    return [
        compare(f"read the keys of {what} against zarr-python",
                lambda: rate(lambda: FeatureStore.open(path).source().coordinate("view"), VGGFACE2 / 1e6),
                lambda: rate(lambda: group["view"][:], VGGFACE2 / 1e6), 1, "million/s", 3),
        Line(f"open {what}: keys, index and rows", f"{seconds:.2f} s", "", seconds, "< 2 s", seconds < 2),
        Line("find 10,000 keys in it", f"{milliseconds:.0f} ms", "", milliseconds, "< 100 ms", milliseconds < 100),
        Line("anonymous memory of both", f"{mib:,.0f} MiB", "", mib, "< 1024 MiB", mib < 1024),
    ]  # fmt: skip


# --- the pass -------------------------------------------------------------------------------------------------------------


def make_photographs(folder: Path, n: int) -> Path:
    """JPEG photographs of 250 × 250 smoothed noise, as large as LFW's."""
    rng = np.random.default_rng(3)
    for i in range(n):
        small = rng.integers(0, 255, (25, 25, 3), np.uint8)
        target = folder / f"f{i // 10}" / f"{i % 10}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(target), cv2.resize(small, (250, 250), interpolation=cv2.INTER_CUBIC))
    return folder


@dataclass(frozen=True)
class PassOf:
    """A network's pass: layers (two on the way and the descriptor, or what stands for one), photographs, what is wanted."""

    layers: list[str]
    n: int
    wanted: float


PASSES = {
    "resnet50_ft": PassOf(["layer2", "layer4", "descriptor"], 96, 1.3),
    "senet50_ft": PassOf(["layer2", "layer4", "descriptor"], 96, 1.3),
    "vggface": PassOf(["maxp_5_3", "fc7-relu", "descriptor"], 64, 1.1),
    "inception_resnet_v1": PassOf(["repeat_1", "mixed_7a", "descriptor"], 320, 1.0),
}
ROUNDS = 3


def run_pass(
    images: Path,
    store: Path,
    layers: list[str],
    precision: str = "fp32",
    items_per_shard: int = 256,
    backbone: str = "vggface",
) -> float:
    """Images per second of the pass with decoding and writing, network loaded, memory kept as the command keeps it."""
    keep_freed_memory()
    faces = find_faces(images)
    request = CachingRequest(
        store,
        faces,
        layers,
        "random:0",
        backbone=backbone,
        precision=precision,
        batch_size=BATCH,
        items_per_shard=items_per_shard,
        device="cpu",
    )
    job = prepare_job(request)
    with store_lock(store, "benchmark"):
        summary = cache_layers(job, make_plan(job))
    return summary.computed / summary.seconds


def whole_network(name: str) -> torch.nn.Module:
    """As published, with seeded weights."""
    spec = get_backbone(name)
    network = spec.build().eval()
    network.load_state_dict(draw_weights(0, network.state_dict(), spec.weight_shapes()))
    return network


def bare_forward(name: str, n: int) -> float:
    """Images per second of the forward loop as people write it: batches in memory, channels last, nothing kept or written."""
    network = whole_network(name).to(memory_format=torch.channels_last)
    size = get_backbone(name).default_recipe().size
    batch = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        network(batch)
        return rate(lambda: network(batch), BATCH, n // BATCH)


def usual_loop(name: str, images: Path, layers: list[str]) -> float:
    """One image at a time, float64, whole network, the layers kept by hooks, appended to a list."""
    spec = get_backbone(name)
    double, recipe = whole_network(name).double(), spec.default_recipe()
    kept: list[dict[str, np.ndarray]] = []
    current: dict[str, np.ndarray] = {}
    modules = dict(double.named_modules())
    for layer in layers:
        modules[spec.layers[layer]].register_forward_hook(
            lambda m, i, o, layer=layer: current.update({layer: o.numpy().copy()})
        )
    files = sorted(images.rglob("*.jpg"))[:6]
    start = time.perf_counter()
    with torch.no_grad():
        for file in files:
            pixels = torch.from_numpy(recipe.pixels(decode(file.read_bytes()))[None])
            double(recipe.normalise(pixels).double())
            kept.append(dict(current))
    return len(files) / (time.perf_counter() - start)


def pass_child(side: str, folder: Path, name: str) -> float:
    """One side in this process, whose allocator no other has touched."""
    work = PASSES[name]
    images = folder / f"photographs-{work.n}"
    if side == "bare":
        return bare_forward(name, work.n // 2)
    if side == "float64":
        return usual_loop(name, images, work.layers)
    with tempfile.TemporaryDirectory(dir=folder) as store:
        return run_pass(images, Path(store) / "pass.zarr", work.layers, side, backbone=name)


def the_pass(folder: Path) -> list[Line]:
    """The pass as the command runs it against what people write; each side in a process of its own, since they differ in
    what becomes of freed memory."""

    def line(what: str, ours: str, theirs: str, name: str, wanted: float) -> Line:
        def side(which: str) -> float:
            arguments = ["--child", "pass", which, str(folder), name]
            found = float(json.loads(in_fresh_process("tests.benchmarks.bench_store", arguments)))
            click.echo(f"  {name}, {which}: {found:.2f} images/s", err=True)
            return found

        a, b = zip(*((side(ours), side(theirs)) for _ in range(ROUNDS)), strict=True)
        ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
        medians = [f"{statistics.median(rates):,.2f} images/s" for rates in (a, b)]
        return Line(what, *medians, ratio, f"{wanted:g}", ratio >= wanted)

    for n in {work.n for work in PASSES.values()}:
        make_photographs(folder / f"photographs-{n}", n)
    lines = [
        line(f"the pass of {name}, fp32, against the bare forward loop", "fp32", "bare", name, work.wanted)
        for name, work in PASSES.items()
    ]
    what = "the pass of vggface, bf16, against one image at a time in float64"
    return [*lines, line(what, "bf16", "float64", "vggface", 10)]


# --- memory ---------------------------------------------------------------------------------------------------------------


def memory_child(kind: str, folder: Path, n: str) -> int:
    if kind == "pass":
        return peak_anonymous(
            lambda: run_pass(
                folder / f"photographs-{n}", folder / f"memory-{n}.zarr", ["maxp_2_2", "maxp_3_3"], "fp32", 16
            )
        )
    if kind == "index":
        return peak_anonymous(lambda: open_and_find(folder / "index.zarr"))
    rows = FeatureStore.open(folder / f"rows-{n}.zarr").rows("maxp_5_3")
    return peak_anonymous(lambda: gather_loop(rows))


def open_and_find(path: Path) -> None:
    store = FeatureStore.open(path)
    store.rows("tiny")
    store.find([("n000000", "0000_01")])


def gather_loop(rows: Rows) -> None:
    out = torch.empty(96, *rows.layer.shape)
    rng = np.random.default_rng(4)
    for _ in range(400):
        rows.gather(rng.integers(0, len(rows), 96), out=out)


def memory(folder: Path) -> list[Line]:
    """RssAnon in a fresh process, with a store (or set of photographs) of one size and ten times that."""
    lines = []
    for kind, small, label in (("pass", 96, "the pass"), ("gather", 1024, "a gather loop")):
        peaks = []
        for n in (small, 10 * small):
            if kind == "pass":
                make_photographs(folder / f"photographs-{n}", n)
            else:
                fill_store(folder / f"rows-{n}.zarr", n, MAXP_5_3, 256)
            command = ["--child", "memory", kind, str(folder), str(n)]
            peaks.append(int(json.loads(in_fresh_process("tests.benchmarks.bench_store", command))))
        ratio = peaks[1] / peaks[0]
        mib = [f"{peak / 2**20:,.0f} MiB" for peak in peaks]
        lines.append(
            Line(f"anonymous memory of {label} at 10 × the items", mib[1], mib[0], ratio, "≤ 1.1", ratio <= 1.1)
        )
    return lines


def help_time(_: Path) -> list[Line]:
    """Wall time of --help, the slowest command."""
    worst = 0.0
    for script in sorted((ROOT / "pipelines").glob("[a-z]*.py")):
        times = []
        for _ in range(5):
            start = time.perf_counter()
            subprocess.run([sys.executable, script, "--help"], check=True, capture_output=True)
            times.append(time.perf_counter() - start)
        worst = max(worst, statistics.median(times))
    return [Line("--help of the slowest command", f"{worst:.2f} s", "", worst, "< 0.5 s", worst < 0.5)]


SECTIONS: dict[str, Callable[[Path], list[Line]]] = {
    "pass": the_pass, "gather": gather, "write": write, "scan": scan, "index": index, "memory": memory, "help": help_time,
}  # fmt: skip


@click.command()
@section_options(SECTIONS)
@click.option("--child", type=(str, str, click.Path(path_type=Path), str), hidden=True)
def main(only: tuple[str, ...], markdown: bool, child: tuple[str, str, Path, str] | None) -> None:
    """Compare the store and the pass with what people use today; nothing is asserted."""
    if child:
        work, *arguments = child
        click.echo(json.dumps({"pass": pass_child, "memory": memory_child}[work](*arguments)))
        return
    run_sections(SECTIONS, only, markdown)


if __name__ == "__main__":
    main()
