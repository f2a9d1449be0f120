"""Objects below a URL (``s3://``, ``gs://``, ``az://``; ``http(s)://`` to read) by obstore, with errors that say what to do.

Credentials, region and endpoint come from the environment alone, as obstore reads them (``AWS_ACCESS_KEY_ID`` …), and are in no
message. Requests that fail or are throttled are sent again, with growing pauses, for a minute; ``FEATURESTORE_REMOTE_TIMEOUT``
says how many seconds instead. obstore's own limit is three minutes.
"""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from featurestore.errors import FeatureStoreError
from featurestore.text import listing

SCHEMES = ("s3", "gs", "az", "http", "https")
TIMEOUT = "FEATURESTORE_REMOTE_TIMEOUT"
_URL = re.compile(rf"({'|'.join(SCHEMES)}):/+([^/].*)", re.DOTALL)
_SECONDS = 60.0
_PART_BYTES = 8 << 20  # of an upload of several parts
_REPEATED = ("NoSuchUpload", "breaks off")
_LISTED = 1000  # keys in one answer
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, with AWS_REGION (AWS_SKIP_SIGNATURE=true for a public bucket)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or GOOGLE_SERVICE_ACCOUNT_KEY",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}


class Missing(FeatureStoreError):
    """There is no object of that key."""


class Unchanged(FeatureStoreError):
    """The object is still the one that the caller has."""


class Refused(FeatureStoreError):
    """The condition of a put did not hold: somebody else was first."""


def url_of(place: str | os.PathLike[str]) -> str | None:
    """The URL that ``place`` says, also as ``pathlib`` writes it (``s3:/bucket/prefix``); None for a path of this machine.

    FeatureStoreError for one with a password in it.
    """
    found = _URL.fullmatch(os.fspath(place))
    if not found:
        return None
    scheme, rest = found[1], found[2].rstrip("/")
    if "@" in rest.partition("/")[0]:
        raise FeatureStoreError(
            f"a URL with a user or password in it is refused, since URLs are printed and kept: {scheme}://…@"
            f"{rest.partition('/')[0].rpartition('@')[2]}. Give credentials by the environment: {_said(scheme)}."
        )
    if {".", ".."} & set(rest.split("/")):
        raise FeatureStoreError(f"{scheme}://{rest} has `.` or `..` in it; write the URL without.")
    if "?" in rest or "#" in rest:
        raise FeatureStoreError(
            f"{scheme}://{rest.partition('?')[0]} has a query or fragment after it, perhaps a signature; give the URL without."
        )
    return f"{scheme}://{rest}"


