"""Sheets of photographs: items and their neighbours."""

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from featurestore.errors import FeatureStoreError
from featurestore.figures.canvas import (
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
    check_table,
    clean,
    shortened,
    widest,
)
from featurestore.photos.decode import ImageError, decode
from featurestore.photos.files import read_photograph
from featurestore.text import near_matches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Photographs: TypeAlias = Mapping[tuple[str, str], FilePath] | Mapping[str, FilePath]

THUMBNAIL = 0.12  # inches, below which a photograph cannot be told from another
_MOST_NEIGHBOURS = 9
_HEAD = 0.2  # inches of the sheet's legend
_SPACE = 0.12  # inches between the rows of a sheet


def draw_neighbours(table: pd.DataFrame, photographs: Photographs, path: FilePath, most: int = 12) -> Path:
    """A sheet of the first ``most`` items of a table of ``neighbours``: the photograph of each, then those of its neighbours.

    Beneath are the neighbour's rank, name and dissimilarity (d). Nine neighbours are shown at most, the nearest. Frames are solid
    and blue where the face is the same, dashed and red where it is another; groups have no frames. ``photographs`` are files by
    ``(face, view)`` or ``face|view``, or by the group's name.
    """
    check_table(table, "table", ["rank", "dissimilarity"])
    theirs = [str(name) for name in table.columns if str(name).startswith("neighbour_")]
    mine = [name.removeprefix("neighbour_") for name in theirs]
    if not theirs or not set(mine) <= set(table.columns):
        raise FeatureStoreError("`table` says of no neighbour who it is. Give one that `neighbours()` made.")
    if most < 1:
        raise FeatureStoreError(f"`most` {most} rows are none. Give 1 or more.")
    near = table[table["rank"] <= _MOST_NEIGHBOURS]
    queries = list(near.groupby(mine, sort=False))[:most]
    rows = [_sheet_row(query if len(mine) > 1 else query[0], group, theirs) for query, group in queries]
    with canvas(path, TWO_COLUMNS if max(map(len, rows)) > 4 else ONE_COLUMN) as figure:
        axes, pitch, edge, lines = _sheet(figure, rows, "face_id" in mine)
        for y, cells in enumerate(rows):
            for x, (key, *texts) in enumerate(cells):
                frame = None if not x or "face_id" not in mine else SAME if key[0] == cells[0][0][0] else OTHER
                picture = thumbnail(photographs, key, round(edge * DPI))
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


def _sheet(figure: "Figure", rows: list[list[tuple[Any, ...]]], framed: bool) -> "tuple[Axes, float, float, int]":
    """Axes in inches from the upper left, the distance of columns, the side of a photograph, and the lines beneath it."""
    from matplotlib.patches import Patch

    width, head = figure.get_figwidth(), _HEAD if framed else 0.0
    pitch = (width - GAP) / max(map(len, rows))
    beneath = [clean("  ".join(texts)) for cells in rows for _, *texts in cells]
    lines = 1 if widest(beneath) < pitch - 0.04 else 2
    edge = min(pitch - 0.1, max(THUMBNAIL, (PAGE - head) / len(rows) - lines * LINE - _SPACE))
    height = head + len(rows) * (edge + lines * LINE + _SPACE)
    figure.set_size_inches(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height - head, -head))
    if framed:
        frames = [Patch(fill=False, edgecolor=colour, linestyle=dashes) for colour, dashes in (SAME, OTHER)]
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

    x = (GAP if place[0] else 0) + place[0] * pitch + (pitch - edge) / 2
    y = 0.05 + place[1] * (edge + lines * LINE + _SPACE)
    axes.imshow(picture, extent=(x, x + edge, y + edge, y), aspect="auto", interpolation="nearest")
    for i, text in enumerate(shortened(beneath, pitch - 0.04)):
        axes.text(x + edge / 2, y + edge + 0.04 + i * LINE, text, ha="center", va="top", fontsize=SMALL)
    if frame:
        colour, dashes = frame
        axes.add_patch(Rectangle((x, y), edge, edge, fill=False, edgecolor=colour, linestyle=dashes, linewidth=1.4))


def thumbnail(photographs: Photographs, key: Hashable, side: int) -> np.ndarray:
    """(side, side, 3) uint8 of a photograph by its ``(face, view)`` or its name, its longer side as long as that."""
    name = _name_of(key)
    found = {_name_of(each): file for each, file in photographs.items()}
    if name not in found:
        raise FeatureStoreError(f"`photographs` has none of {name!r}. {near_matches(name, list(found)[:10_000])}")
    try:
        picture = decode(read_photograph(found[name]))
    except (OSError, ImageError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FeatureStoreError(f"the photograph {found[name]} of {name!r} cannot be read: {reason}.") from None
    image = ImageOps.pad(Image.fromarray(picture), (side, side), Image.Resampling.LANCZOS, color="white")
    return np.asarray(image)


def _name_of(key: Hashable) -> str:
    return "|".join(map(str, key)) if isinstance(key, tuple) else str(key)
