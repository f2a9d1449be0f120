"""What the benchmarks share: both sides take turns, ratios, fresh processes, a table.

Each ratio is the median over rounds in which both sides take turns, so that a neighbour's noise falls on both.
"""

import gc
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pandas as pd
import torch

from featurestore.store.lock import store_lock
from featurestore.store.writer import SourceWriter

ROOT = Path(__file__).resolve().parents[2]
MAXP_5_3 = (512, 7, 7)


@dataclass(frozen=True)
class Line:
    """One comparison. ``ratio`` is ours over theirs, or a plain measurement; ``wanted`` what the project asks for, or empty."""

    what: str
    ours: str
    theirs: str
    ratio: float
    wanted: str
    reached: bool


def alternate(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> tuple[float, float, float]:
    """Medians of both rates, and the median of the ratios of neighbouring runs."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    a, b = zip(*pairs, strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in pairs)


def rate(work: Callable[[], object], amount: float, times: int = 1) -> float:
    """``amount`` per second."""
    start = time.perf_counter()
    for _ in range(times):
        work()
    return amount * times / (time.perf_counter() - start)


def compare(
    what: str, ours: Callable[[], float], theirs: Callable[[], float], wanted: float | None, unit: str, rounds: int = 5
) -> Line:
    a, b, ratio = alternate(ours, theirs, rounds)
    return Line(
        what,
        f"{a:,.2f} {unit}",
        f"{b:,.2f} {unit}",
        ratio,
        "" if wanted is None else f"{wanted:g}",
        ratio >= (wanted or 0),
    )


def fill_store(
    path: Path,
    n_items: int,
    shape: tuple[int, ...],
    slots: int,
    layer: str = "maxp_5_3",
    fresh: bool = False,
    source: str = "bench",
) -> np.ndarray:
    """A store with one layer of random rows, written by our own writer; returns a shard's worth of rows.

    The same rows are in every shard, or ``fresh`` ones, not below zero as after a ReLU.
    """
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((slots, int(np.prod(shape))), np.float32)
    with store_lock(path, "benchmark"):
        writer = SourceWriter(
            path, source, {"backbone": "none", "weights": "seed:0", "recipe": {}, "precision": "fp32"}
        )
        writer.add_layer(layer, shape, "float32", "none", slots)
        for shard in range(n_items // slots):
            if fresh:
                rows = np.maximum(rng.standard_normal(rows.shape, np.float32), 0)
            shard_writer = writer.open_shard(layer, shard, end=slots)
            shard_writer.write(range(slots), rows)
            shard_writer.commit()
        numbers = np.arange(n_items)
        faces = np.array([f"n{i:06d}" for i in numbers // 100], object)
        views = np.array([f"{i:04d}_01" for i in numbers % 100], object)
        hashes = np.array([f"{i:064x}" for i in numbers], object) if fresh else np.full(n_items, "0" * 64, object)
        writer.append(
            pd.DataFrame(
                {"face_id": faces, "view": views, "path": faces + "/" + views + ".jpg", "image_sha256": hashes}
            )
        )
        writer.publish()
    return rows


def empty_cache(store: Path) -> None:
    """Drop what the page cache holds of a store's files. Nothing may map them."""
    gc.collect()
    for path in store.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def peak_anonymous(work: Callable[[], object]) -> int:
    """Largest RssAnon (bytes) while ``work`` runs, sampled every 10 ms."""
    peak, done = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            text = Path("/proc/self/status").read_text()
            peak = max(peak, int(text.split("RssAnon:")[1].split()[0]) * 1024)
            done.wait(0.01)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return peak


def in_fresh_process(module: str, arguments: list[str]) -> str:
    """Standard output of ``python -m module …``."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def show(lines: list[Line], markdown: bool) -> None:
    rows = [("what", "ours", "theirs", "ratio", "wanted", "")]
    for line in lines:
        plain = line.wanted == "" or line.wanted.startswith("<")
        rows.append(
            (
                line.what,
                line.ours,
                line.theirs,
                "" if plain else f"{line.ratio:.2f}",
                line.wanted,
                ("ok" if line.reached else "SHORT") if line.wanted else "",
            )
        )
    click.echo(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        err=True,
    )
    if markdown:
        for i, row in enumerate(rows):
            click.echo("| " + " | ".join(row) + " |")
            if i == 0:
                click.echo("|---" * len(row) + "|")
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def section_options(sections: Mapping[str, object]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``--only`` and ``--markdown``, the arguments ``only`` and ``markdown`` of ``run_sections``."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        only = click.option("--only", multiple=True, type=click.Choice(list(sections)), help="Only these sections.")
        return only(click.option("--markdown", is_flag=True, help="Print a Markdown table.")(function))

    return add


def run_sections(sections: Mapping[str, Callable[[Path], list[Line]]], only: Sequence[str], markdown: bool) -> None:
    """Run sections one by one, each in a folder of its own that goes again, and show their lines as they come, then all."""
    lines: list[Line] = []
    for name in only or sections:
        click.echo(f"… {name}", err=True)
        with tempfile.TemporaryDirectory(dir=ROOT / "store") as folder:
            found = sections[name](Path(folder))
        for line in found:
            click.echo(f"  {line.what}: {line.ours} {line.theirs} {line.ratio:.2f}", err=True)
        lines += found
    show(lines, markdown)
