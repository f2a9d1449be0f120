"""Figures of query results at the width of one column of a journal (3.35 in) or two (7 in): .svg, or .png of 300 dpi.

They look the same whatever Matplotlib's settings are. Like all of Matplotlib they are not for several threads at once. Every
function writes ``path`` in one step and returns it; FeatureStoreError if Matplotlib is not installed (extra ``figures``), for
another ending of ``path``, and for results that it cannot draw. OSError is raised as writing does.
"""

import math
import os
from bisect import bisect_right
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
import xarray as xr
from PIL import Image, ImageOps
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.sparse import csr_array
from scipy.spatial.distance import squareform

from featurestore.errors import FeatureStoreError
from featurestore.files import replacing
from featurestore.photos.decode import ImageError, decode
from featurestore.queries.blocks import computed, task
from featurestore.text import listing, natural_order, near_matches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FilePath: TypeAlias = str | os.PathLike[str]
Photographs: TypeAlias = Mapping[tuple[str, str], FilePath] | Mapping[str, FilePath]

ONE_COLUMN, TWO_COLUMNS = 3.35, 7.0  # inches
_PAGE = 9.2  # inches: the height of a page's text
_DPI = 300
_SMALL = 7  # points: names, ticks and legends
_LINE = 0.125  # inches from one line of small text to the next
_PITCH = 0.093  # inches that a row with a name takes at least
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": _SMALL,
    "ytick.labelsize": _SMALL,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "legend.fontsize": _SMALL,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.fonttype": "none",
    "svg.hashsalt": "featurestore",
}
# Okabe & Ito (2008), "Color Universal Design", https://jfly.uni-koeln.de/color/, without the yellow, too pale for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")
_MOST_LINES = len(_COLOURS) * len(_DASHES)  # that differ in colour or dashes
_SAME, _OTHER = ((_COLOURS[i], _DASHES[i]) for i in range(2))

_CLUSTERED = 500  # items, above which an RDM is ordered by face
_WHOLE = 2000  # items, above which an RDM is drawn as means of blocks
_PIXELS = 1000  # of such a picture's side, at most
_NAMED, _PICTURED = 60, 40  # rows of an RDM that have names, or photographs
_MOST_RUNS = 150  # of one face each, above which their boundaries would hide the rest
_THUMBNAIL = 0.12  # inches, below which a photograph cannot be told from another
_MOST_NEIGHBOURS = 9
_MOST_CELLS = 12  # layers on a side, above which numbers do not fit into the cells

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
    names = _text_of(rdm["item"].values[order])
    faces = _text_of(rdm["face_id"].values[order]) if "face_id" in rdm.coords else names
    width, kind = _rdm_design(n, count, photographs is not None)
    with _canvas(path, width) as figure:
        columns, (low, high) = math.ceil(math.sqrt(count)), _off_diagonal(images)
        bar = _bar_width(low, high)
        if kind == "photographs":
            strip = _strip(photographs or {}, rdm["item"].values[order])
            panels = _panels(figure, bar, count, columns, n, None)
            _picture_margins(figure, panels, columns, strip)
        elif kind == "names":
            shown = _shortened(names, _room_for_names(width, bar, columns, n))
            panels = _panels(figure, bar, count, columns, n, _widest(shown) + 0.05)
            _name_margins(panels, columns, np.arange(n), shown)
        else:
            shown = _shortened(faces, _room_for_names(width, bar, columns, 0))
            panels = _panels(figure, bar, count, columns, n, (_widest(shown) if _runs(faces)[1:] else 0.0) + 0.25)
            _face_margins(panels, columns, shown, faces, "face" if faces is not names else "item")
        for axes, image in zip(panels, images, strict=True):
            _show_matrix(axes, image, n, "viridis", low, high)
        for axes, layer in zip(panels, layers if count > 1 else [], strict=False):
            axes.set_title(_shortened([layer], axes.bbox.width / _DPI, 8)[0], pad=3)
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
    kinds = [("photographs", _PICTURED, _THUMBNAIL)] * pictured + [("names", _NAMED, _PITCH)]
    for kind, most, pitch in kinds:
        for width in widths:
            if n <= most and (width - 1.4) / columns / n >= pitch:
                return width, kind
    return widths[0], "faces"


def _room_for_names(width: float, bar: float, columns: int, n: int) -> float:
    """Inches beside the panels that names may take, if each panel has ``n`` rows of names."""
    return float(np.clip(width - bar - columns * n * _PITCH, 0.7, 0.9 if width == ONE_COLUMN else 1.4))


