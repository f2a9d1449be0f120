"""What all figures share: their style, sizes and file, checks of tables, and texts with their widths.

Figures are as wide as one column of a journal (3.35 in) or two (7 in): .svg, or .png of 300 dpi. They look the same whatever
Matplotlib's settings are. Like all of Matplotlib they are not for several threads at once. Every function that draws writes
``path`` in one step and returns it; FeatureStoreError if Matplotlib is not installed (extra ``figures``), for another ending of
``path``, and for results that it cannot draw. OSError is raised as writing does.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.files import replacing
from featurestore.text import listing, near_matches

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FilePath: TypeAlias = str | os.PathLike[str]

ONE_COLUMN, TWO_COLUMNS = 3.35, 7.0  # inches
PAGE = 9.2  # inches: the height of a page's text
DPI = 300
SMALL = 7  # points: names, ticks and legends
LINE = 0.125  # inches from one line of small text to the next
PITCH = 0.093  # inches that a row with a name takes at least
GAP = 0.1  # inches between panels, or photographs
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "text.parse_math": False,  # a $ in a name is a $
    "svg.fonttype": "none",
    "svg.hashsalt": "featurestore",
}
# Okabe & Ito (2008), "Color Universal Design", https://jfly.uni-koeln.de/color/, without the yellow, too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":")
SAME, OTHER = ((COLOURS[i], DASHES[i]) for i in range(2))


def check_ending(path: FilePath) -> None:
    """FeatureStoreError for an ending that is neither .svg nor .png, in any case, and if Matplotlib is not installed.

    For those who would rather know before they compute what is drawn.
    """
    if Path(path).suffix.lower() not in (".svg", ".png"):
        raise FeatureStoreError(f"a figure is drawn as .svg or .png, not as {Path(path).name!r}.")
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise FeatureStoreError(
            f"drawing figures needs Matplotlib ({error}): pip install 'face-featurestore[figures]'."
        ) from None


@contextmanager
def canvas(path: FilePath, width: float) -> "Iterator[Figure]":
    """A figure of that width in inches, written to ``path`` at the end; FeatureStoreError as of ``check_ending``."""
    check_ending(path)
    import matplotlib
    from matplotlib.figure import Figure

    ending = Path(path).suffix.lower()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure((width, width), dpi=DPI)
        yield figure
        metadata = {"Date": None} if ending == ".svg" else {"Software": None}
        with replacing(Path(path)) as partial:
            figure.savefig(partial, format=ending[1:], dpi=DPI, metadata=metadata)


def constrained(figure: "Figure") -> "Figure":
    """The same figure, which Matplotlib lays out so that nothing overlaps."""
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03)
    return figure


def check_table(table: pd.DataFrame, name: str, needed: list[str]) -> None:
    """FeatureStoreError for a table without one of the columns ``needed``, or without rows; ``name`` is the argument's."""
    for column in needed:
        if column not in table:
            near = near_matches(column, map(str, table.columns)) if len(table.columns) else ""
            raise FeatureStoreError(
                f"`{name}` has no column {column!r}, and needs {listing(needed, len(needed))}. {near}".strip()
            )
    if not len(table):
        raise FeatureStoreError(f"`{name}` has no rows, so there is nothing to draw.")


def check_range(table: pd.DataFrame, name: str, columns: Sequence[Any], low: float, high: float) -> None:
    """FeatureStoreError for what is no number, or below or above by more than rounding; NaN is let through."""
    for column in columns:
        values = pd.to_numeric(table[column], errors="coerce")
        wrong = table[column][(values.isna() & table[column].notna()) | (values < low - 1e-6) | (values > high + 1e-6)]
        if len(wrong):
            raise FeatureStoreError(f"`{name}` has {wrong.iloc[0]} as {column}; numbers of {low} to {high} are drawn.")


def text_of(values: np.ndarray) -> list[str]:
    """Of each value: names may be numbers."""
    return [str(value) for value in values]


def clean(text: str) -> str:
    """Without line breaks and what else cannot be printed; XML forbids some of it."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def text_width(text: str, size: float = SMALL) -> float:
    """Inches of a text in this many points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    width, _, _ = text_to_path.get_text_width_height_descent(text, FontProperties(size=size), False)
    return float(width) / 72


def widest(texts: Sequence[str]) -> float:
    """Inches of the widest of small texts; 0.0 of none."""
    return max(map(text_width, texts), default=0.0)


def shortened(texts: Sequence[str], inches: float, size: float = SMALL) -> list[str]:
    """Texts with … in the middle of those that are wider."""
    return [_cut(clean(text), inches, size) for text in texts]


def _cut(text: str, inches: float, size: float) -> str:
    def shown(kept: int) -> str:
        return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"

    if text_width(text, size) <= inches:
        return text
    return shown(max(1, bisect_right(range(len(text)), inches, key=lambda kept: text_width(shown(kept), size)) - 1))
