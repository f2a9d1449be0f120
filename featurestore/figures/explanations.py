"""Relevance: maps over photographs, by region, and what hiding it does."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from PIL import Image

from featurestore.errors import FeatureStoreError
from featurestore.figures.canvas import (
    COLOURS,
    DASHES,
    DPI,
    GAP,
    LINE,
    ONE_COLUMN,
    OTHER,
    PAGE,
    SAME,
    SMALL,
    TWO_COLUMNS,
    FilePath,
    canvas,
    check_range,
    check_table,
    constrained,
    shortened,
    text_width,
    widest,
)
from featurestore.text import listing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LIMIT = 99.5  # percentile
_COLOURS = "RdBu_r"  # blue against, red for: told apart by the colour-blind
_DARKEST = 0.55  # of 1: how grey a photograph's black is beneath a map
_HEAD = 0.19  # inches of a line of names, or of a legend
_NAMES = 0.17  # inches of a column of upright names
_BAR = 0.62  # inches of the colour bar with its ticks and label
_LARGEST = 1.1  # inches of a picture
_SMALLEST = 0.3
# From top to bottom; other regions come after these, and what is no face last.
_ORDER = ("hair", "forehead", "brows", "eyes", "nose", "cheeks", "mouth", "chin")
_LAST = ("background", "outside")
_SERIES = ("run", "method", "choice", "view", "place")
_BASELINES = {"random": ("0.5", "-"), "edges": ("0.5", ":")}
_LABELS = {
    "share": "share of relevance",
    "net": "net relevance, share",
    "density": "relevance / area",
}


def draw_trial(
    pictures: np.ndarray,
    maps: Mapping[str, np.ndarray],
    path: FilePath,
    *,
    names: Sequence[str],
    beneath: Sequence[str] = (),
    chosen: int | None = None,
    answer: int | None = None,
) -> Path:
    """One trial: its photographs, and in a row for each method their maps over them.

    ``pictures`` (place, size, size, 3) uint8 RGB are the squares that the network takes, ``maps`` (place, size, size) float by
    method. Red speaks for the choice that is explained, blue against it. Methods differ in unit, so each row is divided by its
    own limit: one scale from -1 to 1 in the whole figure. The limit is the 99.5th percentile of the absolute values; what is
    beyond it has the colour of the end. ``names`` of the places stand above the photographs,
    and ``beneath``, in one line or several, what there is to say of each, such as the head's probability. The photograph of
    the head's choice has a solid blue frame, that of the answer given a dashed red one. NaN is shown as 0.
    """
    places, rows = len(pictures), [list(pictures)]
    if not maps or not places:
        raise FeatureStoreError("there is no map or no photograph, so there is nothing to draw.")
    for method, values in maps.items():
        _check_sizes(method, np.asarray(values), pictures)
        rows.append([_over(*pair) for pair in zip(pictures, _scaled(values), strict=True)])
    for what, texts in (("names", names), ("beneath", beneath)):
        if len(texts) != places and (texts or what == "names"):
            raise FeatureStoreError(f"`{what}` has {len(texts)} texts for {places} photographs.")
    frames = [(place, *style) for place, style in ((chosen, SAME), (answer, OTHER)) if place is not None]
    with canvas(path, ONE_COLUMN if places <= 3 else TWO_COLUMNS) as figure:
        grid = _Grid(figure, rows, ["", *maps], list(names), list(beneath), bool(frames))
        for place, colour, dashes in frames:
            # The dashed frame is within the solid one, so that both are seen around one photograph.
            grid.frame(place, colour, dashes, 0.0 if colour == SAME[0] else 0.03)
        if frames:
            grid.legend({SAME: "head's choice", OTHER: "answer given"}, [frame[1:] for frame in frames])
        grid.colour_bar("share of the row's limit")
    return Path(path)


def draw_mean_maps(
    pictures: Mapping[str, np.ndarray], maps: Mapping[str, xr.DataArray], path: FilePath, most: int = 10
) -> Path:
    """A row for each face, ``most`` at most: a photograph of it, and each method's mean map over it.

    ``pictures`` (size, size, 3) uint8 RGB by face, ``maps`` (face, size, size) by method, with the same faces in the same order,
    and ``n`` (face), if they have it, the number of maps behind each mean. A column is divided by the 99.5th percentile of the
    absolute values of all its faces that are shown, so that faces can be compared: one scale from -1 to 1, red for the choice,
    blue against it.
    """
    if not maps:
        raise FeatureStoreError("there is no map, so there is nothing to draw.")
    faces = [str(face) for face in next(iter(maps.values()))["face"].values]
    for method, values in maps.items():
        if [str(face) for face in values["face"].values] != faces:
            raise FeatureStoreError(
                f"the maps of {method!r} are of other faces than those before, or in another order."
            )
    faces = faces[:most]
    missing = [face for face in faces if face not in pictures]
    if missing or not faces:
        raise FeatureStoreError(
            f"`pictures` has none of {listing(missing)}." if missing else f"`most` {most} are none."
        )
    rows = [[pictures[face]] for face in faces]
    for method, values in maps.items():
        columns = values.values[: len(faces)]
        _check_sizes(method, columns, [pictures[face] for face in faces])
        for row, face, scaled in zip(rows, faces, _scaled(columns), strict=True):
            row.append(_over(pictures[face], scaled))
    first = next(iter(maps.values()))
    counts = [f" (n = {n})" for n in first["n"].values[: len(faces)]] if "n" in first.coords else [""] * len(faces)
    with canvas(path, ONE_COLUMN if len(maps) <= 3 else TWO_COLUMNS) as figure:
        names = [f"{face}{count}" for face, count in zip(faces, counts, strict=True)]
        grid = _Grid(figure, rows, names, ["photograph", *maps], [], False)
        grid.colour_bar("share of the column's limit")
    return Path(path)


def _check_sizes(method: str, maps: np.ndarray, pictures: Sequence[np.ndarray] | np.ndarray) -> None:
    if len(maps) != len(pictures) or any(
        one.shape != other.shape[:2] for one, other in zip(maps, pictures, strict=True)
    ):
        raise FeatureStoreError(
            f"the maps of {method!r} are {' × '.join(map(str, maps.shape))}, the photographs "
            f"{len(pictures)} × {' × '.join(map(str, pictures[0].shape[:2]))}."
        )


def _scaled(maps: Any) -> np.ndarray:
    """Over the ``_LIMIT`` of all absolute values, within -1 … 1; NaN as 0. A few pixels hold most of what some methods give."""
    values = np.nan_to_num(np.asarray(maps, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    strength = np.abs(values)
    return np.asarray(np.clip(values / (np.percentile(strength, _LIMIT) or strength.max() or 1.0), -1, 1))


def _over(picture: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """uint8 RGB: the map's colours, darker where the photograph is, which is made pale and grey."""
    from matplotlib import colormaps

    grey = np.asarray(Image.fromarray(picture).convert("L"), np.float64) / 255
    colours = colormaps[_COLOURS]((relevance + 1) / 2)[:, :, :3]
    return np.asarray(np.rint(255 * colours * (_DARKEST + (1 - _DARKEST) * grey[:, :, None])), np.uint8)


