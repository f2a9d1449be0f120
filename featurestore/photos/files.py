"""Photographs as files, on a disk or on an object store (``s3://``, ``gs://``, ``az://``) or web server."""

import errno
import hashlib
import os
import stat
from functools import cache
from pathlib import Path

from featurestore.remote.client import Missing, ObjectStore, url_of


def read_photograph(path: str | os.PathLike[str]) -> bytes:
    """The content of a photograph's file. OSError as reading does, and for what is no file; FeatureStoreError where an object
    store does not answer.
    """
    place = _object(path)
    if place is None:
        if not stat.S_ISREG(Path(path).stat().st_mode):  # a pipe would hang, a device never end
            raise OSError(errno.EINVAL, "it is no file", str(path))
        return Path(path).read_bytes()
    try:
        return place[0].get(place[1])[0]
    except Missing:
        raise FileNotFoundError(errno.ENOENT, "there is no such object", str(path)) from None


def is_there(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file, or an object, of that name."""
    place = _object(path)
    if place is None:
        return os.path.isfile(path)
    try:
        place[0].head(place[1])
        return True
    except Missing:
        return False


def sha256_of_photograph(path: str) -> str:
    """Its sha256 in hex. Raises what reading it does."""
    return hashlib.sha256(read_photograph(path)).hexdigest()


def anywhere(path: str) -> str:
    """A path that does not depend on the current folder."""
    return url_of(path) or str(Path(path).absolute())


def _object(path: str | os.PathLike[str]) -> tuple[ObjectStore, str] | None:
    url = url_of(path)
    if url is None:
        return None
    parts = url.split("/", 5 if url.startswith("az:") else 3)  # az://account/container/…
    return _container("/".join(parts[:-1])), parts[-1]


@cache
def _container(url: str) -> ObjectStore:
    return ObjectStore(url)
