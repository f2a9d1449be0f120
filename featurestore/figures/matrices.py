"""Matrices of dissimilarities of items, and of similarities of layers."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.sparse import csr_array
from scipy.spatial.distance import squareform

from featurestore.errors import FeatureStoreError
from featurestore.figures.canvas import (
    DPI,
    GAP,
    LINE,
    ONE_COLUMN,
    PITCH,
    SMALL,
    TWO_COLUMNS,
    FilePath,
    canvas,
    check_range,
    shortened,
    text_of,
    widest,
)
from featurestore.figures.sheets import THUMBNAIL, Photographs, thumbnail
from featurestore.queries.blocks import computed, task
from featurestore.text import listing, natural_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CLUSTERED = 500  # items, above which an RDM is ordered by face
_WHOLE = 2000  # items, above which an RDM is drawn as means of blocks
_PIXELS = 1000  # of such a picture's side, at most
_NAMED, _PICTURED = 60, 40  # rows of an RDM that have names, or photographs
_MOST_RUNS = 150  # of one face each, above which their boundaries would hide the rest
_MOST_CELLS = 12  # layers on a side, above which numbers do not fit into the cells
_TICKS: dict[str, Any] = {"nbins": 5, "steps": [1, 2, 2.5, 5, 10]}  # of the colour bar
_NUMBER = "{x:.4g}"

_METRICS = {
    "cosine": "cosine distance",
    "correlation": "correlation distance (1 − r)",
    "euclidean": "Euclidean distance",
    "cityblock": "city-block distance",
}


def draw_rdm(rdm: xr.DataArray, path: FilePath, photographs: Photographs | None = None) -> Path:
    """An RDM (item, other), or a panel for each of its layers (layer, item, other) in one order of items and one colour scale.

    ``rdm`` holds finite numbers and is symmetric, as that of ``dissimilarity.rdm``. Up to 500 items are ordered by
    ``clustered_order``, more by face and view. Along the margins are the ``photographs`` (files by ``(face, view)`` or by the
    item's name) of up to 40 items, else the names of up to 60, where the panels are large enough for these; else a tick wherever
    the face changes, and as many faces' names as there is room for. Colours span the values off the diagonal. Of more than 2,000
    items the means of blocks of items are drawn, at most 1,000 a side, read block by block.

    FeatureStoreError also for photographs that are missing or cannot be read.
    """
    _check_rdm(rdm)
    layers = [str(name) for name in rdm["layer"].values] if "layer" in rdm.dims else []
    n, count = rdm.sizes["item"], max(1, len(layers))
    order, images = _ordered(rdm if layers else rdm.expand_dims("layer"))
    names = text_of(rdm["item"].values[order])
    faces = text_of(rdm["face_id"].values[order]) if "face_id" in rdm.coords else names
    width, kind = _rdm_design(n, count, photographs is not None)
    with canvas(path, width) as figure:
        columns, (low, high) = math.ceil(math.sqrt(count)), _off_diagonal(images)
        bar = _bar_width(low, high)
        if kind == "photographs":
            strip = _strip(photographs or {}, rdm["item"].values[order])
            panels = _panels(figure, bar, count, columns, n, None)
            _picture_margins(figure, panels, columns, strip)
        elif kind == "names":
            shown = shortened(names, _room_for_names(width, bar, columns, n))
            panels = _panels(figure, bar, count, columns, n, widest(shown) + 0.05)
            _name_margins(panels, columns, np.arange(n), shown)
        else:
            shown = shortened(faces, _room_for_names(width, bar, columns, 0))
            panels = _panels(figure, bar, count, columns, n, (widest(shown) if _runs(faces)[1:] else 0.0) + 0.25)
            _face_margins(panels, columns, shown, faces, "face" if faces is not names else "item")
        for axes, image in zip(panels, images, strict=True):
            _show_matrix(axes, image, n, "viridis", low, high)
        for axes, layer in zip(panels, layers if count > 1 else [], strict=False):
            axes.set_title(shortened([layer], axes.bbox.width / DPI, 8)[0], pad=3)
        label = _METRICS.get(str(rdm.attrs.get("metric")), "dissimilarity")
        _colour_bar(figure, panels, label, "min")  # the diagonal is below
    return Path(path)


def _check_rdm(rdm: xr.DataArray) -> None:
    if rdm.dims not in (("item", "other"), ("layer", "item", "other")):
        raise FeatureStoreError(
            f"`rdm` has the dimensions {listing(rdm.dims)}; give one with (item, other) or (layer, item, other), as "
            "`rdm()` makes it."
        )
    if rdm.sizes["item"] != rdm.sizes["other"] or rdm.sizes["item"] < 3 or not rdm.sizes.get("layer", 1):
        shape = " × ".join(f"{size:,}" for size in rdm.shape)
        raise FeatureStoreError(
            f"`rdm` is {shape}; give one with as many items as others, three at least, and a layer."
        )


def clustered_order(values: np.ndarray) -> np.ndarray:
    """The order (n,) int64 of items in which similar ones are neighbours, of symmetric dissimilarities (n, n).

    Average linkage, with the leaves ordered so that the sum of dissimilarities of neighbours is the smallest that the tree allows
    (Bar-Joseph et al. 2001): scipy's ``linkage(…, "average", optimal_ordering=True)``.
    """
    pairs = squareform((values + values.T) / 2, checks=False)
    return np.asarray(leaves_list(linkage(pairs, "average", optimal_ordering=True)), np.int64)


def _ordered(rdm: xr.DataArray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The order of items, and a picture (pixels, pixels) of each layer in this order."""
    n = rdm.sizes["item"]
    if n > _WHOLE:
        order = _order_by_face(rdm)
        images = [_block_means(matrix, order, math.ceil(n / _PIXELS)) for matrix in rdm]
    else:
        values = np.asarray(rdm.values, np.float64)
        _check_values(values)
        order = clustered_order(_mean_of_layers(values)) if n <= _CLUSTERED else _order_by_face(rdm)
        images = [matrix[np.ix_(order, order)] for matrix in values]
    if not all(np.isfinite(image).all() for image in images):
        raise FeatureStoreError(
            "`rdm` holds NaN or infinite numbers. Leave out the items that they belong to: `where`."
        )
    return order, images


def _check_values(values: np.ndarray) -> None:
    finite = values[np.isfinite(values)]
    tolerance = 1e-4 * float(np.abs(finite).max(initial=0))
    off = np.abs(values - values.transpose(0, 2, 1))
    if (off > tolerance).any():
        raise FeatureStoreError(
            f"`rdm` is not symmetric: two of its halves' numbers differ by {np.nanmax(off):.3g}. Give dissimilarities of the "
            "same items along both sides."
        )


def _mean_of_layers(values: np.ndarray) -> np.ndarray:
    """(n, n) of (layer, n, n): each layer counts the same, whatever its unit."""
    means = values.mean(axis=(1, 2), keepdims=True)
    mean: np.ndarray = (np.nan_to_num(values) / np.where(means > 0, means, 1)).mean(axis=0)
    return mean


def _order_by_face(rdm: xr.DataArray) -> np.ndarray:
    columns = [rdm[name].values for name in ("face_id", "view") if name in rdm.coords] or [rdm["item"].values]
    keys = [tuple(natural_order(str(part)) for part in parts) for parts in zip(*columns, strict=True)]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def _block_means(matrix: xr.DataArray, order: np.ndarray, block: int) -> np.ndarray:
    """Means of ``block`` × ``block`` items in this order, of a symmetric matrix read a row of its own blocks at a time."""
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) // block
    array = (matrix if matrix.chunks else matrix.chunk({"item": 1024, "other": 1024})).data
    square = array.chunks[0] == array.chunks[1]
    rows, columns = (np.split(place, np.cumsum(sizes)[:-1]) for sizes in array.chunks)
    counts = np.bincount(place)
    total = np.zeros((len(counts), len(counts)))
    for i, parts in enumerate(array.to_delayed()):
        first = i if square else 0  # the other half is the mirror of this one
        tasks = [task(_block_sums, parts[j], rows[i], columns[j]) for j in range(first, len(parts))]
        for j, (here, there, sums) in enumerate(computed(tasks), first):
            total[np.ix_(here, there)] += sums
            if square and j > i:
                total[np.ix_(there, here)] += sums.T
    means: np.ndarray = total / np.outer(counts, counts)
    return means


