"""Measure rows that are not in memory beside what the disk gives, both sides in one run.

python -m tests.benchmarks.bench_cold                  # everything, about 10 minutes and 4 GB of disk
python -m tests.benchmarks.bench_cold --only gather    # one section

Section ``peers`` runs where the environment variable PEERS_PYTHON names a Python, 3.12 or newer, with annbatch and zarrs.
Before every reading the page cache is emptied of the store's files (``posix_fadvise``, once nothing maps them), and no row is
read twice, so that every row comes from the disk: ``share`` shows what it is when they do not.
"""

import mmap
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import click
import numpy as np
import tensorstore
import torch
import zarr

from featurestore import FeatureStore
from heads.features import Features
from heads.registry import draw_head
from heads.train import Examples, Settings, train_epoch
from tests.benchmarks.measure import MAXP_5_3, Line, compare, empty_cache, fill_store, run_sections, section_options

LAYERS = {"maxp_5_3": (MAXP_5_3, 20_480), "fc7-relu": ((4096,), 65_536)}  # shape of a row, items
PEERS = Path(__file__).with_name("cold_peers.py")
READERS = ("annbatch", "zarr-python, fused pipeline", "zarr-python, zarrs pipeline")  # of PEERS
DEPTHS = (8, 32)  # threads that read side by side
_PAGE = mmap.PAGESIZE


def cold_rate(
    store: Path, open_reader: Callable[[], Callable[[np.ndarray], object]], picks: list[np.ndarray], row: int
) -> float:
    """GB/s of reading the rows of ``picks`` one after the other, from an empty page cache; opening is not counted."""
    empty_cache(store)
    read = open_reader()
    seconds = sum(seconds_of(partial(read, pick)) for pick in picks)
    return sum(map(len, picks)) * row / seconds / 1e9


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def our_reader(store: Path, layer: str, n: int) -> Callable[[np.ndarray], object]:
    rows = FeatureStore.open(store).rows(layer)
    return partial(rows.gather, out=torch.empty(n, *rows.shape[1:]))


def pread_reader(store: Path, layer: str, n: int, threads: int, direct: bool) -> Callable[[np.ndarray], object]:
    """Rows by ``preadv`` into buffers used again, in ``threads``; ``direct``: past the page cache, whole pages."""
    found = FeatureStore.open(store).source().layer(layer)
    files = [os.open(found.shard_path(i), os.O_RDONLY | (os.O_DIRECT if direct else 0)) for i in range(found.n_shards)]
    stride, length = found.record.stride, found.row_bytes
    room = -(-length // _PAGE) * _PAGE + _PAGE
    memory = mmap.mmap(-1, n * room)  # aligned to pages, as O_DIRECT has to have it
    views = [memoryview(memory)[i * room : (i + 1) * room] for i in range(n)]
    pool = ThreadPoolExecutor(threads)

    def read_one(i: int, row: int) -> None:
        shard, slot = divmod(row, found.slots)
        start = slot * stride
        skipped = start % _PAGE if direct else 0
        wanted = -(-(skipped + length) // _PAGE) * _PAGE if direct else length
        os.preadv(files[shard], [views[i][:wanted]], start - skipped)

    def read(pick: np.ndarray) -> None:
        for _ in pool.map(read_one, range(len(pick)), pick.tolist()):
            pass

    return read


def mapped_reader(store: Path, layer: str) -> Callable[[np.ndarray], object]:
    """Rows copied out of a memory map of each shard."""
    found = FeatureStore.open(store).source().layer(layer)
    maps = [np.memmap(found.shard_path(i), np.uint8, "r") for i in range(found.n_shards)]
    stride, length = found.record.stride, found.row_bytes

    def read(pick: np.ndarray) -> None:
        for shard, slot in zip(*np.divmod(pick, found.slots), strict=True):
            maps[shard][slot * stride : slot * stride + length].tobytes()

    return read


def in_sequence(store: Path) -> float:
    """GB/s of reading the largest files of a store one after the other, 8 MiB at a time."""
    empty_cache(store)
    files = sorted((path for path in store.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)[-16:]
    buffer = bytearray(8 << 20)

    def read() -> None:
        for path in files:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return sum(path.stat().st_size for path in files) / seconds_of(read) / 1e9


def tensorstore_reader(store: Path, layer: str) -> Callable[[np.ndarray], object]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store / "bench" / layer)}}
    spec["context"] = {"file_io_concurrency": {"limit": 128}, "data_copy_concurrency": {"limit": 2}}
    array = tensorstore.open(spec, read=True).result()
    return lambda pick: array[pick].read().result()


