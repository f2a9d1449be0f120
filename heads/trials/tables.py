"""Files of trials, read and checked: which columns, which faces, who was odd."""

import re
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.text import listing

FACES = ("face_1", "face_2", "face_3")
VIEWS = ("view_1", "view_2", "view_3")
ODD = "odd"
TIME_OUT = "0"  # in the published tables, whose faces count from 1
_PUBLISHED = {"head1": "face_1", "head2": "face_2", "head3": "face_3", "head_odd": ODD}


def read_table(path: Path) -> pd.DataFrame:
    """A file of trials with its columns under our names; faces, views and odd as str, ``line`` counts from 1 after the header."""
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, dtype=dict.fromkeys([*FACES, *VIEWS, ODD], str))
    except FileNotFoundError:
        raise FeatureStoreError(f"there is no file of trials {path}.") from None
    except (ValueError, OSError, ImportError, EOFError, KeyError, NotImplementedError, zlib.error) as error:
        raise FeatureStoreError(
            f"{path} cannot be read as a table of trials: {str(error).partition(chr(10))[0]}"
        ) from None
    table = table.reset_index(drop=True)
    for name, ours in _PUBLISHED.items():
        if name in table.columns and ours not in table.columns:
            table[ours] = table[name]
    missing = [name for name in (*FACES, ODD) if name not in table.columns]
    if missing:
        raise FeatureStoreError(
            f"{path} has no column {listing(missing)}; its columns are {listing(table.columns, 20)}. Trials need "
            "face_1, face_2, face_3, odd (or head1, head2, head3, head_odd)."
        )
    if any(view in table.columns for view in VIEWS) and not all(view in table.columns for view in VIEWS):
        raise FeatureStoreError(f"{path} has some of the columns {', '.join(VIEWS)} and not all.")
    for name in (*FACES, *(view for view in VIEWS if view in table.columns), ODD):
        text = table[name].map(as_key, na_action=None)
        table[name] = text.astype(object)
    table["line"] = np.arange(1, len(table) + 1)
    return table


def as_key(value: object) -> str:
    """A key as written, but 7.0 as 7: an empty cell in the column makes tables write whole numbers so."""
    text = "" if value is None or value is pd.NA or value != value else str(value).strip()
    return text[:-2] if re.fullmatch(r"\d+\.0", text) else text
