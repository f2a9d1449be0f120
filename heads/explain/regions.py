"""Relevance by region of the face: shares with intervals over faces, and runs compared on the same trials.

Regions come from a mask with a table of names, or, roughly, from five landmarks.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
import xarray as xr
from PIL import Image

from featurestore.caching.provenance import photo_of, recipe_of
from featurestore.errors import FeatureStoreError
from featurestore.intervals import clustered_mean
from featurestore.keys import FLIPPED, KEY, LANDMARKS
from featurestore.photos.boxes import numbers
from featurestore.photos.csv_files import read_csv
from featurestore.photos.decode import ImageError, refuse_large
from featurestore.photos.geometry import moved, square_to_photograph
from featurestore.photos.loading import read_photo
from featurestore.store.reader import Source
from featurestore.text import listing
from heads.comparison import holm
from heads.explain.pictures import pictures

FilePath: TypeAlias = str | os.PathLike[str]

FACE_REGIONS = ("hair", "forehead", "brows", "eyes", "nose", "cheeks", "mouth", "chin", "background")
OUTSIDE = "outside"  # the photograph, to which the square may reach beyond
_KEPT = 512  # items whose regions are kept: 50 MB at most at 224 × 224


@dataclass(frozen=True)
class Regions:
    """Regions of one item's square: ``labels`` (y, x), of each pixel the place of its region in ``names``."""

    names: tuple[str, ...]
    labels: np.ndarray


RegionsOf: TypeAlias = Callable[[str, str], Regions]  # of an item, by its face and view


def find_regions(
    source: Source, landmarks: FilePath | None = None, mask: FilePath | None = None, mask_names: FilePath | None = None
) -> RegionsOf | None:
    """Regions by the mask, the table of landmarks, or the source's own landmarks; None if there is none of them."""
    if mask is not None and mask_names is not None:
        return regions_from_mask(mask, mask_names, source)
    if landmarks is not None or set(LANDMARKS) <= set(source.items.columns):
        return regions_from_landmarks(source, landmarks)
    return None


def regions_from_landmarks(source: Source, landmarks: FilePath | None = None) -> RegionsOf:
    """Regions of each item by its five landmarks: the source's own, or those of a table of pipelines/find_faces.py.

    They are a template of a frontal face, scaled by the distances of eyes and nose, turned with the eyes and moved aside with
    the nose: an approximation. Hair is where short hair would be, and so are ears. Names: ``FACE_REGIONS``. FeatureStoreError for
    items without landmarks, and photographs that are gone or changed.
    """
    table = _landmarks(source, landmarks)

    @lru_cache(_KEPT)
    def regions_of(face: str, view: str) -> Regions:
        name = f"{face}/{view.removesuffix(FLIPPED)}"
        if name not in table.index:
            raise FeatureStoreError(f"{landmarks or source.name} has no landmarks of {name}.")
        where, _ = _in_photograph(source, face, view)
        return Regions(FACE_REGIONS, _face_labels(where, table.loc[name].to_numpy(float).reshape(5, 2), name))

    return regions_of


def _landmarks(source: Source, landmarks: FilePath | None) -> pd.DataFrame:
    """Columns LANDMARKS by face/view."""
    if landmarks is not None:
        path = Path(landmarks).expanduser()
        if not path.is_file():
            raise FeatureStoreError(f"there is no file {path}. Check the path given with `landmarks`.")
        table, what = read_csv(path, dtype=dict.fromkeys(KEY, str), keep_default_na=False), str(path)
    else:
        table, what = source.items.reset_index(), source.name
    missing = [name for name in (*KEY, *LANDMARKS) if name not in table]
    if missing:
        raise FeatureStoreError(
            f"{what} has no {missing[0]}. Regions need five landmarks of each face: give `landmarks`, the table that "
            "pipelines/find_faces.py writes, or a mask."
        )
    names = table["face_id"] + "/" + table["view"].str.removesuffix(FLIPPED)
    return numbers(table, LANDMARKS, what).set_axis(names)[~names.duplicated().to_numpy()]


