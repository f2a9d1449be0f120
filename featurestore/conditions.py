"""Conditions on the columns of a table, as pandas expressions."""

import re

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.text import near_matches


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
        unknown = re.match(r"name '(.*)' is not defined", str(error))
        hint = f"{near_matches(unknown[1], map(str, frame.columns))} " if unknown else ""
        raise FeatureStoreError(
            f"`where` {condition!r} cannot be evaluated: {type(error).__name__}: {error}. {hint}"
            'It is a comparison such as "gender == \'female\'" or "yaw <= 30".'
        ) from None
    if isinstance(held, pd.Series) and isinstance(held.dtype, pd.BooleanDtype):
        held = held.to_numpy(bool, na_value=False)  # what is missing meets no condition
    held = np.asarray(held)
    if held.dtype != bool or held.shape != (len(frame),):
        raise FeatureStoreError(
            f"`where` {condition!r} is no condition: it gives {held.dtype}, not true or false. Compare with ==, <, in …: "
            "\"gender == 'female'\"."
        )
    return held
