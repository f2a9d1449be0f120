"""How names, numbers and lists read in messages and tables."""

import difflib
import re
from collections.abc import Iterable, Sequence

MIRROR = "mirror-"  # beginning of the name of a folder that holds copies of what is kept at a URL
_SCHEMES = "s3|gs|az|https?"
_MOST_NAMES = 50
_LONGEST_NAME = 300  # characters, in a list
_MOST_COMPARED, _LONGEST_COMPARED = 2_000, 100  # names, and characters of them: what is near takes as long as both


def shortened(text: str, most: int = 80) -> str:
    """``text``; of one longer than ``most`` characters the beginning, and how long it is."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def listing(things: Iterable[object], most: int = 5) -> str:
    """The first few of ``things``, comma separated and none of them long, and how many more there are."""
    things = list(things)
    shown = ", ".join(shortened(str(thing), _LONGEST_NAME) for thing in things[:most])
    return shown if len(things) <= most else f"{shown} and {len(things) - most} more"


def near_matches(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """``"Did you mean a, b?"`` for the names closest to ``name``; if none is close, ``otherwise`` or a list of all."""
    known = list(known)
    compared = [each for each in known[:_MOST_COMPARED] if len(each) <= _LONGEST_COMPARED]
    close = difflib.get_close_matches(name[:_LONGEST_COMPARED], compared, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {', '.join(close)}?"
    return otherwise or f"It is one of: {listing(known, _MOST_NAMES)}."


def human_bytes(n: float) -> str:
    """``98.0 KiB``: three digits and a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"


def human_duration(seconds: float) -> str:
    """``8 s``, ``12 min``, ``3.5 h``, ``2.0 days``: two digits and the unit that suits, at least one second."""
    for unit, size, until in (("s", 1, 99.5), ("min", 60, 99.5 * 60), ("h", 3600, 47.5 * 3600)):
        if seconds < until:
            n = max(seconds, 1) / size
            return f"{n:.1f} {unit}" if unit == "h" and n < 9.95 else f"{n:.0f} {unit}"
    return f"{seconds / 86400:.1f} days"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, its columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def natural_order(text: str) -> tuple[tuple[tuple[int, str] | str, ...], str]:
    """Sort key under which ``"2" < "10"`` and ``"view9" < "view10"``; numbers may have any number of digits."""
    parts = re.split(r"([0-9]+)", text)
    return tuple(_number_order(part) if i % 2 else part for i, part in enumerate(parts)), text


def _number_order(digits: str) -> tuple[int, str]:
    digits = digits.lstrip("0")
    return len(digits), digits


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sorted as people do: 2 before 10."""
    return sorted(names, key=natural_order)


def with_urls(text: str) -> str:
    """A message with URLs where it says a path of a folder that mirrors them, or ``s3:/bucket``, as ``pathlib`` writes it."""
    text = re.sub(rf"[^\s'\"]*/{MIRROR}[0-9a-f]+/({_SCHEMES}):/+", r"\1://", text)
    return re.sub(rf"(?<![\w/])({_SCHEMES}):/(?=[^/\s])", r"\1://", text)