def _in_photograph(source: Source, face: str, view: str) -> tuple[np.ndarray, tuple[int, int]]:
    """(y, x, 2): where each pixel of an item's square is in its photograph; and the photograph's height and width."""
    recipe, photo = recipe_of(source), photo_of(source, int(source.find((face, view))[0]))
    try:
        rgb, _ = read_photo(photo)
        affine = square_to_photograph(recipe, rgb.shape[0], rgb.shape[1], photo.place, photo.flipped)
    except (ImageError, OSError) as error:
        raise FeatureStoreError(f"{photo}: {error}. Regions are found in the photograph that was cached.") from None
    y, x = np.mgrid[: recipe.size, : recipe.size]
    return moved(affine, np.stack([x, y], axis=2)), (rgb.shape[0], rgb.shape[1])


# The template, in distances between the middles of the eyes: x to the picture's right from the middle between them, y down.
_NOSE = 0.77  # y of the nose's bottom; mean_face of photos/chips.py has it there
_ELLIPSES = {  # x and y of the middle, half width, half height; those with x stand on both sides
    "eyes": (0.5, 0.0, 0.30, 0.16),
    "brows": (0.53, -0.33, 0.40, 0.15),
    "mouth": (0.0, 1.16, 0.47, 0.23),
}
_NOSE_OUTLINE = ((0.13, -0.15), (0.17, 0.35), (0.36, 0.62), (0.34, 0.84), (0.12, 0.92))  # its right half
_FACE = (0.0, 0.42, 1.15, 1.55)
_HAIR = (0.0, -0.3, 1.42, 1.7)
_HAIR_ENDS, _FOREHEAD_ENDS, _CHIN_BEGINS = 0.6, -0.2, 1.42  # y


def _face_labels(where: np.ndarray, landmarks: np.ndarray, name: str) -> np.ndarray:
    """(y, x) uint8, places in FACE_REGIONS, of pixels at ``where`` (y, x, 2) of the photograph."""
    right, left, nose = landmarks[:2].mean(axis=0), landmarks[2:4].mean(axis=0), landmarks[4]
    across, middle = right - left, (right + left) / 2
    apart = float(np.hypot(*across))
    if apart < 1:
        raise FeatureStoreError(f"the eyes of {name} are {apart:.2g} pixels apart: these are no landmarks of a face.")
    turn = np.array([across, [-across[1], across[0]]]) / apart**2
    nose_x, nose_y = turn @ (nose - middle)
    stretch = float(np.clip(nose_y / _NOSE, 0.7, 1.3))  # a face that looks up or down
    points = (where - middle) @ turn.T
    y = points[..., 1] / stretch
    x = points[..., 0] - np.clip(nose_x, -0.4, 0.4) * np.clip(y / _NOSE, -0.5, 1)  # or aside
    labels = np.full(x.shape, FACE_REGIONS.index("background"), np.uint8)

    def fill(region: str, inside: np.ndarray) -> None:
        labels[inside] = FACE_REGIONS.index(region)

    face = _inside(x, y, _FACE)
    fill("hair", _inside(x, y, _HAIR) & (y < _HAIR_ENDS))
    fill("cheeks", face)
    fill("forehead", face & (y < _FOREHEAD_ENDS))
    fill("chin", face & (y > _CHIN_BEGINS))
    fill("nose", _inside_nose(x, y))
    for region, ellipse in _ELLIPSES.items():
        fill(region, _inside(np.abs(x) if ellipse[0] else x, y, ellipse))
    return labels


def _inside(x: np.ndarray, y: np.ndarray, ellipse: tuple[float, float, float, float]) -> np.ndarray:
    middle_x, middle_y, half_width, half_height = ellipse
    inside: np.ndarray = ((x - middle_x) / half_width) ** 2 + ((y - middle_y) / half_height) ** 2 <= 1
    return inside


