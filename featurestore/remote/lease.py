"""One writer at a time of a store on an object store: an object that its writer renews, and that a dead writer loses.

The object beside the store, ``<prefix>.lock``, says who writes it, and is put only under the condition that it is still what was
read before, so of two that want it one is refused. Whoever finds it held watches it for as long as its holder said it would be
renewed within: if it changes, the holder lives; if not, it is taken over. Only clocks that count from some moment on are asked,
never the time of day, so a clock that is set has no part in it. For the same reason no time of expiry is written down.
"""

import json
import logging
import os
import platform
import secrets
import threading
import time
from contextlib import suppress
from typing import Any

from featurestore.errors import FeatureStoreError
from featurestore.remote.client import Missing, ObjectStore, Refused, Version

SECONDS = "FEATURESTORE_LEASE_SECONDS"
_DEFAULT, _LONGEST = 60.0, 3600.0
_RENEWALS = 3  # in the time after which others may take it over
_log = logging.getLogger(__name__)
_LOOKS = 20  # in that time, of one who waits


def seconds_passed() -> float:
    """A clock that counts on while the machine sleeps, as others' do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Lease:
    """The right to write a store, from its making until ``release``; a thread renews it.

    FeatureStoreError names who holds it already.
    """

    def __init__(self, objects: ObjectStore, key: str, store: str, doing: str) -> None:
        self._objects, self._key, self._store = objects, key, store
        self._seconds = _lease_seconds()
        self._said: dict[str, Any] = {
            "pid": os.getpid(),
            "host": platform.node(),
            "doing": doing,
            "token": secrets.token_hex(16),
            "seconds": self._seconds,
            "renewed": 0,
        }
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._acquire()
        self._thread = threading.Thread(target=self._renew_often, name="lease", daemon=True)
        self._thread.start()

    def require(self) -> None:
        """FeatureStoreError if the store is no longer this process's to write. One that was halted for long asks first."""
        with self._lock:
            if self._lost is None and seconds_passed() - self._renewed > self._seconds * 2 / _RENEWALS:
                self._renew()
            if self._lost is not None:
                raise FeatureStoreError(
                    f"{self._store} is no longer held by this process, whose lease was not renewed within {self._seconds:g} s: "
                    f"{self._lost}. What was published stays. Run the same command again once nobody else writes."
                )

    def release(self) -> None:
        """Let others write."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            if self._lost is None:
                self._said["released"] = True
                with suppress(FeatureStoreError):  # then others may take it over when its time has passed
                    self._put(self._version)

    def _acquire(self) -> None:
        found, version = self._read()
        unchanged_since, renewed_within = seconds_passed(), _seconds_of(found)
        if found is not None and not found.get("released"):
            _log.warning(
                "%s is held for writing by %s. Waiting up to %g s to see whether it is alive.",
                self._store,
                _holder(found),
                renewed_within,
            )
        while found is not None and not found.get("released"):
            time.sleep(renewed_within / _LOOKS)
            before, (found, version) = version, self._read()
            if version != before and found is not None and not found.get("released"):
                raise FeatureStoreError(f"{self._store} is being written by {_holder(found)}. Wait for it or stop it.")
            if seconds_passed() - unchanged_since > renewed_within:
                break
        try:
            self._put(version)
        except Refused:
            found, _ = self._read()
            raise FeatureStoreError(
                f"{self._store} is being written by {_holder(found)}, which was first. Wait for it or stop it."
            ) from None

    def _read(self) -> tuple[dict[str, Any] | None, Version | None]:
        try:
            content, version = self._objects.version(self._key)
        except Missing:
            return None, None
        try:
            found = json.loads(content)
        except ValueError:
            found = None
        return found if isinstance(found, dict) else {}, version

    def _put(self, version: Version | None) -> None:
        """Put it if it is still that. What was put although its answer was lost counts."""
        content = json.dumps(self._said).encode()
        sent = seconds_passed()
        try:
            self._version = self._objects.put_if(self._key, content, version)
        except Refused:
            found, version = self._read()
            if found is None or version is None or found.get("token") != self._said["token"]:
                raise
            self._version = version if found == self._said else self._objects.put_if(self._key, content, version)
        self._renewed = sent

    def _renew(self) -> None:
        self._said["renewed"] += 1
        try:
            self._put(self._version)
        except Refused:
            found, _ = self._read()
            self._lost = f"it is being written by {_holder(found)}"
        except FeatureStoreError as error:
            if seconds_passed() - self._renewed > self._seconds:
                self._lost = str(error)

    def _renew_often(self) -> None:
        while not self._stop.wait(self._seconds / _RENEWALS):
            with self._lock:
                if self._lost is None:
                    self._renew()


def holder_of(objects: ObjectStore, key: str) -> str | None:
    """Who holds a lease that was not given back, alive or not; None if nobody does."""
    try:
        found = json.loads(objects.version(key)[0])
    except (Missing, ValueError):
        return None
    return None if not isinstance(found, dict) or found.get("released") else _holder(found)


def _holder(found: dict[str, Any] | None) -> str:
    if not found or not {"pid", "host", "doing"} <= found.keys():
        return "another process"
    return f"process {found['pid']} on {found['host']} ({found['doing']})"


def _seconds_of(found: dict[str, Any] | None) -> float:
    seconds = (found or {}).get("seconds")
    return min(float(seconds), _LONGEST) if isinstance(seconds, int | float) and seconds > 0 else _DEFAULT


def _lease_seconds() -> float:
    given = os.environ.get(SECONDS)
    try:
        seconds = float(given) if given else _DEFAULT
        if 0 < seconds <= _LONGEST:
            return seconds
    except ValueError:
        pass
    raise FeatureStoreError(f"{SECONDS} is {given!r}; it has to be a number of seconds, at most {_LONGEST:g}.")