def zarr_reader(store: Path, layer: str) -> Callable[[np.ndarray], object]:
    array = zarr.open_array(store / "bench" / layer, mode="r")
    return lambda pick: array.oindex[pick]


def stores(folder: Path) -> dict[str, Path]:
    """A store of random rows for each layer."""
    for layer, (shape, n_items) in LAYERS.items():
        fill_store(folder / f"{layer}.zarr", n_items, shape, 256, layer)
    return {layer: folder / f"{layer}.zarr" for layer in LAYERS}


def gather(folder: Path) -> list[Line]:
    """Random rows from the disk: against threads of pread and of O_DIRECT, and against other readers of the same files."""
    lines = []
    for layer, store in stores(folder).items():
        sequential = statistics.median(in_sequence(store) for _ in range(3))
        lines.append(Line(f"{layer}: files in sequence", "", f"{sequential:.2f} GB/s", sequential, "", True))
        for n, batches in ((96, 10), (1024, 3)):
            lines += gather_lines(store, layer, n, batches)
    return lines


def gather_lines(store: Path, layer: str, n: int, batches: int) -> list[Line]:
    """``batches`` of ``n`` rows by each reader in turn; only one batch by those that need seconds for it."""
    shape, n_items = LAYERS[layer]
    rng = np.random.default_rng(1)

    def measure(open_reader: Callable[[], Callable[[np.ndarray], object]], batches: int = batches) -> float:
        picks = np.split(rng.permutation(n_items)[: n * batches], batches)
        return cold_rate(store, open_reader, picks, 4 * int(np.prod(shape)))

    ours = partial(measure, partial(our_reader, store, layer, n))
    threads = {
        f"{'O_DIRECT' if direct else 'pread'}, {depth} threads": partial(pread_reader, store, layer, n, depth, direct)
        for direct in (False, True)
        for depth in DEPTHS
    }
    best = max(threads, key=lambda name: measure(threads[name]))
    others = {"a bare memory map": mapped_reader, "TensorStore": tensorstore_reader, "zarr-python": zarr_reader}
    return [
        compare(f"{layer}: {n} cold rows against {best}", ours, partial(measure, threads[best]), 0.9, "GB/s", 5),
        *(
            compare(
                f"{layer}: {n} cold rows against {name}",
                ours,
                partial(measure, partial(reader, store, layer), 1),
                1,
                "GB/s",
                3,
            )
            for name, reader in others.items()
        ),
    ]


def peers(folder: Path) -> list[Line]:
    """The same beside libraries that need a newer Python: that of the environment variable PEERS_PYTHON."""
    python = os.environ.get("PEERS_PYTHON")
    if not python:
        click.echo("  left out: PEERS_PYTHON names no Python that has annbatch and zarrs", err=True)
        return []
    lines = []
    for layer, store in stores(folder).items():
        shape, n_items = LAYERS[layer]
        for n in (96, 1024):

            def ours(store=store, layer=layer, n=n, n_items=n_items, shape=shape) -> float:
                picks = [np.random.default_rng(1).permutation(n_items)[:n]]
                return cold_rate(store, partial(our_reader, store, layer, n), picks, 4 * int(np.prod(shape)))

            for name in READERS:

                def theirs(name=name, store=store, layer=layer, n=n) -> float:
                    empty_cache(store)
                    arguments = [str(PEERS), name, str(store / "bench" / layer), str(n)]
                    return float(
                        subprocess.run([python, *arguments], check=True, capture_output=True, text=True).stdout
                    )

                lines.append(compare(f"{layer}: {n} cold rows against {name}", ours, theirs, 1, "GB/s", 3))
    return lines