_GAP = 0.1  # inches between panels


def _panels(figure: "Figure", bar: float, count: int, columns: int, n: int, margin: float | None) -> "list[Axes]":
    """Square axes in a grid, with ``margin`` inches at the left and below (as much as a row of the n, if None).

    ``bar`` inches at the right are left for the colour bar. The figure is made as high as that takes.
    """
    width, rows, head = figure.get_figwidth(), math.ceil(count / columns), 0.2 if count > 1 else 0.06
    room = width - bar - _GAP * (columns - 1)
    edge = (room - 0.04) / (columns + 1 / n) if margin is None else (room - margin) / columns
    left = room - columns * edge
    height = rows * (edge + head) + left
    figure.set_size_inches(width, height)
    panels = []
    for i in range(count):
        x, y = left + (i % columns) * (edge + _GAP), height - (i // columns + 1) * (edge + head)
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
    pitch = panels[0].bbox.height / _DPI / n
    named = _spread(runs, _LINE * 0.8 / pitch) if len(runs) <= _MOST_RUNS else []
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
    return np.stack([_photograph(photographs, key, 96) for key in keys])


def _photograph(photographs: Photographs, key: Hashable, side: int) -> np.ndarray:
    """(side, side, 3) uint8 of a photograph by its ``(face, view)`` or its name, its longer side as long as that."""
    name = _name_of(key)
    found = {_name_of(each): file for each, file in photographs.items()}
    if name not in found:
        raise FeatureStoreError(f"`photographs` has none of {name!r}. {near_matches(name, list(found)[:10_000])}")
    try:
        picture = decode(Path(found[name]).read_bytes())
    except (OSError, ImageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FeatureStoreError(f"the photograph {found[name]} of {name!r} cannot be read: {reason}.") from None
    image = ImageOps.pad(Image.fromarray(picture), (side, side), Image.Resampling.LANCZOS, color="white")
    return np.asarray(image)


def _off_diagonal(images: list[np.ndarray]) -> tuple[float, float]:
    """The smallest and the largest value off the diagonal."""
    off = ~np.eye(len(images[0]), dtype=bool)
    return min(float(image[off].min()) for image in images), max(float(image[off].max()) for image in images)


def _show_matrix(axes: "Axes", image: np.ndarray, n: int, colours: str, low: float, high: float) -> None:
    fine = (
        len(image) <= axes.bbox.height / 3
    )  # then pixels are squares of their own, else those of the print show several
    extent = (-0.5, n - 0.5, n - 0.5, -0.5)
    axes.imshow(
        image,
        colours,
        vmin=low,
        vmax=high,
        extent=extent,
        aspect="auto",
        interpolation="nearest" if fine else "antialiased",
    )


_TICKS: dict[str, Any] = {"nbins": 5, "steps": [1, 2, 2.5, 5, 10]}  # of the colour bar
_NUMBER = "{x:.4g}"


def _bar_width(low: float, high: float) -> float:
    """Inches at the right of panels for a colour bar with its ticks and label."""
    from matplotlib.ticker import MaxNLocator

    ticks = MaxNLocator(**_TICKS).tick_values(low, high)
    return 0.44 + _widest([_NUMBER.format(x=tick) for tick in ticks if low <= tick <= high])


def _colour_bar(figure: "Figure", panels: "list[Axes]", label: str, extend: str = "neither") -> None:
    from matplotlib.ticker import MaxNLocator

    first = panels[0].get_position()
    right = max(axes.get_position().x1 for axes in panels) + 0.07 / figure.get_figwidth()
    axes = figure.add_axes((right, first.y0, 0.09 / figure.get_figwidth(), first.height))
    style: dict[str, Any] = {"ticks": MaxNLocator(**_TICKS), "format": _NUMBER, "extend": extend, "extendfrac": 0.03}
    bar = figure.colorbar(panels[0].images[0], axes, **style)
    bar.outline.set_linewidth(0.4)
    bar.set_label(_shortened([label], axes.bbox.height / _DPI, 8)[0], labelpad=3)


def draw_neighbours(table: pd.DataFrame, photographs: Photographs, path: FilePath, most: int = 12) -> Path:
    """A sheet of the first ``most`` items of a table of ``neighbours``: the photograph of each, then those of its neighbours.

    Beneath are the neighbour's rank, name and dissimilarity (d). Nine neighbours are shown at most, the nearest. Frames are solid
    and blue where the face is the same, dashed and red where it is another; groups have no frames. ``photographs`` are files by
    ``(face, view)`` or ``face|view``, or by the group's name.
    """
    _check_table(table, "table", ["rank", "dissimilarity"])
    theirs = [str(name) for name in table.columns if str(name).startswith("neighbour_")]
    mine = [name.removeprefix("neighbour_") for name in theirs]
    if not theirs or not set(mine) <= set(table.columns):
        raise FeatureStoreError("`table` says of no neighbour who it is. Give one that `neighbours()` made.")
    if most < 1:
        raise FeatureStoreError(f"`most` {most} rows are none. Give 1 or more.")
    near = table[table["rank"] <= _MOST_NEIGHBOURS]
    queries = list(near.groupby(mine, sort=False))[:most]
    rows = [_sheet_row(query if len(mine) > 1 else query[0], group, theirs) for query, group in queries]
    with _canvas(path, TWO_COLUMNS if max(map(len, rows)) > 4 else ONE_COLUMN) as figure:
        axes, pitch, edge, lines = _sheet(figure, rows, "face_id" in mine)
        for y, cells in enumerate(rows):
            for x, (key, *texts) in enumerate(cells):
                frame = None if not x or "face_id" not in mine else _SAME if key[0] == cells[0][0][0] else _OTHER
                picture = _photograph(photographs, key, round(edge * _DPI))
                _cell(axes, (x, y), pitch, edge, picture, texts if lines == 2 else ["  ".join(texts)], lines, frame)
    return Path(path)


def _sheet_row(query: Hashable, group: pd.DataFrame, theirs: list[str]) -> list[tuple[Any, ...]]:
    """Of an item and of each of its neighbours: its key, and the texts beneath its photograph."""
    first = tuple(map(str, query)) if isinstance(query, tuple) else str(query)
    cells: list[tuple[Any, ...]] = [(first, _name_of(first))]
    columns = group[["rank", "dissimilarity", *theirs]].to_numpy(object)
    for rank, dissimilarity, *parts in columns:
        key = tuple(map(str, parts)) if len(parts) > 1 else str(parts[0])
        cells.append((key, f"{rank}. {_name_of(key)}", f"d = {dissimilarity:#.3g}"))
    return cells


_HEAD = 0.2  # inches of the sheet's legend
_SPACE = 0.12  # inches between the rows of a sheet


def _sheet(figure: "Figure", rows: list[list[tuple[Any, ...]]], framed: bool) -> "tuple[Axes, float, float, int]":
    """Axes in inches from the upper left, the distance of columns, the side of a photograph, and the lines beneath it."""
    from matplotlib.patches import Patch

    width, head = figure.get_figwidth(), _HEAD if framed else 0.0
    pitch = (width - _GAP) / max(map(len, rows))
    beneath = [_clean("  ".join(texts)) for cells in rows for _, *texts in cells]
    lines = 1 if _widest(beneath) < pitch - 0.04 else 2
    edge = min(pitch - 0.1, max(_THUMBNAIL, (_PAGE - head) / len(rows) - lines * _LINE - _SPACE))
    height = head + len(rows) * (edge + lines * _LINE + _SPACE)
    figure.set_size_inches(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height - head, -head))
    if framed:
        frames = [Patch(fill=False, edgecolor=colour, linestyle=dashes) for colour, dashes in (_SAME, _OTHER)]
        place: dict[str, Any] = {"loc": "upper center", "borderaxespad": 0.3, "ncols": 2, "handlelength": 2.6}
        figure.legend(frames, ["same face", "another face"], **place)
    return axes, pitch, edge, lines


def _cell(
    axes: "Axes",
    place: tuple[int, int],
    pitch: float,
    edge: float,
    picture: np.ndarray,
    beneath: list[str],
    lines: int,
    frame: tuple[str, Any] | None,
) -> None:
    """A photograph in its column and row, its text beneath, and its frame, if it has one, around it."""
    from matplotlib.patches import Rectangle

    x = (_GAP if place[0] else 0) + place[0] * pitch + (pitch - edge) / 2
    y = 0.05 + place[1] * (edge + lines * _LINE + _SPACE)
    axes.imshow(picture, extent=(x, x + edge, y + edge, y), aspect="auto", interpolation="nearest")
    for i, text in enumerate(_shortened(beneath, pitch - 0.04)):
        axes.text(x + edge / 2, y + edge + 0.04 + i * _LINE, text, ha="center", va="top", fontsize=_SMALL)
    if frame:
        colour, dashes = frame
        axes.add_patch(Rectangle((x, y), edge, edge, fill=False, edgecolor=colour, linestyle=dashes, linewidth=1.4))


def _name_of(key: Hashable) -> str:
    return "|".join(map(str, key)) if isinstance(key, tuple) else str(key)


def draw_roc(roc: pd.DataFrame, path: FilePath, areas: Mapping[str, str] | None = None) -> Path:
    """ROC curves of a table (layer, threshold, false_accepts, true_accepts), rates in 0 … 1, at most 28 layers.

    False accepts are on a logarithmic axis from the smallest rate that is not zero (1/n of n different pairs) to 1. ``areas`` has
    the text that the legend adds to a layer's name: the area under the curve and its interval. The grey line is where as many of
    the same face are refused as of others accepted.
    """
    _check_table(roc, "roc", ["layer", "false_accepts", "true_accepts"])
    _check_range(roc, "roc", ["false_accepts", "true_accepts"], 0, 1)
    curves = {str(layer): curve for layer, curve in roc.groupby("layer", sort=False)}
    if len(curves) > _MOST_LINES:
        raise FeatureStoreError(
            f"`roc` has {len(curves)} layers; {_MOST_LINES} curves can be told from one another. Choose some."
        )
    unknown = [name for name in areas or {} if name not in curves]
    if unknown:
        raise FeatureStoreError(f"`areas` has {unknown[0]!r}, no layer of `roc`. {near_matches(unknown[0], curves)}")
    positive = roc["false_accepts"][roc["false_accepts"] > 0]
    if not len(positive) or not positive.min() < 1:
        raise FeatureStoreError("`roc` has no rate of false_accepts between 0 and 1, so there is no curve to draw.")
    texts = [f"{name}  {areas[name]}" if areas and name in areas else name for name in curves] + ["equal error"]
    lines = math.ceil(len(texts) / 2) if len(texts) > 6 and max(map(_width, texts)) < 1.2 else len(texts)
    with _canvas(path, ONE_COLUMN) as figure:
        figure.set_size_inches(ONE_COLUMN, 2.6 + _LINE * lines)
        axes = _constrained(figure).subplots()
        _draw_curves(axes, curves, float(positive.min()))
        columns = math.ceil(len(texts) / lines)
        shown = _shortened(texts, (ONE_COLUMN - 0.2) / columns - 0.4)
        figure.legend(axes.lines, shown, loc="outside lower center", ncols=columns, handlelength=2.6, labelspacing=0.2)
    return Path(path)


def _draw_curves(axes: "Axes", curves: Mapping[str, pd.DataFrame], least: float) -> None:
    for i, curve in enumerate(curves.values()):
        points = curve.sort_values(["false_accepts", "true_accepts"])
        points = points[points["false_accepts"] > 0]
        axes.plot(
            points["false_accepts"], points["true_accepts"], color=_colour(i), linestyle=_DASHES[i % len(_DASHES)]
        )
    rates = np.geomspace(least, 1, 200)
    axes.plot(rates, 1 - rates, color="0.6", linewidth=0.8, zorder=1)
    axes.set(xscale="log", xlim=(least, 1), ylim=(0, 1.02), xlabel="false accept rate", ylabel="true accept rate")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")


def draw_invariance(table: pd.DataFrame, path: FilePath, ylabel: str = "mean dissimilarity") -> Path:
    """How dissimilar views are, of the same face and of different ones: a panel for each layer, with one scale.

    ``table``: layer, difference, same, same_low, same_high, other, other_low, other_high; intervals may be NaN. Differences of
    views that are numbers are degrees, drawn as lines with bands; others are categories, in the order of the table.
    """
    needed = ["layer", "difference", *(f"{kind}{end}" for kind in ("same", "other") for end in ("", "_low", "_high"))]
    _check_table(table, "table", needed)
    layers = list(dict.fromkeys(table["layer"]))
    numbers = pd.to_numeric(table["difference"], errors="coerce")
    numeric = bool(numbers.notna().all())
    names = [] if numeric else list(dict.fromkeys(map(str, table["difference"])))
    place = {name: i for i, name in enumerate(names)}
    x = numbers.astype(float) if numeric else table["difference"].map(lambda name: float(place[str(name)]))
    columns = _profile_columns(len(layers), len(names))
    rows = math.ceil(len(layers) / columns)
    with _canvas(path, ONE_COLUMN if len(layers) == 1 and len(names) <= 10 else TWO_COLUMNS) as figure:
        beneath = min(_widest(_shortened(names, 1.2)), 1.2) if names else 0.0
        high = float(np.clip((_PAGE - 0.7 - beneath) / rows, 0.9, 2.1 if len(layers) == 1 else 1.6))
        figure.set_size_inches(figure.get_figwidth(), rows * high + 0.7 + beneath)
        grid = _constrained(figure).subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for layer, axes in zip(layers, grid, strict=False):
            _draw_profile(axes, table.assign(x=x)[table["layer"] == layer].sort_values("x"), numeric)
            room = (figure.get_figwidth() - 0.6) / columns - 0.1
            axes.set_title(_shortened([str(layer)], room, 8)[0], pad=3)
        _finish_profiles(figure, grid, len(layers), columns, names, ylabel)
    return Path(path)


def _profile_columns(layers: int, names: int) -> int:
    """Panels to a row. Long names stand below the last row alone, so that one is full."""
    if names > 10:
        return 1
    return next(n for n in (3, 2, 1) if n <= layers and (not names or layers % n == 0))


def _draw_profile(axes: "Axes", rows: pd.DataFrame, numeric: bool) -> None:
    for kind, (colour, dashes), marker, shift in (("same", _SAME, "o", -0.1), ("other", _OTHER, "s", 0.1)):
        x, low, high = rows["x"], rows[f"{kind}_low"], rows[f"{kind}_high"]
        if numeric:
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(x, rows[kind], color=colour, linestyle=dashes, marker=marker)
        else:
            axes.vlines(x + shift, low, high, color=colour)
            axes.plot(x + shift, rows[kind], color=colour, linestyle="none", marker=marker)


def _finish_profiles(figure: "Figure", grid: Any, count: int, columns: int, names: list[str], ylabel: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for i, axes in enumerate(grid):
        axes.set_visible(i < count)
        axes.tick_params(labelbottom=count - columns <= i < count)
        if names:
            room = (figure.get_figwidth() - 0.6) / columns - 0.15
            _name_ticks(axes, names, room)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 1.5, 3, 4.5, 6, 9, 10]))
    figure.supxlabel("views" if names else "difference of views (degrees)", fontsize=8)
    figure.supylabel(_shortened([ylabel], figure.get_figheight() - 0.1, 8)[0], fontsize=8)
    figure.legend(
        grid[0].lines, ["same face", "different faces"], loc="outside upper center", ncols=2, handlelength=2.6
    )


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
    _check_range(table, "matrix", list(table.columns), -1, 1)
    values = table.to_numpy(float)
    n, signed = len(names), bool((values < 0).any())
    width = ONE_COLUMN if n <= 7 or n > _NAMED else TWO_COLUMNS
    step = 1 if n <= _NAMED else math.ceil(n * _PITCH / 2)
    with _canvas(path, width) as figure:
        low, colours = (-1.0, "RdBu_r") if signed else (0.0, "viridis")
        bar = _bar_width(low, 1)
        shown = _shortened(names, _room_for_names(width, bar, 1, n))
        panels = _panels(figure, bar, 1, 1, n, _widest(shown) + 0.05)
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
            axes.text(j, i, text, ha="center", va="center", fontsize=_SMALL, color="black" if light else "white")