def _inside_nose(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    widths, heights = zip(*_NOSE_OUTLINE, strict=True)
    inside: np.ndarray = np.abs(x) <= np.interp(y, heights, widths, left=-1, right=-1)
    return inside


def regions_from_mask(mask: FilePath, table: FilePath, source: Source) -> RegionsOf:
    """Regions of each item by a PNG of labels or colours, and a CSV (``label,name`` or ``colour,name``) that says what they are.

    ``mask`` is one for all items, or a CSV ``face_id,view,mask`` with one for each. It is as large as the square that the
    network takes, or as the photograph; then it is brought to the square, and what reaches beyond the photograph is the region
    ``OUTSIDE``. Labels are grey values or places in a palette, colours are written as #ff8000; several may have one name. A
    mirrored view has the mask of its photograph, mirrored, unless the CSV has one for it. FeatureStoreError for masks of
    another size or with labels that the table lacks, and items without one.
    """
    path, size = Path(mask).expanduser(), recipe_of(source).size
    names, values, column = _mask_table(Path(table).expanduser())
    files = _mask_files(path) if path.suffix.lower() == ".csv" else None

    @lru_cache(1)
    def read(file: Path) -> np.ndarray:
        return _read_mask(file, names, values, column)

    @lru_cache(_KEPT)
    def regions_of(face: str, view: str) -> Regions:
        file, mirrored = path, False
        if files is not None:
            mirrored = (face, view) not in files and view.endswith(FLIPPED)
            key = (face, view.removesuffix(FLIPPED) if mirrored else view)
            if key not in files:
                raise FeatureStoreError(f"{path} has no mask of {face}/{view}.")
            file = files[key]
        labels = read(file)
        if labels.shape == (size, size):
            return Regions((*names, OUTSIDE), labels[:, ::-1] if mirrored else labels)
        where, shape = _in_photograph(source, face, view)
        if labels.shape != shape:
            raise FeatureStoreError(
                f"the mask {file} is {labels.shape[1]} × {labels.shape[0]} pixels; it has to be as large as the network's input, "
                f"{size} × {size}, or as the photograph of {face}/{view}, {shape[1]} × {shape[0]}."
            )
        x, y = np.rint(where).astype(int).transpose(2, 0, 1)
        inside = (x >= 0) & (y >= 0) & (x < shape[1]) & (y < shape[0])
        there = np.full(inside.shape, len(names), labels.dtype)
        there[inside] = labels[y[inside], x[inside]]
        return Regions((*names, OUTSIDE), there)

    return regions_of


def _mask_table(path: Path) -> tuple[tuple[str, ...], dict[int, int], str]:
    """Names of regions; of each value in a mask (a colour as 0xRRGGBB) the place of its name; and the column of values."""
    if not path.is_file():
        raise FeatureStoreError(f"there is no file {path} that says what the mask's regions are.")
    table = read_csv(path, dtype=str, keep_default_na=False)
    column = next((name for name in ("label", "colour") if name in table), None)
    if column is None or "name" not in table or not len(table):
        raise FeatureStoreError(
            f"{path} needs rows with `label,name` or `colour,name`; it has {listing(table.columns)}."
        )
    names = tuple(dict.fromkeys(table["name"]))
    values: dict[int, int] = {}
    for line, (text, name) in enumerate(zip(table[column], table["name"], strict=True), start=2):
        try:
            value = int(text.strip().removeprefix("#"), 16) if column == "colour" else int(text)
        except ValueError:
            wanted = "a colour such as #ff8000" if column == "colour" else "a whole number"
            raise FeatureStoreError(f"{path} line {line}: the {column} {text!r} is not {wanted}.") from None
        if values.setdefault(value, names.index(name)) != names.index(name):
            raise FeatureStoreError(f"{path} line {line}: the {column} {text} has two names.")
    return names, values, column


def _mask_files(path: Path) -> dict[tuple[str, str], Path]:
    table = read_csv(path, dtype=str, keep_default_na=False)
    if not {*KEY, "mask"} <= set(table.columns):
        raise FeatureStoreError(f"{path} needs the columns face_id, view and mask; it has {listing(table.columns)}.")
    rows = table[[*KEY, "mask"]].itertuples(index=False)
    return {(face, view): path.parent / Path(mask).expanduser() for face, view, mask in rows}


def _read_mask(path: Path, names: tuple[str, ...], values: Mapping[int, int], column: str) -> np.ndarray:
    """(height, width) int16 of places in ``names``."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            refuse_large(image)
            if column == "colour":
                pixels = np.asarray(image.convert("RGB"), np.int64) @ [1 << 16, 1 << 8, 1]
            elif image.mode in ("1", "L", "P", "I", "I;16"):
                pixels = np.asarray(image).astype(np.int64)
            else:
                raise FeatureStoreError(
                    f"the mask {path} is in colours: its table needs the column `colour`, not `label`."
                )
    except (OSError, ValueError, SyntaxError, MemoryError, Image.DecompressionBombError, ImageError) as error:
        raise FeatureStoreError(f"the mask {path} cannot be read as a PNG: {error}.") from None
    found, inverse, counts = np.unique(pixels, return_inverse=True, return_counts=True)
    for value, count in zip(found.tolist(), counts.tolist(), strict=True):
        if value not in values:
            shown = f"#{value:06x}" if column == "colour" else value
            raise FeatureStoreError(
                f"the mask {path} has the {column} {shown} ({count:,} pixels), which its table lacks."
            )
    places = np.array([values[value] for value in found.tolist()], np.int16)
    return places[inverse].reshape(pixels.shape)


@dataclass(frozen=True)
class _Shares:
    """Of each picture, a row of ``pictures`` (method, choice, row, place, view): (n, regions) of three numbers.

    ``share`` of the picture's absolute relevance, ``net`` (signed sum over the picture's absolute sum), and ``area`` (share of
    pixels). ``faces`` (trial, place) and ``trials`` (trial) are those of the rows.
    """

    pictures: pd.DataFrame
    names: tuple[str, ...]
    share: np.ndarray
    net: np.ndarray
    area: np.ndarray
    faces: np.ndarray
    trials: np.ndarray


def _shares(maps: xr.Dataset, regions_of: RegionsOf) -> _Shares:
    rows, shares, nets, areas = [], [], [], []
    names: tuple[str, ...] = ()
    for picture in pictures(maps):
        regions, relevance = regions_of(picture.face, picture.view), picture.relevance.ravel().astype(np.float64)
        if regions.labels.shape != picture.relevance.shape:
            raise FeatureStoreError(
                f"regions of {regions.labels.shape[1]} × {regions.labels.shape[0]} pixels do not fit maps of "
                f"{picture.relevance.shape[1]} × {picture.relevance.shape[0]}: are they of the same source?"
            )
        if names not in ((), regions.names):
            raise FeatureStoreError(
                f"the regions of {picture.face}/{picture.view} are {listing(regions.names)}, those before are {listing(names)}."
            )
        names, labels = regions.names, regions.labels.ravel()
        total = np.abs(relevance).sum()
        if total == 0:
            continue
        rows.append((picture.method, picture.choice, picture.row, picture.place + 1, picture.view))
        shares.append(np.bincount(labels, np.abs(relevance), len(names)) / total)
        nets.append(np.bincount(labels, relevance, len(names)) / total)
        areas.append(np.bincount(labels, minlength=len(names)) / len(labels))
    if not rows:
        raise FeatureStoreError("the maps hold no relevance: none was computed, or all of it is zero.")
    table = pd.DataFrame(rows, columns=["method", "choice", "row", "place", "view"])
    return _Shares(
        table,
        names,
        np.stack(shares),
        np.stack(nets),
        np.stack(areas),
        np.asarray(maps["face_id"].values, object),
        maps["trial"].values,
    )


def region_table(maps: xr.Dataset, regions_of: RegionsOf, by: Literal["view", "place"] | None = None) -> pd.DataFrame:
    """How much relevance is in each region: a row for each method, choice and region (and view, or place from 1).

    ``share`` of the absolute relevance of a picture, 0 … 1; ``net``, the signed sum over the picture's absolute sum; ``area``,
    the share of its pixels; ``density``, share over area: 1 where relevance is spread evenly. Each is the mean over trials,
    in which the pictures of a trial count as one; a picture without relevance is left out. ``n`` is pictures. ``share_low``
    and so on are 95 % intervals over faces (``clustered_mean``). ``maps`` is read a trial at a time. Regions that no picture
    has are left out.
    """
    return _table(_shares(maps, regions_of), by)


def _table(shares: _Shares, by: Literal["view", "place"] | None) -> pd.DataFrame:
    there = np.flatnonzero(shares.area.any(axis=0))
    columns = ["method", "choice", *([by] if by else [])]
    rows = []
    for key, group in shares.pictures.groupby(columns, sort=False):
        trials, share, net, area = _by_trial(shares, group)
        clusters = [shares.faces[trials]]
        for i in there:
            size = float(area[:, i].mean())
            density = float(share[:, i].mean()) / size if size else np.nan
            # A ratio of means, whose spread is that of its linearisation.
            about = density + (share[:, i] - density * area[:, i]) / size if size else np.full(len(trials), np.nan)
            values = {"share": share[:, i], "net": net[:, i], "density": about}
            row = {**dict(zip(columns, key, strict=True)), "region": shares.names[i], "n": len(group), "area": size}
            for name, (least, most) in {"share": (0, 1), "net": (-1, 1), "density": (0, np.inf)}.items():
                mean = clustered_mean(values[name], clusters)
                low, high = (float(np.clip(end, least, most)) for end in (mean.low, mean.high))
                row |= {name: mean.value, f"{name}_low": low, f"{name}_high": high}
            rows.append(row)
    order = [*columns, "region", "n", "share", "share_low", "share_high", "net", "net_low", "net_high"]
    return pd.DataFrame(rows)[[*order, "area", "density", "density_low", "density_high"]]


def _by_trial(shares: _Shares, group: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows of trials, and the means over their pictures in ``group`` of share, net and area, (trials, regions) each."""
    trials, inverse = np.unique(group["row"].to_numpy(), return_inverse=True)
    counts, where = np.bincount(inverse)[:, None], group.index.to_numpy()

    def mean(values: np.ndarray) -> np.ndarray:
        sums = np.zeros((len(trials), values.shape[1]))
        np.add.at(sums, inverse, values[where])
        return sums / counts

    return trials, mean(shares.share), mean(shares.net), mean(shares.area)


