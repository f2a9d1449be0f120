"""Questions to a store beside what people do today: the same numbers, in one run, each side in a process of its own.

python -m tests.benchmarks.bench_queries                 # everything, about 15 minutes on two cores
python -m tests.benchmarks.bench_queries --only rdm      # one section
python -m tests.benchmarks.bench_queries --markdown      # the table as docs/benchmarks.md shows it

Peers that are not installed (rsatoolbox, faiss-cpu) are left out, and said to be.
"""

import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import dask
import numpy as np
import pandas as pd
import xarray as xr

from featurestore import FeatureStore
from featurestore.queries import compare_layers, mean, neighbours, rdm
from featurestore.queries.blocks import beside_this_program
from featurestore.queries.output import write_result
from featurestore.text import human_bytes
from tests.benchmarks.measure import Line, fill_store, in_fresh_process, peak_anonymous, run_sections, section_options

N, FC7 = 20_000, (4096,)
N_MAPS, MAPS = 5_000, (512, 7, 7)
ROUNDS = 2
_LAYERS = [f"layer_{i}" for i in range(8)]


def _rows(store: str, layer: str) -> np.ndarray:
    """All of a layer in memory, as people have it."""
    rows = FeatureStore.open(store).rows(layer)
    return rows.gather(range(len(rows))).flatten(1).numpy()


def _ours_rdm(store: str, layer: str, metric: str, cap: str, out: str) -> np.ndarray:
    matrix = rdm(FeatureStore.open(store), layer, metric=metric, memory=beside_this_program(cap))
    shutil.rmtree(out, ignore_errors=True)
    write_result(matrix, Path(out))
    return np.asarray(xr.open_zarr(out)["dissimilarity"][:5, :50])


def _numpy_rdm(store: str, layer: str) -> np.ndarray:
    rows = _rows(store, layer)
    start = time.perf_counter()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    matrix = 1 - rows @ rows.T
    _numpy_rdm.seconds = time.perf_counter() - start  # type: ignore[attr-defined]  # reading is not counted
    return matrix[:5, :50]


def _rsatoolbox_rdm(store: str, layer: str) -> np.ndarray:
    import rsatoolbox

    rows = _rows(store, layer)
    start = time.perf_counter()
    dissimilarities = rsatoolbox.rdm.calc_rdm(rsatoolbox.data.Dataset(rows), method="correlation")
    matrix = dissimilarities.get_matrices()[0]
    _rsatoolbox_rdm.seconds = time.perf_counter() - start  # type: ignore[attr-defined]
    return np.asarray(matrix[:5, :50])


def _ours_nearest(store: str, layer: str, cap: str) -> np.ndarray:
    table = neighbours(FeatureStore.open(store), layer, k=10, memory=beside_this_program(cap))
    return table["dissimilarity"].to_numpy()[:500]


def _unit(store: str, layer: str) -> np.ndarray:
    rows = _rows(store, layer)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def _numpy_nearest(store: str, layer: str) -> np.ndarray:
    rows = _unit(store, layer)
    start = time.perf_counter()
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -np.inf)
    best = np.argpartition(-similarity, 10, axis=1)[:, :10]
    values = np.sort(1 - np.take_along_axis(similarity, best, 1), axis=1)
    _numpy_nearest.seconds = time.perf_counter() - start  # type: ignore[attr-defined]
    return values.ravel()[:500]


def _faiss_nearest(store: str, layer: str) -> np.ndarray:
    import faiss

    rows = _unit(store, layer)
    start = time.perf_counter()
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    similarity, _ = index.search(rows, 11)
    _faiss_nearest.seconds = time.perf_counter() - start  # type: ignore[attr-defined]
    return (1 - similarity[:, 1:]).ravel()[:500]


def _ours_cka(store: str, cap: str) -> np.ndarray:
    return compare_layers(FeatureStore.open(store), memory=beside_this_program(cap)).to_numpy()


def _ours_mean(store: str, layer: str) -> np.ndarray:
    return mean(FeatureStore.open(store), layer, by="view").values.ravel()[:1000]