def draw_rsa(table: pd.DataFrame, path: FilePath, ylabel: str = "Spearman correlation") -> Path:
    """Correlations of layers' RDMs with another one, with their intervals: a point for each layer, in the order of the table.

    ``table``: layer, spearman, spearman_low, spearman_high (NaN is left out), and if there is one, ceiling: the highest that the
    noise of the other RDM allows, a grey bar above each point.
    """
    _check_table(table, "table", ["layer", "spearman", "spearman_low", "spearman_high"])
    _check_range(table, "table", ["spearman"], -1, 1)
    if table["layer"].duplicated().any():
        twice = table["layer"][table["layer"].duplicated()].iloc[0]
        raise FeatureStoreError(f"`table` has the layer {twice!r} more than once. Choose the rows of one comparison.")
    x, names = np.arange(len(table)), [str(name) for name in table["layer"]]
    with _canvas(path, ONE_COLUMN if len(table) <= 20 else TWO_COLUMNS) as figure:
        width, (label,) = figure.get_figwidth(), _shortened([ylabel], 4, 8)
        axes = _constrained(figure).subplots()
        axes.axhline(0, color="0.6", linewidth=0.6, zorder=1)
        axes.vlines(x, table["spearman_low"], table["spearman_high"], color=_COLOURS[0])
        axes.plot(x, table["spearman"], "o", color=_COLOURS[0])
        axes.set(xlim=(-0.6, len(x) - 0.4), xlabel="layer", ylabel=label)
        beneath = _name_ticks(axes, names, width - 0.6)
        legend = 0.0
        if "ceiling" in table:
            bars = axes.hlines(table["ceiling"], x - 0.4, x + 0.4, color="0.55", linewidth=2.0)
            figure.legend([bars], ["noise ceiling"], loc="outside upper center")
            legend = 0.2
        figure.set_size_inches(width, max(2.1, _width(label, 8) + 0.6) + beneath + legend)
    return Path(path)


