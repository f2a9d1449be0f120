"""What the store, the weights and the photographs all want of a file."""

import hashlib
import os
from pathlib import Path


def sha256_of(path: str | os.PathLike) -> str:
    """A file's sha256 in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