def _block_sums(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels that rows and columns belong to, each once, and the sums of their values."""
    (here, left), (there, right) = (np.unique(places, return_inverse=True) for places in (rows, columns))
    sums = (_membership(right) @ (_membership(left) @ np.asarray(values, np.float64)).T).T
    return here, there, sums


def _membership(groups: np.ndarray) -> csr_array:
    return csr_array((np.ones(len(groups)), (groups, np.arange(len(groups)))))


def _rdm_design(n: int, count: int, pictured: bool) -> tuple[float, str]:
    """The figure's width, and what stands along the margins of its panels."""
    columns = math.ceil(math.sqrt(count))
    widths = (ONE_COLUMN, TWO_COLUMNS) if count == 1 else (TWO_COLUMNS,)
    kinds = [("photographs", _PICTURED, THUMBNAIL)] * pictured + [("names", _NAMED, PITCH)]
    for kind, most, pitch in kinds:
        for width in widths:
            if n <= most and (width - 1.4) / columns / n >= pitch:
                return width, kind
    return widths[0], "faces"


def _room_for_names(width: float, bar: float, columns: int, n: int) -> float:
    """Inches beside the panels that names may take, if each panel has ``n`` rows of names."""
    return float(np.clip(width - bar - columns * n * PITCH, 0.7, 0.9 if width == ONE_COLUMN else 1.4))


def _panels(figure: "Figure", bar: float, count: int, columns: int, n: int, margin: float | None) -> "list[Axes]":
    """Square axes in a grid, with ``margin`` inches at the left and below (as much as a row of the n, if None).

    ``bar`` inches at the right are left for the colour bar. The figure is made as high as that takes.
    """
    width, rows, head = figure.get_figwidth(), math.ceil(count / columns), 0.2 if count > 1 else 0.06
    room = width - bar - GAP * (columns - 1)
    edge = (room - 0.04) / (columns + 1 / n) if margin is None else (room - margin) / columns
    left = room - columns * edge
    height = rows * (edge + head) + left
    figure.set_size_inches(width, height)
    panels = []
    for i in range(count):
        x, y = left + (i % columns) * (edge + GAP), height - (i // columns + 1) * (edge + head)
        axes = figure.add_axes((x / width, y / height, edge / width, edge / height))
        axes.set(xlim=(-0.5, n - 0.5), ylim=(n - 0.5, -0.5), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        panels.append(axes)
    return panels


def _outer(panels: "list[Axes]", columns: int) -> "Iterator[tuple[Axes, bool, bool]]":
    """Each panel, whether it is the first of its row, and whether the last of its column."""
    for i, axes in enumerate(panels):
        yield axes, i % columns == 0, i + columns >= len(panels)


def _name_margins(panels: "list[Axes]", columns: int, places: np.ndarray, names: list[str]) -> None:
    for axes, left, bottom in _outer(panels, columns):
        axes.tick_params(which="major", length=0, pad=2)
        if left:
            axes.set_yticks(places, names)
        if bottom:
            axes.set_xticks(places, names, rotation=90)


def _face_margins(panels: "list[Axes]", columns: int, shown: list[str], faces: list[str], what: str) -> None:
    """A tick wherever the face changes, and names of faces where there is room."""
    n, runs = len(faces), _runs(faces)
    pitch = panels[0].bbox.height / DPI / n
    named = _spread(runs, LINE * 0.8 / pitch) if len(runs) <= _MOST_RUNS else []
    _name_margins(panels, columns, np.array([(a + b - 1) / 2 for a, b in named]), [shown[a] for a, _ in named])
    label = what if named else f"{n:,} items by {what}" if what == "face" else f"{n:,} items"
    for axes, left, bottom in _outer(panels, columns):
        edges = [start - 0.5 for start, _ in runs[1:]] if len(runs) <= _MOST_RUNS else []
        if left:
            axes.set_yticks(edges, minor=True)
            axes.set_ylabel(label, labelpad=2)
        if bottom:
            axes.set_xticks(edges, minor=True)
            axes.set_xlabel(label, labelpad=2)


def _runs(faces: list[str]) -> list[tuple[int, int]]:
    """Where each run of the same face starts and ends."""
    starts = [i for i in range(len(faces)) if not i or faces[i] != faces[i - 1]]
    return list(zip(starts, [*starts[1:], len(faces)], strict=True))


def _spread(runs: list[tuple[int, int]], apart: float) -> list[tuple[int, int]]:
    """As many runs as can be named with their middles ``apart``, the longest first, in their order."""
    kept: list[tuple[int, int]] = []
    for start, end in sorted(runs, key=lambda run: (run[0] - run[1], run[0])):
        if all(abs((start + end) - sum(other)) / 2 >= apart for other in kept):
            kept.append((start, end))
    return sorted(kept)


def _picture_margins(figure: "Figure", panels: "list[Axes]", columns: int, strip: np.ndarray) -> None:
    n = len(strip)
    for axes, left, bottom in _outer(panels, columns):
        x, y, w, h = axes.get_position().bounds
        gaps = 0.04 / figure.get_figwidth(), 0.04 / figure.get_figheight()
        for there, box, pictures in (
            (left, (x - w / n - gaps[0], y, w / n, h), np.concatenate(strip)),
            (bottom, (x, y - h / n - gaps[1], w, h / n), np.concatenate(strip, axis=1)),
        ):
            if there:
                margin = figure.add_axes(box)
                margin.imshow(pictures, aspect="auto", interpolation="antialiased")
                margin.set_axis_off()


def _strip(photographs: Photographs, keys: Sequence[Any]) -> np.ndarray:
    """(n, 96, 96, 3) uint8 of items' photographs."""
    return np.stack([thumbnail(photographs, key, 96) for key in keys])


def _off_diagonal(images: list[np.ndarray]) -> tuple[float, float]:
    """The smallest and the largest value off the diagonal."""
    off = ~np.eye(len(images[0]), dtype=bool)
    return min(float(image[off].min()) for image in images), max(float(image[off].max()) for image in images)


def _show_matrix(axes: "Axes", image: np.ndarray, n: int, colours: str, low: float, high: float) -> None:
    # Few pixels are squares of their own; of many, those of the print show several each.
    shown = "nearest" if len(image) <= axes.bbox.height / 3 else "antialiased"
    extent = (-0.5, n - 0.5, n - 0.5, -0.5)
    axes.imshow(image, colours, vmin=low, vmax=high, extent=extent, aspect="auto", interpolation=shown)


def _bar_width(low: float, high: float) -> float:
    """Inches at the right of panels for a colour bar with its ticks and label."""
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(**_TICKS).tick_values(low, high)
    return 0.44 + widest([_NUMBER.format(x=tick) for tick in ticks if low <= tick <= high])


def _colour_bar(figure: "Figure", panels: "list[Axes]", label: str, extend: str = "neither") -> None:
    from matplotlib.ticker import MaxNLocator

    first = panels[0].get_position()
    right = max(axes.get_position().x1 for axes in panels) + 0.07 / figure.get_figwidth()
    axes = figure.add_axes((right, first.y0, 0.09 / figure.get_figwidth(), first.height))
    style: dict[str, Any] = {"ticks": MaxNLocator(**_TICKS), "format": _NUMBER, "extend": extend, "extendfrac": 0.03}
    bar = figure.colorbar(panels[0].images[0], axes, **style)
    bar.outline.set_linewidth(0.4)
    bar.set_label(shortened([label], axes.bbox.height / DPI, 8)[0], labelpad=3)


def draw_layer_matrix(matrix: pd.DataFrame | xr.DataArray, path: FilePath, label: str) -> Path:
    """A matrix (layer, other_layer) of similarities, such as correlations, in 0 … 1 or -1 … 1; ``label`` says what they are.

    Values are written into the cells of up to 12 layers. NaN is left blank. The order of layers is the matrix's.
    """
    table = matrix if isinstance(matrix, pd.DataFrame) else _frame_of(matrix)
    names, across = ([str(name) for name in index] for index in (table.index, table.columns))
    if names != across or not names:
        raise FeatureStoreError(
            f"`matrix` has the rows {listing(names)} and the columns {listing(across)}; give one with the same layers in the "
            "same order along both."
        )
    check_range(table, "matrix", list(table.columns), -1, 1)
    values = table.to_numpy(float)
    n, signed = len(names), bool((values < 0).any())
    width = ONE_COLUMN if n <= 7 or n > _NAMED else TWO_COLUMNS
    step = 1 if n <= _NAMED else math.ceil(n * PITCH / 2)
    with canvas(path, width) as figure:
        low, colours = (-1.0, "RdBu_r") if signed else (0.0, "viridis")
        bar = _bar_width(low, 1)
        shown = shortened(names, _room_for_names(width, bar, 1, n))
        panels = _panels(figure, bar, 1, 1, n, widest(shown) + 0.05)
        _show_matrix(panels[0], values, n, colours, low, 1.0)
        _name_margins(panels, 1, np.arange(0, n, step), shown[::step])
        if n <= _MOST_CELLS:
            _write_cells(panels[0], values)
        _colour_bar(figure, panels, label)
    return Path(path)


def _frame_of(matrix: xr.DataArray) -> pd.DataFrame:
    if matrix.dims != ("layer", "other_layer"):
        raise FeatureStoreError(
            f"`matrix` has the dimensions {listing(matrix.dims)}; give one with (layer, other_layer)."
        )
    return pd.DataFrame(matrix.values, matrix["layer"].values, matrix["other_layer"].values)


def _write_cells(axes: "Axes", values: np.ndarray) -> None:
    """Numbers in the cells: white on dark colours, black on light ones."""
    picture = axes.images[0]
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            light = float(np.dot(picture.to_rgba(value)[:3], (0.2126, 0.7152, 0.0722))) > 0.45  # of ITU-R BT.709
            text = f"{value:.2f}".replace("-", "−")
            axes.text(j, i, text, ha="center", va="center", fontsize=SMALL, color="black" if light else "white")