class ObjectStore:
    """Objects by key, relative to ``url``. Every method raises FeatureStoreError with the URL, the reason and what to do.

    It may be used by several threads, which wait side by side.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.scheme = url.partition(":")[0]
        self.read_only = self.scheme in ("http", "https")
        self._seconds = _seconds()
        endpoints = (
            url,
            *(os.environ.get(name, "") for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")),
        )
        client: dict[str, Any] = {
            "allow_http": any(name.startswith("http://") for name in endpoints),
            "connect_timeout": f"{min(5.0, self._seconds):g}s",
            "read_timeout": f"{min(30.0, self._seconds):g}s",  # without a byte
            "timeout": "1h",  # of a whole transfer, however slow the line is
        }
        retry: dict[str, Any] = {
            "max_retries": 10,
            "retry_timeout": timedelta(seconds=self._seconds),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=min(10.0, self._seconds)),
                "base": 2,
            },
        }
        try:
            from obstore.store import from_url
        except ImportError:
            raise FeatureStoreError(
                f"{url} is read with obstore, which is not installed: pip install 'face-featurestore[remote]'."
            ) from None
        with self._explained(""):
            self._store: Any = from_url(url, client_options=client, retry_config=retry)  # type: ignore[call-overload]

    def get(self, key: str, unlike: str | None = None) -> tuple[bytes, str | None]:
        """An object and its e-tag. ``Missing`` if there is none, ``Unchanged`` if its e-tag is ``unlike``."""
        with self._explained(key):
            found = self._store.get(key, options={"if_none_match": unlike} if unlike else {})
            return bytes(found.bytes()), found.meta["e_tag"]

    def head(self, key: str) -> tuple[int, dict[str, str]]:
        """An object's size in bytes and what was noted of it when it was put. ``Missing`` if there is none."""
        with self._explained(key):
            found = self._store.get(key, options={"head": True})
            return int(found.meta["size"]), dict(found.attributes)

    def tail(self, key: str, length: int) -> tuple[int, bytes]:
        """An object's size, and the last ``length`` bytes of it or all. ``Missing`` if there is none."""
        with self._explained(key):
            if self.scheme == "az":  # which has no ranges from the end
                size = int(self._store.head(key)["size"])
                return size, bytes(self._store.get_range(key, start=max(0, size - length), end=size))
            found = self._store.get(key, options={"range": {"suffix": length}})
            return int(found.meta["size"]), bytes(found.bytes())

    def ranges(self, key: str, starts: Sequence[int], lengths: Sequence[int], gap: int) -> list[memoryview]:
        """Parts of an object, asked for at once; those at most ``gap`` bytes apart come in one answer.

        Parts may be shorter where the object ends.
        """
        with self._explained(key):
            return [
                memoryview(part) for part in self._store.get_ranges(key, starts=starts, lengths=lengths, coalesce=gap)
            ]

    def stream(self, key: str) -> tuple[int, Iterator[memoryview]]:
        """An object's size, and its content piece by piece. ``Missing`` if there is none."""
        with self._explained(key):
            found = self._store.get(key)
            return int(found.meta["size"]), self._pieces(key, found)

    def _pieces(self, key: str, found: Any) -> Iterator[memoryview]:
        came = 0
        with self._explained(key):
            for piece in found.stream(min_chunk_size=1 << 20):
                came += len(piece)
                yield memoryview(piece)
        if came != found.meta["size"]:
            raise FeatureStoreError(
                f"{self.url}/{key} ended after {came} of {found.meta['size']} bytes. Run the same command again."
            )

    def put(self, key: str, content: bytes | Path, noted: dict[str, str] | None = None) -> None:
        """An object, bytes or a file, in the place of what has this key; readers see the old one until the new one is whole.

        ``noted`` is kept beside it.
        """
        end = time.monotonic() + self._seconds
        while True:
            try:
                with self._explained(key, writing=True):
                    self._store.put(key, content, chunk_size=_PART_BYTES, attributes=noted or None)
                return
            except FeatureStoreError as error:
                # obstore does not repeat what begins and ends an upload of several parts, or finds it ended when the answer was
                # lost. The whole upload may be repeated.
                if not any(each in str(error) for each in _REPEATED) or time.monotonic() > end:
                    raise

    def put_if(self, key: str, content: bytes, version: "Version | None") -> "Version":
        """The same only if the object is still that ``version``, or for None if there is none; otherwise ``Refused``."""
        with self._explained(key, writing=True):
            mode = "create" if version is None else {k: v for k, v in version.items() if v is not None}
            put = self._store.put(key, content, mode=mode, use_multipart=False)
            return {"e_tag": put["e_tag"], "version": put["version"]}

    def version(self, key: str) -> tuple[bytes, "Version"]:
        """A small object and its version for ``put_if``. ``Missing`` if there is none."""
        with self._explained(key):
            found = self._store.get(key)
            return bytes(found.bytes()), {"e_tag": found.meta["e_tag"], "version": found.meta["version"]}

    def delete(self, keys: Sequence[str]) -> None:
        """Objects that are there or not."""
        for start in range(0, len(keys), _LISTED):
            some = list(keys[start : start + _LISTED])
            try:
                with self._explained(some[0], writing=True):
                    self._store.delete(some)
            except Missing:
                continue

    def listed(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Key and size in bytes of every object below ``prefix``, a folder."""
        with self._explained(prefix):
            for some in self._store.list(prefix or None, chunk_size=_LISTED):
                for found in some:
                    yield found["path"], int(found["size"])

    @contextmanager
    def _explained(self, key: str, writing: bool = False) -> Iterator[None]:
        """Errors of obstore as FeatureStoreError. What they quote of requests is left out: it may hold a signature."""
        from obstore.exceptions import AlreadyExistsError, BaseError, NotModifiedError, PreconditionError

        where = f"{self.url}/{key}" if key else self.url
        try:
            yield
        except NotModifiedError:
            raise Unchanged(f"{where} has not changed.") from None
        except (AlreadyExistsError, PreconditionError):
            raise Refused(f"{where} was written by somebody else in the meantime.") from None
        except (BaseError, OSError, ValueError) as error:  # a missing object is a FileNotFoundError
            said = str(error).partition("Debug source")[0]
            code = "".join(re.findall(r"<Code>(\w+)</Code>", said)[:1])
            if isinstance(error, FileNotFoundError) and code in ("", "NoSuchKey", "BlobNotFound"):
                raise Missing(f"{where} is not there.") from None
            doing = "written" if writing else "read"
            raise FeatureStoreError(
                f"{where} cannot be {doing}: {self._reason(type(error).__name__, said, code)}"
            ) from None

    def _reason(self, kind: str, said: str, code: str) -> str:
        status = "".join(re.findall(r"status code: (\d+[\w ]*)", said)[:1])
        container = listing([self.url.split("/")[2]])
        if code in ("NoSuchBucket", "ContainerNotFound") or (code == "" and status.startswith("404")):
            return f"there is no bucket {container}. Make it, or correct the URL."
        if kind in ("PermissionDeniedError", "UnauthenticatedError") or status[:3] in ("401", "403"):
            return (
                f"the object store refuses access ({code or status or kind}). Set credentials that allow it in "
                f"the environment: {_said(self.scheme)}."
            )
        if "169.254.169.254" in said or "metadata" in said.partition("\n")[0]:
            return f"no credentials were found. Set them in the environment: {_said(self.scheme)}."
        if status:
            return (
                f"the object store answers {code or status}, also when asked again for {self._seconds:g} s. Wait, run the same "
                f"command again; {TIMEOUT} says for how many seconds requests are repeated."
            )
        if (
            "timed out" in said
            or "timeout" in said
            or "error sending request" in said
            or "body error" in said
            or "error decoding" in said
        ):
            return (
                f"the object store does not answer, or breaks off, also when asked again for {self._seconds:g} s. Check the "
                f"network and the endpoint (AWS_ENDPOINT_URL), or give it longer: {TIMEOUT}."
            )
        return f"{re.sub(r'[?][^ ]*', '', said.strip().splitlines()[0] if said.strip() else kind)[:300]}."


Version = dict[str, str | None]  # what tells one state of an object from the next: e_tag, version


def _said(scheme: str) -> str:
    return _CREDENTIALS.get(scheme, "none is used for http(s)")


def _seconds() -> float:
    given = os.environ.get(TIMEOUT)
    try:
        seconds = float(given) if given else _SECONDS
        if 0 < seconds < 86400:
            return seconds
    except ValueError:
        pass
    raise FeatureStoreError(
        f"{TIMEOUT} is {given!r}; it has to be a number of seconds, for which failed requests are repeated."
    )
