"""Conditions on the columns of a table, as pandas expressions: which rows meet them, and which table they are about."""

import re
from collections.abc import Collection, Iterable

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.text import listing


def divide_conditions(
    conditions: Iterable[str], trials: Collection[str], items: Collection[str]
) -> tuple[list[str], list[str]]:
    """Which conditions are about trials and which about items, by the columns they name; FeatureStoreError if that is unclear."""
    of_trials: list[str] = []
    of_items: list[str] = []
    for condition in conditions:
        unquoted = re.sub(r"'[^']*'|\"[^\"]*\"", "", condition)
        names = set(re.findall(r"`([^`]*)`", unquoted)) | set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", unquoted))
        of_trial, of_item = names & set(trials), names & set(items)
        if bool(of_trial) == bool(of_item):
            problem = "mixes columns of trials and of items" if of_trial else "names no column there is"
            raise FeatureStoreError(
                f"`where` {condition!r} {problem}. Columns of the trials: {listing(trials, 20)}. Of the items: "
                f"{listing(sorted(items), 30)}. Give one `where` for each kind."
            )
        (of_trials if of_trial else of_items).append(condition)
    return of_trials, of_items


def rows_that_meet(condition: str, table: pd.DataFrame) -> np.ndarray:
    """bool per row: whether a pandas expression on its columns or index is true.

    FeatureStoreError if it cannot be evaluated, is no condition, or compares text with a number, which never are equal.
    """
    frame = table.reset_index() if table.index.names[0] else table
    for name in frame.columns:
        text = not pd.api.types.is_numeric_dtype(frame[name])
        bare = rf"(?<![\w.])`?{re.escape(str(name))}`?\s*(?:[=!<>]=?|(?:not\s+)?in)\s*[\[(]?\s*[-+]?\d"
        if text and re.search(bare, condition):
            raise FeatureStoreError(
                f"`where` {condition!r} compares {name} with a number, but it holds text, such as {frame[name].iloc[0]!r}. "
                "Put the number in quotes."
            )
    try:
        held = frame.eval(condition)
    except Exception as error:  # whatever an expression can raise is the user's to read
        raise FeatureStoreError(
            f"`where` {condition!r} cannot be evaluated: {type(error).__name__}: {error}. "
            'It is a comparison such as "gender == \'female\'" or "yaw <= 30".'
        ) from None
    held = np.asarray(held)
    if held.dtype != bool or held.shape != (len(frame),):
        raise FeatureStoreError(
            f"`where` {condition!r} is no condition: it gives {held.dtype}, not true or false. Compare with ==, <, in …: "
            "\"gender == 'female'\"."
        )
    return held
