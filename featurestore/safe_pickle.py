"""Pickled arrays, read without running what a pickle can run.

Whatever a pickle names is replaced by a stand-in that keeps data only, or refused: NumPy's own reconstruction is not reached
from the file. Memory stays in proportion to the file, and so does time.
"""

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from featurestore.pickle_nesting import refuse_nesting

StandIns: TypeAlias = Mapping[tuple[str, str], Any]

NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
OPERATIONS = 1 << 20  # an array takes about thirty
_MOST_MEMOS = 1 << 20  # a memo number costs its own size in memory, and can be written in five bytes


class Refused(Exception):
    """The pickle asks for something that no array needs."""


def _shown(thing: Any) -> str:
    """Never the repr of a list: one that holds itself twice, sixty times over, would not end."""
    return repr(thing)[:80] if isinstance(thing, str) else f"a {type(thing).__name__}"


class Dtype:
    """Replaces numpy.dtype. ``objects`` allows text and object arrays too, whose elements are those of the pickle."""

    objects = False

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        text = self.objects and isinstance(self.code, str) and re.fullmatch(r"O8?|[SU][0-9]{1,6}", self.code)
        if not (self.code in NUMBERS or text):
            raise Refused(f"an array of {_shown(self.code)}, which are not numbers")
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "=", "|"):
            raise Refused(f"an array in the byte order {_shown(order)}")
        self.order = order

    def numpy(self) -> np.dtype:
        """The real one."""
        return np.dtype(object) if self.code[0] == "O" else np.dtype(self.order + self.code)


class Array:
    """Replaces a numpy.ndarray: its bytes (of object arrays a list), kept until they are read."""

    def __init__(self, dtype: Any = None, shape: Any = (), fortran: Any = False, content: Any = b"") -> None:
        self.dtype, self.shape, self.fortran, self.content = dtype, shape, fortran, content

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state

    def check(self) -> None:
        """ValueError unless it is an array whose bytes, or elements, are all there."""
        sides = self.shape if isinstance(self.shape, tuple) else None
        if sides is None or not all(isinstance(side, int) and 0 <= side < 1 << 40 for side in sides):
            raise ValueError("an array has a shape that is none")
        if not isinstance(self.dtype, Dtype):
            raise ValueError("an array has no numbers")
        objects = self.dtype.code[0] == "O"
        if not isinstance(self.content, list if objects else (bytes, bytearray)):
            raise ValueError("an array has no numbers")
        if math.prod(sides) * (1 if objects else self.dtype.numpy().itemsize) != len(self.content):
            raise ValueError(f"an array of shape {sides} has {len(self.content)} {'elements' if objects else 'bytes'}")

    def numpy(self) -> np.ndarray:
        """The real one, checked, read-only over the file's bytes. Elements of an object array are the pickle's."""
        self.check()
        if self.dtype.code[0] == "O":
            values = np.empty(len(self.content), object)
            values[:] = self.content
        else:
            values = np.frombuffer(self.content, self.dtype.numpy())
        return values.reshape(self.shape, order="F" if self.fortran else "C")


def encode(text: Any, *_: Any) -> Any:
    """Replaces _codecs.encode, by which pickles of old protocols write bytes."""
    return text.encode("latin1") if isinstance(text, str) else text


def array_stand_ins(objects: bool = False) -> dict[tuple[str, str], Callable[..., Any]]:
    """What a pickle of arrays may name. Made for each file: a pickle may also set attributes of what it names."""

    class FileArray(Array):
        pass

    class FileDtype(Dtype):
        pass

    def reconstruct(*_: Any) -> Array:
        return FileArray()

    def scalar(dtype: Any, content: Any = b"") -> Array:
        return FileArray(dtype, (), False, encode(content))

    def frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> Array:
        return FileArray(dtype, shape, order in ("F", b"F"), content)

    def encoded(text: Any, *_: Any) -> Any:
        return encode(text)

    FileDtype.objects = objects
    stand_ins: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): FileArray,
        ("numpy", "dtype"): FileDtype,
        ("_codecs", "encode"): encoded,
        ("collections", "OrderedDict"): dict,
    }
    for core in ("numpy.core", "numpy._core"):
        stand_ins[f"{core}.multiarray", "_reconstruct"] = reconstruct
        stand_ins[f"{core}.multiarray", "scalar"] = scalar
        stand_ins[f"{core}.numeric", "_frombuffer"] = frombuffer
    return stand_ins


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, known: StandIns) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")  # Python 2's strings are bytes: the arrays' numbers
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise Refused(f"it asks for {module}.{name}, which is no part of an array") from None

    def persistent_load(self, pid: Any) -> Any:
        raise Refused("it asks for objects outside the file")


def load(content: bytes, known: StandIns, operations: int = OPERATIONS) -> Any:
    """What a pickle of any protocol, of Python 2 or 3, holds, with the stand-ins ``known`` for all that it names.

    Raises Refused for any other name, ValueError for a pickle that would take far more memory or time than its size lets
    expect, or more than ``operations``; a damaged pickle raises anything.
    """
    refuse_bombs(content, operations)
    return _Unpickler(content, known).load()


def refuse_bombs(content: bytes, operations: int = OPERATIONS) -> None:
    """ValueError for a pickle that would take far more memory or time than its own size."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if count > operations:
            raise ValueError(f"more than {operations} operations")
        if opcode.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > _MOST_MEMOS:
            raise ValueError(f"memo number {argument}")
    refuse_nesting(content)