class _Grid:
    """Pictures in rows and columns with names on the left and above, in inches from the upper left."""

    def __init__(
        self,
        figure: "Figure",
        rows: Sequence[Sequence[np.ndarray]],
        left: list[str],
        above: list[str],
        beneath: list[str],
        legend: bool,
    ) -> None:
        self.figure, self.count = figure, len(rows)
        width, columns = figure.get_figwidth(), len(rows[0])
        self.line = LINE * max(text.count("\n") + 1 for text in beneath) + 0.03 if beneath else 0.0
        self.head = _HEAD * (1 + legend)
        room = (PAGE - self.head - self.line) / len(rows) - GAP / 2
        self.edge = min((width - _NAMES - _BAR - 0.04) / columns - GAP / 2, room, _LARGEST)
        if self.edge < _SMALLEST:
            raise FeatureStoreError(
                f"{len(rows)} rows of {columns} pictures are too many for a page: they would be {self.edge:.2f} in wide. Draw "
                "fewer faces or methods."
            )
        self.pitch = self.edge + GAP / 2
        self.height = self.head + self.line + len(rows) * self.pitch
        figure.set_size_inches(width, self.height)
        self.axes: Axes = figure.add_axes((0, 0, 1, 1))
        self.axes.set_axis_off()
        self.axes.set(xlim=(0, width), ylim=(self.height, 0))
        for i, row in enumerate(rows):
            for j, picture in enumerate(row):
                self._show(picture, *self.corner(i, j))
        style: dict[str, Any] = {"ha": "center", "fontsize": SMALL}
        for i, name in enumerate(shortened(left, self.edge)):
            y = self.corner(i, 0)[1] + self.edge / 2
            self.axes.text(_NAMES - 0.03, y, name, rotation=90, va="center", **{**style, "ha": "right"})
        for j, name in enumerate(shortened(above, self.pitch)):
            self.axes.text(self.corner(0, j)[0] + self.edge / 2, self.head - 0.05, name, va="bottom", **style)
        for j, text in enumerate(beneath):
            x, y = self.corner(0, j)
            for i, line in enumerate(shortened(text.split("\n"), self.pitch)):
                self.axes.text(x + self.edge / 2, y + self.edge + 0.03 + i * LINE, line, va="top", **style)

    def corner(self, row: int, column: int) -> tuple[float, float]:
        """Left and top of a picture."""
        return _NAMES + column * self.pitch, self.head + row * self.pitch + (self.line if row else 0)

    def _show(self, picture: np.ndarray, x: float, y: float) -> None:
        side = round(self.edge * DPI)
        shown = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
        extent = (x, x + self.edge, y + self.edge, y)
        self.axes.imshow(np.asarray(shown), extent=extent, aspect="auto", interpolation="nearest")

    def frame(self, place: int, colour: str, dashes: Any, within: float) -> None:
        """Around a photograph of the first row."""
        from matplotlib.patches import Rectangle

        x, y = (start + within for start in self.corner(0, place))
        style: dict[str, Any] = {"edgecolor": colour, "linestyle": dashes, "linewidth": 1.8, "fill": False}
        self.axes.add_patch(Rectangle((x, y), self.edge - 2 * within, self.edge - 2 * within, **style))

    def legend(self, named: Mapping[tuple[str, Any], str], shown: Sequence[tuple[str, Any]]) -> None:
        """What the frames say."""
        from matplotlib.patches import Patch

        there = {style: text for style, text in named.items() if style in shown}
        patches = [Patch(fill=False, edgecolor=colour, linestyle=dashes) for colour, dashes in there]
        style: dict[str, Any] = {"loc": "upper center", "borderaxespad": 0.2, "ncols": 2, "handlelength": 2.6}
        self.figure.legend(patches, list(there.values()), **style)

    def colour_bar(self, label: str) -> None:
        """At the right of the pictures, as high as they are, 3 inches at most."""
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize

        last = max(image.get_extent()[1] for image in self.axes.images)
        high = min(self.height - self.head - 0.1, 3.0)
        width, top = self.figure.get_figwidth(), self.head + 0.02
        place = ((last + 0.07) / width, 1 - (top + high) / self.height, 0.09 / width, high / self.height)
        scale = ScalarMappable(Normalize(-1, 1), _COLOURS)
        bar = self.figure.colorbar(scale, self.figure.add_axes(place), ticks=[-1, 0, 1], format="{x:g}")
        bar.ax.set_yticklabels(["−1", "0", "1"])
        bar.outline.set_linewidth(0.4)
        bar.set_label(shortened([label], high, SMALL)[0], labelpad=1, fontsize=SMALL)