def _name_ticks(axes: "Axes", names: list[str], room: float) -> float:
    """Names along x, upright where they do not fit side by side in ``room`` inches. Returns the inches that they take below."""
    step = math.ceil(len(names) * _PITCH / room)
    shown = _shortened(names, 1.2)[::step]
    upright = _widest(shown) + 0.08 > room / len(shown)
    axes.set_xticks(range(0, len(names), step), shown, rotation=90 if upright else 0)
    return _widest(shown) if upright else _LINE


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


@contextmanager
def _canvas(path: FilePath, width: float) -> "Iterator[Figure]":
    """A figure of that width in inches, written to ``path`` at the end."""
    ending = Path(path).suffix.lower()
    if ending not in (".svg", ".png"):
        raise FeatureStoreError(f"a figure is drawn as .svg or .png, not as {Path(path).name!r}.")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise FeatureStoreError(
            f"drawing figures needs Matplotlib ({error}): pip install 'face-featurestore[figures]'."
        ) from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure((width, width), dpi=_DPI)
        yield figure
        metadata = {"Date": None} if ending == ".svg" else {"Software": None}
        with replacing(Path(path)) as partial:
            figure.savefig(partial, format=ending[1:], dpi=_DPI, metadata=metadata)


def _constrained(figure: "Figure") -> "Figure":
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03)
    return figure


