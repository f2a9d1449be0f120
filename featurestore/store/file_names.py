"""Names of faces, views and layers as names of files, so that the file tells the name again."""

import re
from collections import Counter
from collections.abc import Iterable

from featurestore.files import safe_name

TABLE = "items.csv"  # beside exported arrays: the key and metadata of each row
FILE_COLUMN = "npy_file"  # of that table, where each photograph has a file of its own, below the table's folder
_LONGEST = 200  # of the 255 bytes that file systems allow, an ending and that of a partial file are left


def file_name(name: str, capitals: bool = False) -> str:
    """``name`` itself if it is ASCII letters, digits and ``_.+@-``; other characters as ``=`` and two hex digits a byte.

    One that does not begin with a letter or a digit is given a ``_`` before. With ``capitals`` these are escaped as well, for
    file systems that do not tell them apart. Any text gives a safe name, and ``original_name`` undoes it.
    """
    plain = r"[^a-z0-9_.+@-]" if capitals else r"[^A-Za-z0-9_.+@-]"
    escaped = re.sub(plain, lambda match: "".join(f"={byte:02X}" for byte in match[0].encode("utf-8")), name)
    return escaped if re.match(r"[A-Za-z0-9]", name) and safe_name(escaped) else "_" + escaped


def original_name(escaped: str) -> str:
    """The name that ``file_name`` made this of. Raises ValueError if it made no such name."""
    body = escaped.removeprefix("_")
    parts = re.split(r"((?:=[0-9A-F]{2})+)", body)
    name = "".join(
        bytes.fromhex(part.replace("=", "")).decode("utf-8") if i % 2 else part for i, part in enumerate(parts)
    )
    if escaped not in (file_name(name), file_name(name, capitals=True)):
        raise ValueError(f"{escaped!r} is not the name of a file made here")
    return name


def file_names(names: Iterable[str]) -> dict[str, str]:
    """A name for the file of each of ``names``, no two alike on a file system that ignores case.

    ValueError for a name whose file's would be longer than file systems allow.
    """
    distinct = list(dict.fromkeys(names))
    folded = Counter(file_name(name).lower() for name in distinct)
    found = {name: file_name(name, capitals=folded[file_name(name).lower()] > 1) for name in distinct}
    for name, escaped in found.items():
        if len(escaped) > _LONGEST:
            raise ValueError(f"{name[:40]!r}… is too long a name for a file")
    return found
