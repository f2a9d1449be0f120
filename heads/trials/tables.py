"""Files of trials, read and checked: which columns, which faces, who was odd."""

import csv
import io
import zlib
from collections.abc import Collection
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.photos.csv_files import refuse_wide
from featurestore.text import listing

FACES = ("face_1", "face_2", "face_3")
VIEWS = ("view_1", "view_2", "view_3")
ODD = "odd"
ODD_POSITION = "odd_position"  # 1, 2 or 3: for trials that show one face twice
ODD_VIEW = "odd_view"  # or the view of the odd one
TIME_OUT = "0"  # in the published tables, whose faces count from 1
_PUBLISHED = {"head1": "face_1", "head2": "face_2", "head3": "face_3", "head_odd": ODD}


_OURS = ("line", "fault", "source")  # columns that are added to those of a file
_KEYS = (*FACES, *VIEWS, ODD, ODD_POSITION, ODD_VIEW)
EXAMPLE = (  # the second picture of Anna was the odd one
    "face_1,view_1,face_2,view_2,face_3,view_3,odd,odd_position / anna,left,anna,right,ben,left,anna,2"
)


def read_table(path: Path) -> pd.DataFrame:
    """A file of trials with its columns under our names; keys as str.

    ``line`` is the line an editor shows, or in Parquet the row, from 1 on. ``fault`` is not empty in a line with more or fewer
    fields than the header, whose values would be in wrong columns: its cells are empty. Without ``odd`` but with
    ``odd_position``, ``odd`` is empty. Columns of the file called line, fault or source become ``trial_line`` and so on;
    ``attrs["renamed"]`` maps the new names to those of the file.
    """
    try:
        if path.suffix.lower() in (".parquet", ".pq"):
            table = _without_ours(pd.read_parquet(path).reset_index(drop=True))
            table["line"], table["fault"] = np.arange(1, len(table) + 1), ""
        else:
            table = _read_csv(path)
    except FileNotFoundError:
        raise FeatureStoreError(f"there is no file of trials {path}. Check the path given with `trials`.") from None
    except (ValueError, OSError, ImportError, EOFError, KeyError, NotImplementedError, zlib.error, csv.Error) as error:
        raise FeatureStoreError(
            f"{path} cannot be read as a table of trials: {str(error).partition(chr(10))[0]}"
        ) from None
    for name, ours in _PUBLISHED.items():
        if name in table.columns and ours not in table.columns:
            table[ours] = table[name]
    if ODD_POSITION in table.columns and ODD not in table.columns:
        table[ODD] = ""
    missing = [name for name in (*FACES, ODD) if name not in table.columns]
    if missing:
        raise FeatureStoreError(
            f"{path} has no column {listing(missing)}; its columns are {listing(table.columns, 20)}. Trials need "
            "face_1, face_2, face_3 and odd or odd_position (or head1, head2, head3, head_odd)."
        )
    if any(view in table.columns for view in VIEWS) and not all(view in table.columns for view in VIEWS):
        raise FeatureStoreError(f"{path} has some of the columns {', '.join(VIEWS)} and not all.")
    for name in (name for name in _KEYS if name in table.columns):
        table[name] = as_keys(table[name])
    return table


def _read_csv(path: Path) -> pd.DataFrame:
    """With ``line`` and ``fault``."""
    with fsspec.open(str(path), "rt", compression="infer", encoding="utf-8-sig", newline="") as file:
        text = file.read()
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, [])
    refuse_wide(header)
    rows, lines, next_line = [], [], reader.line_num + 1
    for row in reader:
        if row:
            rows.append(row)
            lines.append(next_line)
        next_line = reader.line_num + 1
    faults = [_wrong_width(len(row), len(header)) for row in rows]
    cells = [[""] * len(header) if fault else row for row, fault in zip(rows, faults, strict=True)]
    clean = io.StringIO(newline="")
    csv.writer(clean).writerows([header, *cells])
    clean.seek(0)
    table = pd.read_csv(clean, index_col=False, skip_blank_lines=False)
    for column, name in enumerate(header):
        text = pd.Series([row[column] for row in cells], dtype=object)
        numbers = pd.api.types.is_numeric_dtype(table[name]) and not text.str.match(r"0\d").any()
        if name in _KEYS or not numbers:
            table[name] = text  # as written: a face may be called 007, or NA
    return _without_ours(table).assign(line=np.array(lines, int), fault=pd.Series(faults, dtype=object))


def _without_ours(table: pd.DataFrame) -> pd.DataFrame:
    called = {name: free_name(f"trial_{name}", table.columns) for name in _OURS if name in table.columns}
    table = table.rename(columns=called)
    table.attrs["renamed"] = {new: name for name, new in called.items()}
    return table


def free_name(name: str, taken: Collection[str]) -> str:
    """``name``, with underscores if it is taken."""
    while name in taken:
        name += "_"
    return name


def _wrong_width(n: int, header: int) -> str:
    return f"have more or fewer fields than the header's {header}" if n != header else ""


def as_keys(column: pd.Series) -> pd.Series:
    """A column of keys as text; see ``as_key``."""
    return pd.Series([as_key(value) for value in column.to_numpy(object)], column.index, dtype=object)


def as_key(value: object) -> str:
    """A key as written, but 7.0 as 7: an empty cell in the column makes tables write whole numbers so."""
    if not isinstance(value, str) and pd.api.types.is_scalar(value) and pd.isna(value):
        return ""
    text = str(value).strip()
    return text[:-2] if text.endswith(".0") and text[:-2].isdecimal() else text
