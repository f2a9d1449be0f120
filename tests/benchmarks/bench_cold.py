"""Measure rows that are not in memory beside what the disk gives, both sides in one run.

python -m tests.benchmarks.bench_cold                  # everything, about 10 minutes and 4 GB of disk
python -m tests.benchmarks.bench_cold --only gather    # one section

Before every reading the page cache is emptied of the store's files (``posix_fadvise``, once nothing maps them), and no row is
read twice, so that every row comes from the disk: ``share`` shows what it is when they do not.
"""

import gc
import mmap
import os
import statistics
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
from tests.benchmarks.measure import MAXP_5_3, Line, compare, fill_store, run_sections

LAYERS = {"maxp_5_3": (MAXP_5_3, 20_480), "fc7-relu": ((4096,), 65_536)}  # shape of a row, items
DEPTHS = (8, 32)  # threads that read side by side
_PAGE = mmap.PAGESIZE


def empty_cache(store: Path) -> None:
    """Drop what the page cache holds of a store's files. Nothing may map them."""
    gc.collect()
    for path in store.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


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
    rng = np.random.default_rng(1)
    for layer, store in stores(folder).items():
        shape, n_items = LAYERS[layer]
        row = 4 * int(np.prod(shape))
        sequential = statistics.median(in_sequence(store) for _ in range(3))
        lines.append(Line(f"{layer}: files in sequence", "", f"{sequential:.2f} GB/s", sequential, "<", True))
        for n, batches in ((96, 10), (1024, 3)):

            def measure(
                open_reader: Callable,
                n: int = n,
                k: int = batches,
                store: Path = store,
                row: int = row,
                n_items: int = n_items,
            ) -> float:
                picks = np.split(rng.permutation(n_items)[: n * k], k)
                return cold_rate(store, open_reader, picks, row)

            ours = partial(measure, partial(our_reader, store, layer, n))
            peers: dict[str, Callable[[], float]] = {
                f"{'O_DIRECT' if direct else 'pread'}, {threads} threads": partial(
                    measure, partial(pread_reader, store, layer, n, threads, direct)
                )
                for direct in (False, True)
                for threads in DEPTHS
            }
            best = max(peers, key=lambda name: peers[name]())
            lines.append(compare(f"{layer}: {n} cold rows against {best}", ours, peers[best], 0.9, "GB/s", 5))
            others = (
                ("a bare memory map", mapped_reader),
                ("TensorStore", tensorstore_reader),
                ("zarr-python", zarr_reader),
            )
            for name, reader in others:
                few = partial(measure, partial(reader, store, layer), k=1)
                lines.append(compare(f"{layer}: {n} cold rows against {name}", ours, few, 1, "GB/s", 3))
    return lines


def share(folder: Path) -> list[Line]:
    """Batches of 96 rows with a part of the store in memory; 100 % in memory is what the others are compared with."""
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
            mixed = 100 / (percent / rates[100] + (100 - percent) / rates[0]) if 0 in rates else rates[percent]
            ratio = rates[percent] / mixed
            lines.append(
                Line(f"{layer}: 96 rows, {percent} % of the store in memory, against the mean of 0 % and 100 %",
                     f"{rates[percent]:.2f} GB/s", f"{mixed:.2f} GB/s", ratio, "0.8", ratio >= 0.8)
            )  # fmt: skip
            del read
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
            Line(f"{layer}: open {shards} cold shards", f"{statistics.median(seconds):.3f} s", "", 0, "<", True)
        )
    return lines


def training(folder: Path) -> list[Line]:
    """An epoch of training from a cold store, against the slower of the same epoch from memory and of reading its rows alone."""
    lines = []
    for (layer, store), (kind, batch, steps) in zip(
        stores(folder).items(), (("conv", 256, 6), ("similarity", 256, 40)), strict=True
    ):
        shape, n_items = LAYERS[layer]
        rng = np.random.default_rng(3)
        items = rng.permutation(n_items)[: 3 * batch * steps].reshape(-1, 3)
        none = np.empty(0, np.int64)
        examples = Examples(items, rng.integers(0, 3, len(items)), np.arange(len(items)), none, none)
        settings = Settings(batch_size=batch)

        def epoch(
            cold: bool,
            store: Path = store,
            layer: str = layer,
            kind: str = kind,
            shape: tuple = shape,
            settings: Settings = settings,
            examples: Examples = examples,
        ) -> float:
            empty_cache(store)
            rows = FeatureStore.open(store).rows(layer)
            features, head = Features([rows]), draw_head(kind, shape, 0)
            if head.wants_statistics:
                head.standardise(torch.zeros(int(np.prod(shape))), 1.0)
            optimizer = torch.optim.Adam(head.parameters(), lr=5e-4, fused=True)
            if not cold:
                read_all(features, examples)
            return train_epoch(head, features, examples, settings, optimizer, 1).examples_per_second

        def reading(store: Path = store, layer: str = layer, examples: Examples = examples) -> float:
            empty_cache(store)
            features = Features([FeatureStore.open(store).rows(layer)])
            return len(examples.items) / seconds_of(partial(read_all, features, examples))

        def read_all(features: Features, examples: Examples, batch: int = batch) -> None:
            for part in torch.from_numpy(examples.items).split(batch):
                features.gather(part.unique())

        def slower(epoch: Callable = epoch, reading: Callable = reading) -> float:
            return min(epoch(cold=False), reading())

        what = f"{layer}, {kind} head: an epoch from the disk, against the slower of memory and the disk alone"
        lines.append(compare(what, partial(epoch, True), slower, 0.85, "triplets/s", 3))
    return lines


SECTIONS: dict[str, Callable[[Path], list[Line]]] = {
    "gather": gather,
    "share": share,
    "opening": opening,
    "training": training,
}


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Only these sections.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
def main(only: tuple[str, ...], markdown: bool) -> None:
    """Compare rows that are not in memory with what the disk gives; nothing is asserted."""
    run_sections(SECTIONS, only, markdown)


if __name__ == "__main__":
    main()