def _check_table(table: pd.DataFrame, name: str, needed: list[str]) -> None:
    for column in needed:
        if column not in table:
            near = near_matches(column, map(str, table.columns)) if len(table.columns) else ""
            raise FeatureStoreError(
                f"`{name}` has no column {column!r}, and needs {listing(needed, len(needed))}. {near}".strip()
            )
    if not len(table):
        raise FeatureStoreError(f"`{name}` has no rows, so there is nothing to draw.")


def _check_range(table: pd.DataFrame, name: str, columns: Sequence[Any], low: float, high: float) -> None:
    """FeatureStoreError for what is no number, or below or above by more than rounding; NaN is let through."""
    for column in columns:
        values = pd.to_numeric(table[column], errors="coerce")
        wrong = table[column][(values.isna() & table[column].notna()) | (values < low - 1e-6) | (values > high + 1e-6)]
        if len(wrong):
            raise FeatureStoreError(f"`{name}` has {wrong.iloc[0]} as {column}; numbers of {low} to {high} are drawn.")


def _text_of(values: np.ndarray) -> list[str]:
    return [str(value) for value in values]


def _clean(text: str) -> str:
    """Without line breaks and what else cannot be printed; XML forbids some of it."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _width(text: str, size: float = _SMALL) -> float:
    """Inches of a text in this many points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)
    return float(width) / 72


def _widest(texts: Sequence[str]) -> float:
    return max(map(_width, texts), default=0.0)


def _shortened(texts: Sequence[str], inches: float, size: float = _SMALL) -> list[str]:
    """Texts with … in the middle of those that are wider."""
    return [_cut(_clean(text), inches, size) for text in texts]


def _cut(text: str, inches: float, size: float) -> str:
    def shown(kept: int) -> str:
        return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"

    if _width(text, size) <= inches:
        return text
    return shown(max(1, bisect_right(range(len(text)), inches, key=lambda kept: _width(shown(kept), size)) - 1))
