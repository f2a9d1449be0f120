"""Where the face is in each photograph: a table's boxes and landmarks, or VGGFace2's ``loose_bb_*.csv``."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.keys import BOX, KEY, LANDMARKS, Place
from featurestore.photos.csv_files import as_numbers, read_csv
from featurestore.photos.keys import IMAGE_SUFFIXES, FoundFaces
from featurestore.photos.recipes import Recipe
from featurestore.text import listing, shortened

_BOX_FILE = ["NAME_ID", "X", "Y", "W", "H"]
_FIND = "pipelines/find_faces.py finds faces and writes both."
_ENDINGS = re.compile(rf"({'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))})$", re.IGNORECASE)


def with_boxes(found: FoundFaces, boxes: str | os.PathLike[str]) -> FoundFaces:
    """``found`` with each face's box out of a CSV, to be cut by it.

    The CSV is as VGGFace2's ``loose_bb_*.csv``, ``NAME_ID`` (face/view), ``X, Y, W, H``; or as pipelines/find_faces.py
    writes it, ``face_id``, ``view`` and ``BOX``, with ``LANDMARKS`` or without. Boxes of photographs that are not here are
    passed over; columns of ``found`` of the same names are replaced. Raises FeatureStoreError for a file that is no such
    table, a box that is no box, and photographs without one.
    """
    path = Path(boxes).expanduser()
    table = _read_boxes(path)
    names = found.table["face_id"] + "/" + found.table["view"]
    lacking = names[table.index.get_indexer(names) < 0]
    if len(lacking):
        raise FeatureStoreError(
            f"{len(lacking)} of {len(names)} photographs have no box in {path}: {listing(lacking, 3)}. Its NAME_ID are such as "
            f"{listing(table.index[:1])}, and have to be face/view. Add boxes, or give `images` a CSV (face_id, view, path) "
            "of those that have one."
        )
    cut = table.loc[names].reset_index(drop=True)
    kept = found.table.drop(columns=cut.columns, errors="ignore").reset_index(drop=True)
    return replace(found, table=pd.concat([kept, cut], axis=1), boxed=True)


def _read_boxes(path: Path) -> pd.DataFrame:
    """Columns ``BOX``, and ``LANDMARKS`` where they are given, (float64) by face/view."""
    if not path.is_file():
        raise FeatureStoreError(f"there is no file {path} (or it is a folder). Check the path given with `boxes`.")
    as_text = dict.fromkeys(["NAME_ID", *KEY], str)
    table = read_csv(path, dtype=as_text, keep_default_na=False, skipinitialspace=True)
    if set(KEY) <= set(table.columns):
        return _found_boxes(path, table)
    missing = [name for name in _BOX_FILE if name not in table.columns]
    if missing:
        raise FeatureStoreError(
            f"{path} has no column {', '.join(missing)}; it has {listing(table.columns, 20)}. "
            f"Boxes are read as in VGGFace2's loose_bb_*.csv: NAME_ID, X, Y, W, H; or face_id, view, {', '.join(BOX)}: {_FIND}"
        )
    values = table[_BOX_FILE[1:]].apply(as_numbers).to_numpy(float)
    bad = np.flatnonzero(~(np.abs(values) < 1e9).all(axis=1) | (values[:, 2:] <= 0).any(axis=1))
    if len(bad):
        given = ", ".join(f"{name}={shortened(str(table[name].iloc[bad[0]]))}" for name in _BOX_FILE)
        raise FeatureStoreError(f"{path} line {bad[0] + 2} is no box: {given}. W and H are pixels, more than 0.")
    names = table["NAME_ID"].str.strip().str.replace(_ENDINGS, "", regex=True)
    if names.duplicated().any():
        raise FeatureStoreError(f"{path} has two boxes for {shortened(names[names.duplicated()].iloc[0])}. Remove one.")
    return pd.DataFrame(values, columns=list(BOX), index=names)


def _found_boxes(path: Path, table: pd.DataFrame) -> pd.DataFrame:
    columns = [*BOX, *(name for name in LANDMARKS if set(LANDMARKS) <= set(table.columns))]
    places = numbers(table, columns, f"{path}")
    names = table["face_id"] + "/" + table["view"]
    if names.duplicated().any():
        raise FeatureStoreError(f"{path} has two boxes for {shortened(names[names.duplicated()].iloc[0])}. Remove one.")
    return places.set_index(names)


def numbers(table: pd.DataFrame, columns: Iterable[str], what: str) -> pd.DataFrame:
    """``columns`` of a table of photographs (``BOX``, ``LANDMARKS``) as float64.

    FeatureStoreError, which calls the table ``what``, if one is missing or a value is no number of pixels.
    """
    columns = list(columns)
    missing = [name for name in columns if name not in table.columns]
    if missing:
        raise FeatureStoreError(f"{what} has no column {', '.join(missing)} (pixels in the decoded picture). {_FIND}")
    values = table[columns].apply(as_numbers).astype(float)
    wrong = ~(values.abs() < 1e9)  # nor NaN
    for name in set(columns) & set(BOX[2:]):
        wrong[name] |= values[name] <= 0
    if wrong.to_numpy().any():
        row = int(np.flatnonzero(wrong.any(axis=1))[0])
        name = wrong.columns[wrong.iloc[row]][0]
        least = ", more than 0" if name in BOX[2:] else ""
        key = "/".join(table[part].iloc[row] for part in KEY)
        raise FeatureStoreError(
            f"{what}: {name} of {shortened(key)} is {shortened(str(table[name].iloc[row]))}, which is no number of pixels{least}."
        )
    return values.reset_index(drop=True)


def place_of(item: Mapping[str, Any], recipe: Recipe) -> Place | None:
    """The numbers among an item's coordinates by which ``recipe`` cuts it out, None if it takes whole pictures.

    FeatureStoreError if the item does not have them.
    """
    if not recipe.place:
        return None
    try:
        return tuple(float(item[name]) for name in recipe.place)
    except (KeyError, TypeError, ValueError):
        raise FeatureStoreError(
            f"the store's recipe {recipe.name!r} cuts faces out by {recipe.place[0]} …, but its items do not have these numbers."
        ) from None