def share(folder: Path) -> list[Line]:
    """Batches of 96 rows with a part of the store in memory, beside what the speeds at 0 % and at 100 % let expect."""
    lines = []
    rng = np.random.default_rng(2)
    for layer, store in stores(folder).items():
        shape, n_items = LAYERS[layer]
        gigabytes = 96 * 4 * int(np.prod(shape)) / 1e9
        rates = {}
        for percent in (100, 0, 75, 50, 25):
            empty_cache(store)
            found = FeatureStore.open(store).source().layer(layer)
            for shard in range(found.n_shards * percent // 100):
                found.shard_path(shard).read_bytes()
            read = our_reader(store, layer, 96)
            picks = np.split(rng.permutation(n_items)[: 96 * 60], 60)
            rates[percent] = gigabytes * len(picks) / sum(seconds_of(partial(read, pick)) for pick in picks)
            what, ours = f"{layer}: 96 rows, {percent} % of the store in memory", f"{rates[percent]:.2f} GB/s"
            del read  # what is mapped stays in the page cache
            if percent in (0, 100):
                lines.append(Line(what, ours, "", rates[percent], "", True))
                continue
            mixed = 100 / (percent / rates[100] + (100 - percent) / rates[0])
            ratio = rates[percent] / mixed
            what += ", against the mean of 0 % and 100 %"
            lines.append(Line(what, ours, f"{mixed:.2f} GB/s", ratio, "0.8", ratio >= 0.8))
    return lines


def opening(folder: Path) -> list[Line]:
    """Opening the rows of a store whose files are not in memory."""
    lines = []
    for layer, store in stores(folder).items():
        seconds = []
        for _ in range(5):
            empty_cache(store)
            start = time.perf_counter()
            FeatureStore.open(store).rows(layer)
            seconds.append(time.perf_counter() - start)
        shards = FeatureStore.open(store).source().layer(layer).n_shards
        lines.append(
            Line(f"{layer}: open {shards} cold shards", f"{statistics.median(seconds):.3f} s", "", 0, "", True)
        )
    return lines


def training(folder: Path) -> list[Line]:
    """An epoch of training from a cold store, against the slower of the same epoch from memory and of reading its rows alone."""
    found = stores(folder)
    return [
        epoch_line(found["maxp_5_3"], "maxp_5_3", "conv", steps=6),
        epoch_line(found["fc7-relu"], "fc7-relu", "similarity", steps=40),
        order_line(found["fc7-relu"], "fc7-relu", n_items=60_000),
    ]


def epoch_line(store: Path, layer: str, kind: str, steps: int) -> Line:
    shape, n_items = LAYERS[layer]
    rng, settings, none = np.random.default_rng(3), Settings(), np.empty(0, np.int64)
    items = rng.permutation(n_items)[: 3 * settings.batch_size * steps].reshape(-1, 3)
    examples = Examples(items, rng.integers(0, 3, len(items)), np.arange(len(items)), none, none)

    def opened() -> Features:
        empty_cache(store)
        return Features([FeatureStore.open(store).rows(layer)])

    def read(features: Features) -> float:
        """Triplets per second of reading each batch's rows."""
        batches = torch.from_numpy(items).split(settings.batch_size)
        return len(items) / seconds_of(lambda: [features.gather(batch.unique()) for batch in batches])

    def train(features: Features) -> float:
        head = draw_head(kind, shape, 0)
        head.standardise(torch.zeros(int(np.prod(shape))), 1.0)
        optimizer = torch.optim.Adam(head.parameters(), lr=5e-4, fused=True)
        return train_epoch(head, features, examples, settings, optimizer, 1).examples_per_second

    def slower() -> float:
        features = opened()
        return min(read(features), train(features))

    what = f"{layer}, {kind} head: an epoch from the disk, against the slower of memory and the disk alone"
    return compare(what, lambda: train(opened()), slower, 0.85, "triplets/s", 3)


def order_line(store: Path, layer: str, n_items: int) -> Line:
    """An epoch of who is who on each of the first items of a cold store, in order of blocks against at random."""
    items, none, faces = np.arange(n_items)[:, None], np.empty(0, np.int64), [str(face) for face in range(40)]
    examples = Examples(items, items[:, 0] % len(faces), items[:, 0], none, none)

    def epoch(order: str) -> float:
        empty_cache(store)
        head = draw_head("identity", LAYERS[layer][0], 0, faces=faces)
        head.standardise(torch.zeros(head.n_features), 1.0)
        optimizer = torch.optim.Adam(head.parameters(), lr=5e-4, fused=True)
        features = Features([FeatureStore.open(store).rows(layer)])
        return train_epoch(head, features, examples, Settings(order=order), optimizer, 1).examples_per_second

    what = f"{layer}, identity head: a cold epoch with --order blocks, against random order"
    return compare(what, lambda: epoch("blocks"), lambda: epoch("random"), None, "items/s", 3)


SECTIONS: dict[str, Callable[[Path], list[Line]]] = {
    "gather": gather,
    "peers": peers,
    "share": share,
    "opening": opening,
    "training": training,
}


@click.command()
@section_options(SECTIONS)
def main(only: tuple[str, ...], markdown: bool) -> None:
    """Compare rows that are not in memory with what the disk gives; nothing is asserted."""
    run_sections(SECTIONS, only, markdown)


if __name__ == "__main__":
    main()
