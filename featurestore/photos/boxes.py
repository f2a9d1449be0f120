"""Where the face is in each photograph, as VGGFace2's ``loose_bb_*.csv`` says it."""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.keys import BOX, Box
from featurestore.photos.csv_files import read_csv
from featurestore.photos.keys import IMAGE_SUFFIXES, FoundFaces
from featurestore.text import listing

_BOX_FILE = ["NAME_ID", "X", "Y", "W", "H"]
_ENDINGS = re.compile(rf"({'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))})$", re.IGNORECASE)


def with_boxes(found: FoundFaces, boxes: str | os.PathLike[str]) -> FoundFaces:
    """``found`` with each face's box out of a CSV as VGGFace2's ``loose_bb_*.csv``: ``NAME_ID`` (face/view), ``X, Y, W, H``.

    Boxes of photographs that are not here are passed over. Raises FeatureStoreError for a file that is no such table,
    a box that is no box, and photographs without one.
    """
    path = Path(boxes).expanduser()
    table = _read_boxes(path)
    clash = [name for name in BOX if name in found.table.columns]
    if clash:
        raise FeatureStoreError(
            f"the photographs' CSV has a column {clash[0]} already. Rename it, or leave `boxes` out."
        )
    names = found.table["face_id"] + "/" + found.table["view"]
    lacking = names[~names.isin(table.index)]
    if len(lacking):
        raise FeatureStoreError(
            f"{len(lacking)} of {len(names)} photographs have no box in {path}: {listing(lacking, 3)}. Its NAME_ID are such as "
            f"{listing(table.index[:1])}, and have to be face/view. Add boxes, or give `images` a CSV (face_id, view, path) "
            "of those that have one."
        )
    cut = table.loc[names].reset_index(drop=True)
    return replace(found, table=pd.concat([found.table.reset_index(drop=True), cut], axis=1), boxed=True)


def _read_boxes(path: Path) -> pd.DataFrame:
    """Columns ``BOX`` (float64) by NAME_ID."""
    if not path.is_file():
        raise FeatureStoreError(f"there is no file {path} (or it is a folder). Check the path given with `boxes`.")
    table = read_csv(path, dtype={"NAME_ID": str}, keep_default_na=False, skipinitialspace=True)
    missing = [name for name in _BOX_FILE if name not in table.columns]
    if missing:
        raise FeatureStoreError(
            f"{path} has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}. "
            "Boxes are read as in VGGFace2's loose_bb_*.csv: NAME_ID, X, Y, W, H."
        )
    values = table[_BOX_FILE[1:]].apply(pd.to_numeric, errors="coerce").to_numpy(float)
    bad = np.flatnonzero(~(np.abs(values) < 1e9).all(axis=1) | (values[:, 2:] <= 0).any(axis=1))
    if len(bad):
        given = ", ".join(f"{name}={table[name].iloc[bad[0]]}" for name in _BOX_FILE)
        raise FeatureStoreError(f"{path} line {bad[0] + 2} is no box: {given}. W and H are pixels, more than 0.")
    names = table["NAME_ID"].str.strip().str.replace(_ENDINGS, "", regex=True)
    if names.duplicated().any():
        raise FeatureStoreError(f"{path} has two boxes for {names[names.duplicated()].iloc[0]}. Remove one.")
    return pd.DataFrame(values, columns=list(BOX), index=names)


def box_of(item: Mapping[str, Any]) -> Box:
    """The box among an item's coordinates; FeatureStoreError if it has none."""
    if not all(name in item for name in BOX):
        raise FeatureStoreError(
            f"the store's recipe cuts faces out by their boxes, but its items have no {', '.join(BOX)}."
        )
    left, top, width, height = (float(item[name]) for name in BOX)
    return left, top, width, height