def draw_regions(table: pd.DataFrame, path: FilePath, value: Literal["share", "net", "density"] = "share") -> Path:
    """How much relevance is in each region, with 95 % intervals: regions from hair to chin, what is no face last.

    ``table`` is that of ``heads.explain.regions``: region, area, and ``value`` with its ``_low`` and ``_high``; a colour for
    each run, method, choice, view and place of which it has several, seven at most. ``share`` is shown beside the region's
    share of the area (black lines), which relevance without any preference would have; ``density`` beside 1.
    """
    ends = [f"{value}_low", f"{value}_high"]
    check_table(table, "table", ["region", "area", value, *ends])
    check_range(table, "table", [value, *ends], -np.inf, np.inf)
    columns = [name for name in _SERIES if name in table and table[name].nunique() > 1]
    series = table[columns].astype(str).agg(", ".join, axis=1) if columns else pd.Series("", table.index)
    names = list(dict.fromkeys(series))
    if len(names) > len(COLOURS):
        raise FeatureStoreError(
            f"`table` has {len(names)} of {', '.join(columns)}; {len(COLOURS)} can be told from one another. Choose some."
        )
    if pd.DataFrame({"series": series, "region": table["region"]}).duplicated().any():
        raise FeatureStoreError("`table` has a region more than once. Choose the rows of one table.")
    regions = _from_the_top(table["region"])
    place = {region: i for i, region in enumerate(regions)}
    width = 0.8 / len(names)
    with canvas(path, ONE_COLUMN if len(regions) * len(names) <= 24 else TWO_COLUMNS) as figure:
        axes = constrained(figure).subplots()
        bars = []
        for i, name in enumerate(names):
            rows = table[series == name]
            x = rows["region"].map(place).to_numpy(float) + (i - (len(names) - 1) / 2) * width
            bars.append(axes.bar(x, rows[value], width * 0.92, color=COLOURS[i], alpha=0.75))
            axes.vlines(x, *(rows[end] for end in ends), color="0.15", linewidth=0.9)
            if value == "share":
                areas = axes.hlines(rows["area"], x - width / 2, x + width / 2, color="black", linewidth=1.2)
        shown = dict(zip(names, bars, strict=True)) if columns else {}
        if value == "share":
            shown["share of the area"] = areas
        else:
            axes.axhline(float(value == "density"), color="0.15", linewidth=0.7)
        axes.set(xlim=(-0.6, len(regions) - 0.4), ylabel=_LABELS[value])
        _finish_regions(figure, axes, regions, shown)
    return Path(path)


