"""Pickled dicts of NumPy arrays, as VGGFace2's networks were published, without running what a pickle can run.

Whatever the pickle names is replaced by a class of this module that takes a dtype and bytes, or refused: NumPy's own
reconstruction is not reached from the file.
"""

import io
import math
import pickle
import pickletools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurestore.checkpoints.formats import pytorch, safetensors
from featurestore.checkpoints.formats.base import Stored, TensorFile, damaged, runs_code, unwrap
from featurestore.errors import FeatureStoreError

_DTYPES = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")
_MOST_OPERATIONS = 1 << 20  # an array takes about thirty
_MOST_MEMOS = 1 << 20  # a memo number costs its own size in memory, and can be written in five bytes


class _Refused(Exception):
    """The pickle asks for something that no array needs."""


class _Dtype:
    """Replaces numpy.dtype."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        if self.code not in _DTYPES:
            raise _Refused(f"an array of {self.code!r}, which are not numbers")
        self.order = "="

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "=", "|"):
            raise _Refused(f"an array in the byte order {order!r}")
        self.order = order

    def numpy(self) -> np.dtype:
        return np.dtype(self.order + self.code)


class _Array:
    """Replaces a numpy.ndarray: its bytes, kept until they are read."""

    def __init__(self, dtype: Any = None, shape: Any = (), fortran: Any = False, content: Any = b"") -> None:
        self.dtype, self.shape, self.fortran, self.content = dtype, shape, fortran, content

    def __setstate__(self, state: Any) -> None:
        _, self.shape, self.dtype, self.fortran, self.content = state

    def check(self) -> None:
        """ValueError unless it is an array whose bytes are all there."""
        sides = self.shape if isinstance(self.shape, tuple) else None
        if sides is None or not all(isinstance(side, int) and 0 <= side < 1 << 40 for side in sides):
            raise ValueError(f"an array has the shape {self.shape!r:.80}")
        if not isinstance(self.dtype, _Dtype) or not isinstance(self.content, (bytes, bytearray)):
            raise ValueError("an array has no numbers")
        if math.prod(sides) * self.dtype.numpy().itemsize != len(self.content):
            raise ValueError(f"an array of shape {sides} has {len(self.content)} bytes")

    def tensor(self) -> torch.Tensor:
        values = np.frombuffer(self.content, self.dtype.numpy())
        values = values.reshape(self.shape, order="F" if self.fortran else "C")
        return torch.from_numpy(np.ascontiguousarray(values, values.dtype.newbyteorder("=")).copy())


def _stand_ins() -> dict[tuple[str, str], Callable[..., Any]]:
    """What a pickle may name, made for each file separately, since a pickle may also set attributes of what it names."""

    class Array(_Array):
        pass

    class Dtype(_Dtype):
        pass

    def reconstruct(*_: Any) -> _Array:
        return Array()

    def scalar(dtype: Any, content: Any = b"") -> _Array:
        return Array(dtype, (), False, encode(content))

    def frombuffer(content: Any, dtype: Any, shape: Any, order: Any) -> _Array:
        return Array(dtype, shape, order in ("F", b"F"), content)

    def encode(text: Any, *_: Any) -> Any:
        return text.encode("latin1") if isinstance(text, str) else text

    stand_ins: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): Array,
        ("numpy", "dtype"): Dtype,
        ("_codecs", "encode"): encode,
        ("collections", "OrderedDict"): dict,
    }
    for core in ("numpy.core", "numpy._core"):
        stand_ins[f"{core}.multiarray", "_reconstruct"] = reconstruct
        stand_ins[f"{core}.multiarray", "scalar"] = scalar
        stand_ins[f"{core}.numeric", "_frombuffer"] = frombuffer
    return stand_ins


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="bytes")  # Python 2's strings are bytes: the arrays' numbers
        self._known = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            raise _Refused(f"it asks for {module}.{name}, which is no part of an array") from None

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("it asks for objects outside the file")


def recognises(head: bytes, path: Path) -> bool:
    """A pickle of any protocol, unless it is torch's or begins a safetensors file, whose length may look like one."""
    binary = head[:1] == b"\x80" and head[1:2] <= bytes([pickle.HIGHEST_PROTOCOL])
    text = head[:1] in (b"(", b"}", b"c")
    return (binary or text) and not pytorch.recognises(head, path) and not safetensors.recognises(head, path)


def open_file(path: Path) -> TensorFile:
    """A pickled dict of names to arrays, of any pickle protocol and of Python 2 or 3.

    FeatureStoreError, and nothing run, if the pickle asks for anything that an array does not need.
    """
    content = path.read_bytes()
    try:
        _refuse_bombs(content)
        arrays = unwrap(path, _Unpickler(content).load(), _Array)
        for array in arrays.values():
            array.check()
    except _Refused as error:
        raise runs_code(path, f"{error}.") from None
    except FeatureStoreError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise damaged(path, error) from None
    return TensorFile(
        path, "pickle", {key: Stored(array.shape, partial(array.tensor)) for key, array in arrays.items()}
    )


def _refuse_bombs(content: bytes) -> None:
    """ValueError for a pickle that would take far more memory than its own size."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if count > _MOST_OPERATIONS:
            raise ValueError(f"more than {_MOST_OPERATIONS} operations")
        if opcode.name in ("LONG_BINPUT", "PUT") and int(argument or 0) > _MOST_MEMOS:
            raise ValueError(f"memo number {argument}")