def compare_regions(
    runs: Mapping[str, xr.Dataset], regions_of: RegionsOf | Mapping[str, RegionsOf]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Heads, layers or networks beside each other: their ``region_table`` with a column ``run``, and the differences of pairs.

    ``regions_of`` is one for all runs, or one for each where their inputs differ. Differences have a row for each pair of
    runs, method, choice and region that both have: ``first``, ``second``, ``n`` trials that both explain, ``difference`` of
    share with ``low``, ``high`` and ``p`` over faces, and ``p_holm``, corrected for the rows of the same method and choice.
    FeatureStoreError for fewer than two runs, and for two without a trial, method or region in common.
    """
    if len(runs) < 2:
        raise FeatureStoreError("a comparison needs two explained runs or more.")
    found = {
        name: _shares(maps, regions_of[name] if isinstance(regions_of, Mapping) else regions_of)
        for name, maps in runs.items()
    }
    table = pd.concat([_table(shares, None).assign(run=name) for name, shares in found.items()], ignore_index=True)
    table.insert(0, "run", table.pop("run"))
    rows = [row for one, other in combinations(found, 2) for row in _differences(one, found[one], other, found[other])]
    differences = pd.DataFrame(rows)
    groups = differences.groupby(["method", "choice"])["p"]
    return table, differences.assign(p_holm=groups.transform(lambda p: holm(p.to_numpy(float))))


def _differences(one: str, first: _Shares, other: str, second: _Shares) -> list[dict[str, object]]:
    shared = np.intersect1d(first.trials, second.trials)
    rows = [{trial: row for row, trial in enumerate(each.trials)} for each in (first, second)]
    for trial in shared:
        faces = [list(each.faces[row[trial]]) for each, row in zip((first, second), rows, strict=True)]
        if faces[0] != faces[1]:
            raise FeatureStoreError(
                f"trial {trial} shows {listing(faces[0])} in {one} and {listing(faces[1])} in {other}: they explain other trials."
            )
    regions = [name for name in first.names if name in second.names]
    found = []
    theirs = dict(list(second.pictures.groupby(["method", "choice"], sort=False)))
    for key, group in first.pictures.groupby(["method", "choice"], sort=False):
        if key not in theirs or not regions:
            continue
        trials, share, _, area = _by_trial(first, group)
        other_trials, other_share, _, other_area = _by_trial(second, theirs[key])
        _, mine, others = np.intersect1d(first.trials[trials], second.trials[other_trials], return_indices=True)
        if not len(mine):
            continue
        for name in regions:
            i, j = first.names.index(name), second.names.index(name)
            if not (area[:, i].any() or other_area[:, j].any()):
                continue
            mean = clustered_mean(share[mine, i] - other_share[others, j], [first.faces[trials[mine]]])
            numbers = {"difference": mean.value, "low": mean.low, "high": mean.high, "p": mean.p}
            names = {"first": one, "second": other, "method": key[0], "choice": key[1], "region": name}
            found.append({**names, "n": len(mine), **numbers})
    if not found:
        raise FeatureStoreError(f"{one} and {other} have no trial, method or region in common.")
    return found
