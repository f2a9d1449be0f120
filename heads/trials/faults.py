"""What is wrong with the rows of a table of trials, gathered so that one message tells all of it."""

from typing import Any

import numpy as np
import pandas as pd

from featurestore.text import listing


class Faults:
    """The first fault of each row: ``kind`` (n,) str, empty where there is none, and the ``value`` it is about."""

    def __init__(self, kind: pd.Series) -> None:
        self.kind = kind.to_numpy(object).copy()
        self.value = np.full(len(kind), "", object)

    @property
    def found(self) -> np.ndarray:
        """bool per row."""
        return np.asarray(self.kind != "")

    def note(self, rows: Any, kind: str, values: pd.Series | np.ndarray | str = "") -> None:
        """``rows`` (n,) bool have a fault of this kind, "name …": it is noted where there is none yet."""
        new = np.asarray(rows, bool) & ~self.found
        self.kind[new] = kind
        self.value[new] = values if isinstance(values, str) else np.asarray(values, object)[new]

    def describe(self, lines: np.ndarray) -> str:
        """One line for each kind: how many rows, some of the values, and the first lines."""
        told = []
        for kind in pd.unique(self.kind[self.found]):
            rows = self.kind == kind
            values = [value for value in pd.unique(self.value[rows]) if value != ""]
            about = f": {listing(map(repr, values), 3)}" if values else ""
            where = f"line{'s' if rows.sum() > 1 else ''} {listing(lines[rows])}"
            told.append(f"  {int(rows.sum())} {kind}{about} ({where})")
        return "\n".join(told)
