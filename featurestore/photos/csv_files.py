"""Untrusted CSV files."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from featurestore.errors import FeatureStoreError

_MOST_COLUMNS = 5_000


def read_csv(path: Path, **options: Any) -> pd.DataFrame:
    """The file as ``pandas.read_csv`` reads it; FeatureStoreError for no CSV, and for a line with too many or too few fields."""
    try:
        _check_lines(path, bool(options.get("skipinitialspace")))
        return pd.read_csv(path, index_col=False, **options)
    except (ValueError, UnicodeDecodeError, csv.Error) as error:
        raise FeatureStoreError(f"{path} cannot be read as a CSV: {error}.") from None


def as_numbers(column: pd.Series) -> pd.Series:
    """A column's numbers; NaN where there is none."""
    try:
        return pd.to_numeric(column, errors="coerce")
    except OverflowError:  # whole numbers beyond those of a float: of so many digits the first will do
        return pd.to_numeric(column.astype(str).str.slice(stop=300), errors="coerce")


def refuse_wide(header: Sequence[str]) -> None:
    """ValueError for more columns than a table of this kind has: what is done for each takes time."""
    if len(header) > _MOST_COLUMNS:
        raise ValueError(f"it has {len(header):,} columns, more than {_MOST_COLUMNS:,}")


def _check_lines(path: Path, skipinitialspace: bool) -> None:
    """ValueError for a line with more or fewer fields than the header: its values would slide into other columns."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True, skipinitialspace=skipinitialspace)
        header = next(reader, [])
        refuse_wide(header)
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(f"line {reader.line_num} has {len(row)} fields, the header {len(header)}")
