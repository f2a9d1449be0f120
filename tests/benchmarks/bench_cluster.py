"""Measure the pass in many processes beside the pass in one, both sides in one run.

python -m tests.benchmarks.bench_cluster                             # everything, some minutes
python -m tests.benchmarks.bench_cluster --only many --photographs 1000  # one section, shorter

``many`` writes small photographs and sends them through a small network, to show what the scheduler and the tasks cost.
Photographs per second are as the command prints them: without the time in which the network is loaded.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import click
import cv2
import numpy as np
import torch
from distributed import Client

from featurestore.caching.cluster import ClusterPass
from featurestore.caching.job import CachingRequest, prepare_job
from featurestore.caching.planning import make_plan
from featurestore.caching.run import Elsewhere, Summary, cache_layers
from featurestore.cluster import cores, local_cluster
from featurestore.memory import keep_freed_memory
from featurestore.photos.keys import find_faces
from featurestore.store.lock import store_lock
from tests.benchmarks.measure import Line, compare, run_sections
from tests.heads.tiny_network import NAME, RECIPE

_SAMPLED = 0.05  # seconds


def write_photographs(folder: Path, n: int, side: int) -> Path:
    """``n`` PNGs of noise, 100 to a face."""
    rng = np.random.default_rng(0)
    for i in range(n):
        path = folder / f"f{i // 100:05}" / f"{i % 100}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 255, (side, side, 3), np.uint8))
    return folder


def run_pass(
    images: Path, store: Path, layers: list[str], elsewhere: Elsewhere | None = None, **options: object
) -> Summary:
    request = CachingRequest(store, find_faces(images), layers, "random:0", device="cpu", **options)  # type: ignore[arg-type]
    job = prepare_job(request)
    with store_lock(store, "benchmark"):
        return cache_layers(job, make_plan(job), elsewhere=elsewhere)


@contextmanager
def passes(folder: Path, processes: int, threads: int, **options: object) -> Iterator[Callable[[], float]]:
    """A pass on a cluster of ``processes``, each time into a new store: photographs per second. 0: in this process."""
    numbers = count()

    def run(elsewhere: Elsewhere | None) -> float:
        torch.set_num_threads(threads)
        store = folder / f"{processes}-{threads}-{next(numbers)}.zarr"
        done = run_pass(folder / "photographs", store, elsewhere=elsewhere, **options)  # type: ignore[arg-type]
        return done.computed / done.seconds

    if not processes:
        yield partial(run, None)
        return
    with local_cluster(processes) as client:
        yield partial(run, ClusterPass(client, threads))


def one_worker(folder: Path) -> list[Line]:
    """VGG-Face to its first fully connected layer, 128 photographs in shards of 64."""
    write_photographs(folder / "photographs", 128, 200)
    options = {"layers": ["maxp_5_3", "fc7-relu"], "items_per_shard": 64}
    keep_freed_memory()
    threads = cores()
    with passes(folder, 1, threads, **options) as ours, passes(folder, 0, threads, **options) as theirs:
        what = f"a cluster of one process against none, {threads} threads"
        return [compare(what, ours, theirs, 0.95, "images/s", rounds=3)]


def two_workers(folder: Path) -> list[Line]:
    """The same with one thread each."""
    write_photographs(folder / "photographs", 128, 200)
    options = {"layers": ["maxp_3_3"], "items_per_shard": 16}
    with passes(folder, 2, 1, **options) as ours, passes(folder, 1, 1, **options) as theirs:
        return [compare("two processes against one, one thread each", ours, theirs, 1.8, "images/s", rounds=3)]


def many(folder: Path, n: int) -> list[Line]:
    """Small photographs through a small network: the scheduler's memory and the rate of tasks."""
    images = write_photographs(folder / "photographs", n, 24)
    (folder / "recipe.toml").write_text(RECIPE)
    options = {"backbone": NAME, "recipe": str(folder / "recipe.toml"), "batch_size": 64}
    with local_cluster(cores()) as client:
        scheduler = Scheduler(client)
        run_pass(
            write_photographs(folder / "few", 512, 24),
            folder / "few.zarr",
            ["descriptor"],
            ClusterPass(client, 1),
            **options,
        )
        with scheduler.watched():
            done = run_pass(images, folder / "s.zarr", ["descriptor"], ClusterPass(client, 1), **options)
    tasks = -(-n // 256)
    return [
        Line(
            f"{n:,} photographs, {cores()} processes",
            f"{done.computed / done.seconds:,.0f} images/s",
            "",
            0.0,
            "",
            True,
        ),
        Line(f"tasks, one for each of {tasks:,} shards", f"{tasks / done.seconds:,.1f} tasks/s", "", 0.0, "", True),
        Line(
            "memory that the process of command and scheduler takes more",
            f"{(scheduler.peak - scheduler.before) / 2**20:,.0f} MiB at most",
            f"{scheduler.before / 2**20:,.0f} MiB before",
            0.0,
            "",
            True,
        ),
        Line("tasks that the scheduler knew at once", f"{scheduler.tasks} at most", "", 0.0, "", True),
    ]


class Scheduler:
    """The scheduler's memory (bytes) and tasks while work runs, sampled. It runs in this process, with the client."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.before = self.peak = self.tasks = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        self.before = anonymous()
        done = threading.Event()

        def sample() -> None:
            while not done.wait(_SAMPLED):
                self.peak = max(self.peak, anonymous())
                self.tasks = max(self.tasks, len(self._client.cluster.scheduler.tasks))

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def anonymous() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


@click.command()
@click.option("--only", multiple=True, type=click.Choice(["one-worker", "two-workers", "many"]))
@click.option("--photographs", type=click.IntRange(1), default=100_000, show_default=True, help="Of the section many.")
@click.option("--markdown", is_flag=True)
def main(only: tuple[str, ...], photographs: int, markdown: bool) -> None:
    # The first one measures memory, which the others keep.
    sections = {"many": partial(many, n=photographs), "one-worker": one_worker, "two-workers": two_workers}
    started = time.perf_counter()
    run_sections(sections, only, markdown)
    click.echo(f"{time.perf_counter() - started:.0f} s", err=True)


if __name__ == "__main__":
    main()
