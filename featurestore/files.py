"""What everything that reads or writes a file shares: its hash, its name, and replacing it in one step."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"  # ending of a file that is being written; readers never open it


def sha256_of(path: str | os.PathLike[str]) -> str:
    """A file's sha256 in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_name(name: str) -> bool:
    """Whether a name from a file may be used as a folder's name."""
    return re.fullmatch(r"[\w][\w.+=@ -]*", name) is not None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to. It is flushed to disk and renamed to ``path`` at the end: readers see the old file or the new one.

    If the block raises, what was written is removed and ``path`` is as before. Raises OSError as writing does.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")  # two processes may write one table of runs
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """``content`` (text as UTF-8) as the whole of a file, in one step; see ``replacing``."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