def _from_the_top(regions: pd.Series) -> list[str]:
    found = list(dict.fromkeys(map(str, regions)))
    others = [name for name in found if name not in (*_ORDER, *_LAST)]
    return [name for name in (*_ORDER, *others, *_LAST) if name in found]


def _finish_regions(figure: "Figure", axes: "Axes", regions: list[str], shown: Mapping[str, Any]) -> None:
    width = figure.get_figwidth()
    names = shortened(regions, 1.2)
    upright = widest(names) + 0.06 > (width - 0.6) / len(names)
    axes.set_xticks(range(len(names)), names, rotation=90 if upright else 0)
    lines = _legend(figure, list(shown.values()), list(shown))
    figure.set_size_inches(width, 2.2 + (widest(names) if upright else LINE) + lines * LINE)


def _legend(figure: "Figure", handles: list[Any], names: list[str]) -> int:
    """Above, in as many columns as there is room for; the number of its lines."""
    if not names:
        return 0
    room = figure.get_figwidth() - 0.2
    texts = shortened(names, room - 0.5)
    columns = max(1, min(len(texts), int(room / (max(map(text_width, texts)) + 0.5))))
    figure.legend(handles, texts, loc="outside upper center", ncols=columns, handlelength=2.2, labelspacing=0.2)
    return -(-len(texts) // columns)


def draw_deletion(curves: pd.DataFrame, path: FilePath, ylabel: str = "explained value") -> Path:
    """What becomes of the explained value when pixels are taken away (deletion) or shown (insertion), the most relevant first.

    ``curves``: method, kind (deletion, insertion), fraction (0 … 1), value, low, high (intervals may be NaN). A panel for each
    kind and a line for each method, seven at most; the orders ``random`` and ``edges``, which know nothing of the head, are grey.
    """
    check_table(curves, "curves", ["method", "kind", "fraction", "value", "low", "high"])
    check_range(curves, "curves", ["fraction"], 0, 1)
    check_range(curves, "curves", ["value", "low", "high"], -np.inf, np.inf)
    kinds = [kind for kind in ("deletion", "insertion") if kind in set(curves["kind"])]
    unknown = sorted(set(map(str, curves["kind"])) - set(kinds))
    if unknown:
        raise FeatureStoreError(f"`curves` has the kind {unknown[0]!r}; deletion and insertion are drawn.")
    methods = list(dict.fromkeys(map(str, curves["method"])))
    methods = [name for name in methods if name not in _BASELINES] + [name for name in _BASELINES if name in methods]
    coloured = [name for name in methods if name not in _BASELINES]
    if len(coloured) > len(COLOURS):
        raise FeatureStoreError(f"`curves` has {len(coloured)} methods; {len(COLOURS)} can be told apart. Choose some.")
    styles: dict[str, tuple[str, Any]] = {
        name: (COLOURS[i], DASHES[i % len(DASHES)]) for i, name in enumerate(coloured)
    }
    styles |= {name: style for name, style in _BASELINES.items() if name in methods}
    with canvas(path, TWO_COLUMNS if len(kinds) > 1 else ONE_COLUMN) as figure:
        panels = constrained(figure).subplots(1, len(kinds), sharey=True, squeeze=False)[0]
        for kind, axes in zip(kinds, panels, strict=True):
            for name, (colour, dashes) in styles.items():
                rows = curves[(curves["kind"] == kind) & (curves["method"] == name)].sort_values("fraction")
                axes.fill_between(rows["fraction"], rows["low"], rows["high"], color=colour, alpha=0.15, linewidth=0)
                axes.plot(rows["fraction"], rows["value"], color=colour, linestyle=dashes)
            shown = "hidden" if kind == "deletion" else "shown"
            axes.set(xlim=(0, curves["fraction"].max()), xlabel=f"share of pixels {shown}, the most relevant first")
            axes.set_title(kind, pad=3)
        panels[0].set_ylabel(shortened([ylabel], 2, 8)[0])
        lines = _legend(figure, list(panels[0].lines), methods)
        figure.set_size_inches(figure.get_figwidth(), 2.3 + lines * LINE)
    return Path(path)
