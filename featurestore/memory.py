"""Memory that this process has freed: kept and used again, or given back to the system.

By default glibc maps buffers of more than 32 MiB one by one and unmaps them when they are freed. A network's layers and a
training step free and ask for the same large buffers over and over, and the system zeroes each anew, page by page. The commands
call ``keep_freed_memory``; importing the package changes nothing, since a library does not choose its host's allocator.
"""

import ctypes
import os
from functools import cache

from featurestore.text import human_bytes

LARGEST_KEPT = 1 << 30  # bytes of a buffer: larger ones are mapped and unmapped as before
MOST_AT_END = (1 << 31) - 1  # bytes that are free at a heap's end, or all are given back: the most that an int holds
_PAD = 64 << 20  # bytes of a thread's heap: with less, one that is empty for a moment is unmapped

# Numbers of mallopt (malloc.h), values, and what a user sets the same by: in the environment, in GLIBC_TUNABLES.
_OPTIONS = (
    (-3, LARGEST_KEPT, "MALLOC_MMAP_THRESHOLD_", "glibc.malloc.mmap_threshold"),
    (-1, MOST_AT_END, "MALLOC_TRIM_THRESHOLD_", "glibc.malloc.trim_threshold"),
    (-2, _PAD, "MALLOC_TOP_PAD_", "glibc.malloc.top_pad"),
)
_MMAP_MAX = (-4, 0, "MALLOC_MMAP_MAX_", "glibc.malloc.mmap_max")


def keep_freed_memory() -> str:
    """Have glibc keep freed memory in this process from now on, and say so, or why not, in a line for a plan.

    What is kept is what was in use at once and holes too small for what was asked for next, with at most ``MOST_AT_END``
    bytes at the end of a heap; ``give_back_memory`` returns it. Left as it is: another allocator (macOS, musl, a preloaded
    one), and one that the user has set up by MALLOC_… or GLIBC_TUNABLES.
    """
    if not _glibc():
        return "as the system's allocator has it: keeping what is freed is for glibc"
    given = _given()
    if given:
        return f"as {given} says"
    mallopt = ctypes.CDLL(None).mallopt
    accepted = [bool(mallopt(number, value)) for number, value, _, _ in _OPTIONS]
    if not accepted[0]:  # before glibc 2.35 32 MiB was the highest threshold; no buffer is mapped apart if none may be
        mallopt(*_MMAP_MAX[:2])
    return (
        f"freed ones of up to {human_bytes(LARGEST_KEPT)} are kept and used again, about as many as were in use at once; with "
        "MALLOC_TRIM_THRESHOLD_=131072 in the environment they are given back at once"
    )


def give_back_memory() -> None:
    """Return freed memory to the system, all but up to 64 MiB of each other thread's; where there is no glibc, nothing."""
    if _glibc():
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def _given() -> str:
    """The user's own setting of what ``keep_freed_memory`` would set, by name; empty if there is none."""
    tunables = [part.partition("=")[0] for part in os.environ.get("GLIBC_TUNABLES", "").split(":")]
    for _, _, variable, tunable in (*_OPTIONS, _MMAP_MAX):
        if variable in os.environ:
            return f"{variable}={os.environ[variable]}"
        if tunable in tunables:
            return f"{tunable} in GLIBC_TUNABLES"
    return ""


class _Symbol(ctypes.Structure):
    """Dl_info of dlfcn.h."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


@cache
def _glibc() -> bool:
    """Whether ``malloc`` is glibc's: not musl's, not macOS's, not one of jemalloc or tcmalloc that was loaded before."""
    program = ctypes.CDLL(None)
    if not all(hasattr(program, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim", "dladdr")):
        return False
    found = [_Symbol(), _Symbol()]
    for symbol, name in zip(found, ("gnu_get_libc_version", "malloc"), strict=True):
        program.dladdr(ctypes.cast(program[name], ctypes.c_void_p), ctypes.byref(symbol))
    return found[0].base is not None and found[0].base == found[1].base
