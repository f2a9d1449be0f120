"""The one error type that users are meant to read."""

import difflib
from collections.abc import Iterable

_MOST_NAMES = 50


class FeatureStoreError(Exception):
    """Something the user can put right: the message says what, why and what to do.

    Scripts print the message without a traceback and exit with status 1.
    """


def near_matches(name: str, known: Iterable[str]) -> str:
    """``" Did you mean a, b?"`` for the names closest to ``name``, or all of them if none is close."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {', '.join(close)}?"
    return f"It is one of: {listing(known, _MOST_NAMES)}."


def listing(things: Iterable[object], most: int = 5) -> str:
    """The first few of ``things``, comma separated, and how many more there are."""
    things = list(things)
    shown = ", ".join(str(thing) for thing in things[:most])
    return shown if len(things) <= most else f"{shown} and {len(things) - most} more"