def _xarray_mean(store: str, layer: str) -> np.ndarray:
    (source,) = FeatureStore.open(store).sources
    dataset = xr.open_zarr(Path(store) / source)
    return dataset[layer].groupby(dataset["view"].compute()).mean().values.ravel()[:1000]


_SIDES: dict[str, Callable[..., np.ndarray]] = {
    name.removeprefix("_"): function
    for name, function in list(globals().items())
    if name.startswith(("_ours_", "_numpy_", "_rsatoolbox_", "_faiss_", "_xarray_"))
}


def _measure(side: str, *arguments: object) -> dict[str, Any]:
    """Seconds, peak anonymous bytes, and a few numbers of the result, in a fresh process."""
    return json.loads(in_fresh_process("tests.benchmarks.bench_queries", ["--side", side, *map(str, arguments)]))


def _run_side(side: str, arguments: list[str]) -> None:
    found: list[np.ndarray] = []
    function = _SIDES[side]
    start = time.perf_counter()
    peak = peak_anonymous(lambda: found.append(function(*arguments)))
    seconds = getattr(function, "seconds", time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "peak": peak, "numbers": found[0].astype(float).tolist()}))


def _beside(
    what: str, n: int, ours: list[object], theirs: list[object], wanted: float, n_rounds: int = ROUNDS
) -> tuple[Line, list[dict[str, Any]]]:
    """Both sides in turn; ratio of speeds, the median of rounds."""
    rounds = [(_measure(*map(str, ours)), _measure(*map(str, theirs))) for _ in range(n_rounds)]
    for mine, other in rounds:
        np.testing.assert_allclose(mine["numbers"], other["numbers"], atol=3e-6, rtol=1e-4)
    ratio = float(np.median([other["seconds"] / mine["seconds"] for mine, other in rounds]))
    speeds = [n / float(np.median([pair[i]["seconds"] for pair in rounds])) for i in range(2)]
    peaks = [human_bytes(max(pair[i]["peak"] for pair in rounds)) for i in range(2)]
    texts = [f"{speed:,.0f} items/s, {peak}" for speed, peak in zip(speeds, peaks, strict=True)]
    return Line(what, texts[0], texts[1], ratio, f"{wanted:.2g}", ratio >= wanted), [
        pair[i] for pair in rounds for i in (0, 1)
    ]


def _installed(name: str) -> bool:
    if importlib.util.find_spec(name):
        return True
    click.echo(f"left out: {name} is not installed", err=True)
    return False


def _under(what: str, peak: int, cap: int) -> Line:
    return Line(what, human_bytes(peak), human_bytes(cap), peak / cap, "≤ 1", peak <= cap)


def section_rdm(folder: Path) -> list[Line]:
    """An RDM of fc7-relu larger than its cap, and one of maps, beside NumPy and rsatoolbox."""
    fill_store(folder / "fc7.zarr", N, FC7, 500, "fc7-relu", fresh=True)
    ours: list[object] = ["ours_rdm", folder / "fc7.zarr", "fc7-relu", "cosine", "1GiB", folder / "fc7-rdm.zarr"]
    line, measured = _beside(
        f"RDM of {N:,} × fc7-relu under 1 GiB, against NumPy with all in memory",
        N,
        ours,
        ["numpy_rdm", folder / "fc7.zarr", "fc7-relu"],
        1 / 1.3,
    )
    lines = [line, _under("its anonymous memory, beside the cap", max(each["peak"] for each in measured[::2]), 1 << 30)]
    fill_store(folder / "maps.zarr", N_MAPS, MAPS, 250, fresh=True)
    ours = ["ours_rdm", folder / "maps.zarr", "maxp_5_3", "correlation", "1GiB", folder / "maps-rdm.zarr"]
    if _installed("rsatoolbox"):
        line, measured = _beside(
            f"RDM of {N_MAPS:,} × maxp_5_3 under 1 GiB, against rsatoolbox",
            N_MAPS,
            ours,
            ["rsatoolbox_rdm", folder / "maps.zarr", "maxp_5_3"],
            1,
            n_rounds=1,  # it takes minutes
        )
        mine, theirs = (max(each["peak"] for each in measured[i::2]) for i in range(2))
        lines += [
            line,
            Line(
                "its anonymous memory",
                human_bytes(mine),
                human_bytes(theirs),
                mine / theirs,
                "≤ 0.33",
                3 * mine <= theirs,
            ),
        ]
    return lines


