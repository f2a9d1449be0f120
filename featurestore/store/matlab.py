"""Arrays of numbers in MATLAB's ``.mat`` files of version 5 (``save -v6`` or ``-v7``, SciPy's ``savemat``).

Every size is compared with the bytes that are there; a damaged one could end the process in SciPy's ``loadmat``. The layout is
that of MathWorks' "MAT-File Format".
"""

import math
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from featurestore.files import refuse_bomb

_HEADER = 128  # bytes
_MATRIX, _PACKED = 14, 15
_CLASSES = range(6, 16)  # double, single, int8 … uint64: the others are text, cells, structures and sparse arrays
_OPAQUE = 17  # an object, described in another way
_COMPLEX = 0x0800
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_DESCRIPTION = 2048  # bytes before an array's numbers: its class, shape and name


def arrays_in(path: Path) -> dict[str, Callable[[], np.ndarray]]:
    """Its arrays of numbers by name; each is read, with the shape (at least two sides) and the type of the file, when called.

    What is not packed is mapped, not read. ValueError, struct.error or zlib.error, here or then, for a damaged file, for one
    of another version, and for an array of complex numbers.
    """
    content = np.memmap(path, np.uint8, "r").data
    order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(bytes(content[_HEADER - 4 : _HEADER]))
    if order is None:
        raise ValueError("it is no MATLAB file of version 5. In MATLAB, save it with -v7")
    found: dict[str, Callable[[], np.ndarray]] = {}
    at = _HEADER
    while at < len(content):
        kind, start, at, _ = _element(content, at, order)
        if at > len(content):
            raise ValueError("it ends early")
        if kind not in (_MATRIX, _PACKED):
            continue
        held = content[start:at]
        first = _unpacked(held, _DESCRIPTION)[8:] if kind == _PACKED else held
        (flags,) = struct.unpack_from(f"{order}8xI", first)
        if flags & 0xFF == _OPAQUE or flags & 0xFF not in _CLASSES:
            continue
        name, *_ = _described(first, order)
        found[name] = partial(_array, held, kind == _PACKED, order)
    return found


def _element(content: memoryview | bytes, at: int, order: str) -> tuple[int, int, int, int]:
    """The type of the element at a place, where its content starts and ends, and where the next one starts within an array."""
    if at + 8 > len(content):
        raise ValueError("it ends early")
    kind, size = struct.unpack_from(f"{order}II", content, at)
    if kind >> 16:  # of at most 4 bytes
        return kind & 0xFFFF, at + 4, at + 4 + min(kind >> 16, 4), at + 8
    return kind, at + 8, at + 8 + size, at + 8 + size + -size % 8


def _described(content: memoryview | bytes, order: str) -> tuple[str, int, tuple[int, ...], int]:
    """An array's name, flags and shape, and where the element of its numbers is."""
    (flags,) = struct.unpack_from(f"{order}8xI", content)
    _, start, end, at = _element(content, 16, order)
    shape = struct.unpack(f"{order}{(end - start) // 4}i", content[start:end])
    _, start, end, at = _element(content, at, order)
    return bytes(content[start:end]).decode("latin1"), flags, shape, at


def _unpacked(packed: memoryview, most: int) -> bytes:
    return zlib.decompressobj().decompress(packed, most)


def _array(content: memoryview | bytes, packed: bool, order: str) -> np.ndarray:
    if packed:
        _, _, size, _ = _element(_unpacked(memoryview(content), 8), 0, order)
        refuse_bomb(len(content), size)
        content = _unpacked(memoryview(content), size)[8:]
    name, flags, shape, at = _described(content, order)
    kind, start, end, _ = _element(content, at, order)
    dtype = np.dtype(order + _TYPES.get(kind, "V"))
    if flags & _COMPLEX:
        raise ValueError(f"{name} holds complex numbers")
    if len(shape) < 2 or min(shape) < 0 or math.prod(shape) * dtype.itemsize != end - start or end > len(content):
        raise ValueError(f"{name}, of shape {shape}, does not have as many numbers")
    return np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape, order="F")
