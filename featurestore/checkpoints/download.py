"""Fetch a network's published weights: resumed after an interruption, checked, and kept for the next time."""

import gzip
import json
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from filelock import FileLock

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL, replacing, sha256_of
from featurestore.networks.spec import BackboneSpec, PublishedFile
from featurestore.text import near_matches

_BLOCK = 1 << 20
_TIMEOUT = 30.0  # seconds without a byte

CountBytes = Callable[[int, int | None], Any]  # called with the bytes so far and those in all, if that is known


def published_file(spec: BackboneSpec, which: str = "") -> PublishedFile:
    """The file that the authors serve (the usual one, or that called ``which``); FeatureStoreError says where else to look."""
    if not spec.files:
        raise FeatureStoreError(
            spec.elsewhere
            or f"{spec.name} has no published weights to download. Give `weights` a FILE, or random:SEED."
        )
    if which and which not in spec.files:
        raise FeatureStoreError(f"{spec.name} has no download {which!r}. {near_matches(which, spec.files)}")
    return spec.files[which or next(iter(spec.files))]


def weights_folder() -> Path:
    """Where downloads are kept: ``$FEATURESTORE_WEIGHTS``, or ``face-featurestore`` in the user's cache folder."""
    given = os.environ.get("FEATURESTORE_WEIGHTS")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "face-featurestore"


def kept(published: PublishedFile, folder: Path) -> Path:
    """Where the file is, or will be, in ``folder``."""
    return folder / (published.member or published.url.rpartition("/")[2])


def fetch(published: PublishedFile, folder: Path, progress: CountBytes = lambda done, total: None) -> Path:
    """The file in ``folder``, downloaded unless it is there, its checksum compared where one is published.

    ``progress(bytes so far, bytes in all or None)`` is called for every block. An interrupted download is resumed,
    if the server still has the same file. Raises FeatureStoreError without a network, for a wrong checksum, and for
    an archive without the member wanted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / published.url.rpartition("/")[2]
    wanted = kept(published, folder)
    if wanted.exists():
        return wanted
    with FileLock(folder / f"{archive.name}.lock"):  # two processes would append to one file
        if wanted.exists():
            return wanted
        if not archive.exists():
            partial = archive.with_name(archive.name + PARTIAL)
            _download(published.url, partial, progress)
            _check(partial, published)
            os.replace(partial, archive)
        if published.member:
            _unpack(archive, published.member, wanted)
    return wanted


def _download(url: str, partial: Path, progress: CountBytes) -> None:
    """All of the file into ``partial``, from where it broke off."""
    about = partial.with_name(partial.name + ".json")
    validator = _validator(about)
    done = partial.stat().st_size if partial.exists() and validator else 0
    # If-Range: the rest of the same file, or all of another one.
    headers = {"Range": f"bytes={done}-", "If-Range": validator} if done else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT) as response:
            # A server may ignore If-Range and send the rest of another file.
            resumed = response.status == 206 and _starts_at(response) == done and _validator_of(response) == validator
            if response.status == 206 and not resumed:
                partial.unlink(missing_ok=True)
                raise ConnectionError(
                    "the file has changed since its first part was downloaded; try again to start from the beginning"
                )
            done = done if resumed else 0
            length = response.headers.get("Content-Length")
            total = done + int(length) if length else None
            _refuse_if_full(partial.parent, total, done)
            about.write_text(json.dumps({"validator": _validator_of(response)}), "utf-8")
            with partial.open("ab" if resumed else "wb") as file:
                progress(done, total)
                while block := response.read(_BLOCK):
                    file.write(block)
                    done += len(block)
                    progress(done, total)
        if total is not None and done != total:
            raise ConnectionError(f"{done} of {total} bytes came")
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left to send: what is there is whole, or belongs to another file
            if error.headers.get("Content-Range", "") == f"bytes */{done}":
                about.unlink(missing_ok=True)
                return
            partial.unlink(missing_ok=True)
        raise FeatureStoreError(f"{url} answers {error.code} {error.reason}. {_BY_HAND}") from None
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        rest = (
            f"{partial.stat().st_size} bytes are kept: run the same command again to resume. "
            if partial.exists()
            else ""
        )
        raise FeatureStoreError(
            f"{url} cannot be reached, or the download was interrupted: {reason}. {rest}{_BY_HAND}"
        ) from None
    about.unlink(missing_ok=True)


_BY_HAND = "Without a network here, fetch the file elsewhere and give `weights` FILE."


def _validator(about: Path) -> str:
    try:
        found = json.loads(about.read_text("utf-8"))["validator"]
        return found if isinstance(found, str) else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _validator_of(response: Any) -> str:
    tag = response.headers.get("ETag") or ""
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified") or ""


def _starts_at(response: Any) -> int:
    span = (response.headers.get("Content-Range") or "").removeprefix("bytes ").partition("-")[0]
    return int(span) if span.isdecimal() else -1


def _refuse_if_full(folder: Path, total: int | None, done: int) -> None:
    free = shutil.disk_usage(folder).free
    if total is not None and total - done > free:
        raise FeatureStoreError(
            f"{folder} has {free / 2**20:.0f} MiB free, the file needs {(total - done) / 2**20:.0f} MiB. "
            "Free some, or set FEATURESTORE_WEIGHTS to another folder."
        )


def _check(path: Path, published: PublishedFile) -> None:
    found = sha256_of(path) if published.sha256 else ""
    if not found.startswith(published.sha256):
        path.unlink()
        raise FeatureStoreError(
            f"{published.url} has the sha256 {found[:16]}…, not {published.sha256[:16]}… as published: it was changed or "
            "damaged in transit, and has been removed. Try again, or fetch it elsewhere and give `weights` FILE."
        )


def _unpack(archive: Path, member: str, wanted: Path) -> None:
    """One file out of an archive; nothing else is written, whatever names are in it."""
    try:
        with gzip.open(archive) as whole:  # to its end, where its checksum is
            while whole.read(_BLOCK):
                pass
        with tarfile.open(archive) as packed:
            found = next((entry for entry in packed if entry.isfile() and Path(entry.name).name == member), None)
            content = packed.extractfile(found) if found else None
            if content is None:
                raise FeatureStoreError(f"{archive} has no {member} in it. Remove it and download it again.")
            with content, replacing(wanted) as partial, partial.open("wb") as file:
                shutil.copyfileobj(content, file, _BLOCK)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise FeatureStoreError(f"{archive} cannot be unpacked: {error}. Remove it and download it again.") from None
    archive.unlink()