def section_nearest(folder: Path) -> list[Line]:
    """The ten nearest of all."""
    fill_store(folder / "fc7.zarr", N, FC7, 500, "fc7-relu", fresh=True)
    ours: list[object] = ["ours_nearest", folder / "fc7.zarr", "fc7-relu", "1GiB"]
    peers = [("numpy", "the product in memory")] + [("faiss", "faiss-cpu's flat index")] * _installed("faiss")
    return [
        _beside(
            f"10 nearest of all {N:,} under 1 GiB, against {what}",
            N,
            ours,
            [f"{peer}_nearest", folder / "fc7.zarr", "fc7-relu"],
            1 / 1.5,
        )[0]
        for peer, what in peers
    ]


def section_cka(folder: Path) -> list[Line]:
    """CKA of eight layers, which in memory would take all of them."""
    for i, layer in enumerate(_LAYERS):
        fill_store(folder / "layers.zarr", N, FC7, 500, layer, fresh=True, source=f"bench-{i}")
    found = _measure("ours_cka", folder / "layers.zarr", "2GiB")
    ours, peak = f"{found['seconds']:.0f} s, {human_bytes(found['peak'])}", found["peak"]
    whole = human_bytes(len(_LAYERS) * N * FC7[0] * 4)
    what = f"linear CKA of 8 layers × {N:,} items under 2 GiB, beside the layers' size"
    return [Line(what, ours, whole, peak / (2 << 30), "≤ 1 of the cap", peak <= 2 << 30)]


def section_mean(folder: Path) -> list[Line]:
    """Mean activation by view."""
    fill_store(folder / "maps.zarr", N_MAPS, MAPS, 250, fresh=True)
    arguments: list[object] = [folder / "maps.zarr", "maxp_5_3"]
    return [
        _beside(
            f"mean of {N_MAPS:,} × maxp_5_3 by view, against xarray.open_zarr",
            N_MAPS,
            ["ours_mean", *arguments],
            ["xarray_mean", *arguments],
            4,
        )[0]
    ]


def section_memory(folder: Path) -> list[Line]:
    """Ten times the items, from where blocks have their full size: fewer items take less."""
    peaks = []
    for n in (4_096, 40_960):
        fill_store(folder / f"{n}.zarr", n, FC7, 512, "fc7-relu", fresh=True)
        peaks.append(
            _measure("ours_rdm", folder / f"{n}.zarr", "fc7-relu", "cosine", "1GiB", folder / f"{n}-rdm.zarr")["peak"]
        )
    few, many = peaks
    what = "anonymous memory of an RDM written to Zarr at 10 × the items"
    return [Line(what, human_bytes(many), human_bytes(few), many / few, "≤ 1.1", many <= 1.1 * few)]


SECTIONS: dict[str, Callable[[Path], list[Line]]] = {
    name.removeprefix("section_"): function for name, function in list(globals().items()) if name.startswith("section_")
}


@click.command()
@section_options(SECTIONS)
@click.option("--side", hidden=True)
@click.argument("arguments", nargs=-1)
def main(only: tuple[str, ...], markdown: bool, side: str | None, arguments: tuple[str, ...]) -> None:
    """Compare queries with what people do; nothing is asserted but that the numbers are the same."""
    if side:
        _run_side(side, list(arguments))
        return
    click.echo(f"NumPy {np.__version__}, dask {dask.__version__}, pandas {pd.__version__}, {sys.platform}", err=True)
    run_sections(SECTIONS, only, markdown)


if __name__ == "__main__":
    main()
