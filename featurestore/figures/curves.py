"""Curves and points with intervals: ROC, view invariance, and correlations with another RDM."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.figures.canvas import (
    COLOURS,
    DASHES,
    LINE,
    ONE_COLUMN,
    OTHER,
    PAGE,
    PITCH,
    SAME,
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
from featurestore.text import near_matches

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_LINES = len(COLOURS) * len(DASHES)  # that differ in colour or dashes


def draw_roc(roc: pd.DataFrame, path: FilePath, areas: Mapping[str, str] | None = None) -> Path:
    """ROC curves of a table (layer, threshold, false_accepts, true_accepts), rates in 0 … 1, at most 28 layers.

    False accepts are on a logarithmic axis from the smallest rate that is not zero (1/n of n different pairs) to 1. ``areas`` has
    the text that the legend adds to a layer's name: the area under the curve and its interval. The grey line is where as many of
    the same face are refused as of others accepted.
    """
    check_table(roc, "roc", ["layer", "false_accepts", "true_accepts"])
    check_range(roc, "roc", ["false_accepts", "true_accepts"], 0, 1)
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
    with canvas(path, ONE_COLUMN) as figure:
        lines = math.ceil(len(texts) / 2) if len(texts) > 6 and max(map(text_width, texts)) < 1.2 else len(texts)
        figure.set_size_inches(ONE_COLUMN, 2.6 + LINE * lines)
        axes = constrained(figure).subplots()
        _draw_curves(axes, curves, float(positive.min()))
        columns = math.ceil(len(texts) / lines)
        shown = shortened(texts, (ONE_COLUMN - 0.2) / columns - 0.4)
        figure.legend(axes.lines, shown, loc="outside lower center", ncols=columns, handlelength=2.6, labelspacing=0.2)
    return Path(path)


def _draw_curves(axes: "Axes", curves: Mapping[str, pd.DataFrame], least: float) -> None:
    for i, curve in enumerate(curves.values()):
        points = curve.sort_values(["false_accepts", "true_accepts"])
        points = points[points["false_accepts"] > 0]
        axes.plot(points["false_accepts"], points["true_accepts"], color=_colour(i), linestyle=DASHES[i % len(DASHES)])
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
    check_table(table, "table", needed)
    layers = list(dict.fromkeys(table["layer"]))
    numbers = pd.to_numeric(table["difference"], errors="coerce")
    numeric = bool(numbers.notna().all())
    names = [] if numeric else list(dict.fromkeys(map(str, table["difference"])))
    place = {name: i for i, name in enumerate(names)}
    x = numbers.astype(float) if numeric else table["difference"].map(lambda name: float(place[str(name)]))
    if table["difference"].nunique() == 1 and len(layers) > 1:
        return _draw_layers(table, layers, path, ylabel)
    columns = _profile_columns(len(layers), len(names))
    rows = math.ceil(len(layers) / columns)
    with canvas(path, ONE_COLUMN if len(layers) == 1 and len(names) <= 10 else TWO_COLUMNS) as figure:
        beneath = min(widest(shortened(names, 1.2)), 1.2) if names else 0.0
        high = float(np.clip((PAGE - 0.7 - beneath) / rows, 0.9, 2.1 if len(layers) == 1 else 1.6))
        figure.set_size_inches(figure.get_figwidth(), rows * high + 0.7 + beneath)
        grid = constrained(figure).subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for layer, axes in zip(layers, grid, strict=False):
            _draw_profile(axes, table.assign(x=x)[table["layer"] == layer].sort_values("x"), numeric)
            room = (figure.get_figwidth() - 0.6) / columns - 0.1
            axes.set_title(shortened([str(layer)], room, 8)[0], pad=3)
        _finish_profiles(figure, grid, len(layers), columns, names, ylabel)
    return Path(path)


def _draw_layers(table: pd.DataFrame, layers: list[Any], path: FilePath, ylabel: str) -> Path:
    """Of a single difference of views: layers side by side."""
    difference = table["difference"].iloc[0]
    with canvas(path, TWO_COLUMNS) as figure:
        axes = constrained(figure).subplots()
        _draw_profile(axes, table.assign(x=np.arange(len(layers), dtype=float)), numeric=False)
        beneath = _name_ticks(axes, [str(layer) for layer in layers], TWO_COLUMNS - 0.6)
        axes.set(xlabel=f"layer (difference of views: {difference})", ylabel=ylabel, ylim=(0, None))
        figure.legend(axes.lines, ["same face", "different faces"], loc="outside upper center", ncols=2)
        figure.set_size_inches(TWO_COLUMNS, 2.6 + beneath)
    return Path(path)


def _profile_columns(layers: int, names: int) -> int:
    """Panels to a row. Long names stand below the last row alone, so that one is full."""
    if names > 10:
        return 1
    return next(n for n in (3, 2, 1) if n <= layers and (not names or layers % n == 0))


def _draw_profile(axes: "Axes", rows: pd.DataFrame, numeric: bool) -> None:
    for kind, (colour, dashes), marker, shift in (("same", SAME, "o", -0.1), ("other", OTHER, "s", 0.1)):
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
            axes.set_xlim(-0.5, len(names) - 0.5)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 1.5, 3, 4.5, 6, 9, 10]))
    figure.supxlabel("views" if names else "difference of views (degrees)", fontsize=8)
    figure.supylabel(shortened([ylabel], figure.get_figheight() - 0.1, 8)[0], fontsize=8)
    figure.legend(
        grid[0].lines, ["same face", "different faces"], loc="outside upper center", ncols=2, handlelength=2.6
    )


def draw_rsa(table: pd.DataFrame, path: FilePath, ylabel: str = "Spearman correlation") -> Path:
    """Correlations of layers' RDMs with another one, with their intervals: a point for each layer, in the order of the table.

    ``table``: layer, spearman, spearman_low, spearman_high (NaN is left out), and if there is one, ceiling: the highest that the
    noise of the other RDM allows, a grey bar above each point.
    """
    check_table(table, "table", ["layer", "spearman", "spearman_low", "spearman_high"])
    check_range(table, "table", ["spearman"], -1, 1)
    if table["layer"].duplicated().any():
        twice = table["layer"][table["layer"].duplicated()].iloc[0]
        raise FeatureStoreError(f"`table` has the layer {twice!r} more than once. Choose the rows of one comparison.")
    x, names = np.arange(len(table)), [str(name) for name in table["layer"]]
    with canvas(path, ONE_COLUMN if len(table) <= 20 else TWO_COLUMNS) as figure:
        width, (label,) = figure.get_figwidth(), shortened([ylabel], 4, 8)
        axes = constrained(figure).subplots()
        axes.axhline(0, color="0.6", linewidth=0.6, zorder=1)
        axes.vlines(x, table["spearman_low"], table["spearman_high"], color=COLOURS[0])
        axes.plot(x, table["spearman"], "o", color=COLOURS[0])
        axes.set(xlim=(-0.6, len(x) - 0.4), xlabel="layer", ylabel=label)
        beneath = _name_ticks(axes, names, width - 0.6)
        legend = 0.0
        if "ceiling" in table:
            bars = axes.hlines(table["ceiling"], x - 0.4, x + 0.4, color="0.55", linewidth=2.0)
            figure.legend([bars], ["noise ceiling"], loc="outside upper center")
            legend = 0.2
        figure.set_size_inches(width, max(2.1, text_width(label, 8) + 0.6) + beneath + legend)
    return Path(path)


def _name_ticks(axes: "Axes", names: list[str], room: float) -> float:
    """Names along x, upright where they do not fit side by side in ``room`` inches. Returns the inches that they take below."""
    step = math.ceil(len(names) * PITCH / room)
    shown = shortened(names[::step], 1.2)
    upright = widest(shown) + 0.08 > room / len(shown)
    axes.set_xticks(range(0, len(names), step), shown, rotation=90 if upright else 0)
    return widest(shown) if upright else LINE


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]
