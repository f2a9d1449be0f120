"""LuaTorch's binary ``.t7``: networks of ``nn`` modules, as VGG-Face was published.

The format, from torch7's File.lua: little-endian values, each after an int32 that says its type. Tables, torch objects and
storages are numbered, and written once. Numbers are not copied out of the mapped file before they are read.
"""

import math
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featurestore.checkpoints.formats.base import Stored, TensorFile, damaged, runs_code

_NIL, _NUMBER, _STRING, _TABLE, _TORCH, _BOOLEAN = range(6)
_FUNCTIONS = (6, 7, 8)
_BEGINNINGS = {(_TABLE, 1), (_TORCH, 1)}  # a file's first two numbers
_MOST_DEPTH = 100
_NUMBERS = {
    "Float": "<f4", "Double": "<f8", "Half": "<f2", "Cuda": "<f4", "CudaDouble": "<f8", "CudaHalf": "<f2",
    "Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1",
    "CudaLong": "<i8", "CudaInt": "<i4", "CudaShort": "<i2", "CudaChar": "i1", "CudaByte": "u1",
}  # fmt: skip


class _Function(Exception):
    """The file holds a Lua function."""


@dataclass
class _Object:
    """An ``nn`` module: its class, and its fields."""

    kind: str
    fields: Any = None


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor's numbers lie: sizes and strides in elements, and the storage (None if it has none)."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    storage: np.ndarray | None

    def check(self) -> None:
        """ValueError if it reaches beyond its storage."""
        last = self.offset + sum((size - 1) * stride for size, stride in zip(self.sizes, self.strides, strict=True))
        held = len(self.storage) if isinstance(self.storage, np.ndarray) else 0
        if min(self.strides) < 0 or not 0 <= self.offset <= last < held or math.prod(self.sizes) > held:
            raise ValueError(f"a tensor of sizes {self.sizes}, strides {self.strides} in a storage of {held} numbers")

    def read(self) -> torch.Tensor:
        assert self.storage is not None
        step = self.storage.itemsize
        strides = tuple(step * stride for stride in self.strides)
        view = np.lib.stride_tricks.as_strided(self.storage[self.offset :], self.sizes, strides, writeable=False)
        return torch.from_numpy(np.array(view, order="C"))  # a copy: the file is mapped read-only


class _Reader:
    """Values from the file, one after the other."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.at = 0
        self.seen: dict[int, Any] = {}

    def numbers(self, form: str) -> tuple[Any, ...]:
        values = struct.unpack_from(form, self.content, self.at)
        self.at += struct.calcsize(form)
        return values

    def integer(self) -> int:
        return int(self.numbers("<i")[0])

    def longs(self, n: int) -> tuple[int, ...]:
        if not 0 <= n <= 16:
            raise ValueError(f"a tensor has {n} dimensions")
        return self.numbers(f"<{n}q")

    def string(self) -> str:
        length = self.integer()
        if not 0 <= length <= len(self.content) - self.at:
            raise ValueError(f"a string of {length} bytes")
        self.at += length
        return self.content[self.at - length : self.at].decode("latin1")

    def value(self, depth: int = 0) -> Any:
        if depth > _MOST_DEPTH:
            raise ValueError(f"tables are nested more than {_MOST_DEPTH} deep")
        kind = self.integer()
        if kind == _NIL:
            return None
        if kind == _NUMBER:
            return self.numbers("<d")[0]
        if kind == _STRING:
            return self.string()
        if kind == _BOOLEAN:
            return bool(self.integer())
        if kind in _FUNCTIONS:
            raise _Function
        if kind not in (_TABLE, _TORCH):
            raise ValueError(f"a value of the unknown type {kind}")
        index = self.integer()
        if index not in self.seen:
            self._table(index, depth) if kind == _TABLE else self._object(index, depth)
        return self.seen[index]

    def _table(self, index: int, depth: int) -> None:
        table: dict[Any, Any] = {}
        self.seen[index] = table  # before its values: a table may hold itself
        for _ in range(self.integer()):
            key = self.value(depth + 1)
            value = self.value(depth + 1)
            if isinstance(key, (str, float)):
                table[key] = value

    def _object(self, index: int, depth: int) -> None:
        name = self.string()
        if name.startswith("V "):
            name = self.string()
        prefix, _, suffix = name.partition("torch.")[2].rpartition("Storage")
        if prefix in _NUMBERS and not suffix:
            self.seen[index] = self._storage(_NUMBERS[prefix])
            return
        prefix, _, suffix = name.partition("torch.")[2].rpartition("Tensor")
        if prefix in _NUMBERS and not suffix:
            (dimensions,) = self.numbers("<i")
            sizes, strides = self.longs(dimensions), self.longs(dimensions)
            (offset,) = self.longs(1)
            self.seen[index] = _Tensor(sizes, strides, offset - 1, self.value(depth + 1))
            return
        self.seen[index] = made = _Object(name)
        made.fields = self.value(depth + 1)

    def _storage(self, dtype: str) -> np.ndarray:
        (size,) = self.longs(1)
        if not 0 <= size * np.dtype(dtype).itemsize <= len(self.content) - self.at:
            raise ValueError(f"a storage of {size} numbers")
        values = np.frombuffer(self.content, dtype, size, self.at)
        self.at += values.nbytes
        return values


def recognises(head: bytes, path: Path) -> bool:
    """A table or a torch object, numbered 1."""
    return len(head) >= 8 and struct.unpack("<ii", head[:8]) in _BEGINNINGS


def open_file(path: Path) -> TensorFile:
    """Weights and biases of every module in the network's order, named by the module's place: ``1.weight``, ``5.3.bias``.

    FeatureStoreError for a Lua function in the file, which is code, and for damage.
    """
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tensors = dict(_weights(_Reader(content).value(), "", set()))
        for tensor in tensors.values():
            tensor.check()
    except _Function:
        raise runs_code(path, "it holds a Lua function.") from None
    except (struct.error, ValueError, IndexError, RecursionError, OverflowError) as error:
        raise damaged(path, error) from None
    return TensorFile(
        path, "LuaTorch", {key: Stored(tensor.sizes, partial(tensor.read)) for key, tensor in tensors.items()}
    )


def _weights(value: Any, prefix: str, seen: set[int], depth: int = 0) -> Iterator[tuple[str, _Tensor]]:
    """Each module's tensors once, however often and from wherever it is referred to."""
    if depth > _MOST_DEPTH:
        raise ValueError(f"modules are nested more than {_MOST_DEPTH} deep")
    if not isinstance(value, (dict, _Object)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, _Object):
        fields = value.fields if isinstance(value.fields, dict) else {}
        for name in ("weight", "bias", "running_mean", "running_var"):
            tensor = fields.get(name)
            if isinstance(tensor, _Tensor) and tensor.sizes and 0 not in tensor.sizes:
                yield prefix + name, tensor
        yield from _weights(fields.get("modules"), prefix, seen, depth + 1)
        return
    places = sorted(key for key in value if isinstance(key, float))  # Lua counts from 1, in doubles
    members = sorted(key for key in value if isinstance(key, str))
    for key, name in [*((place, f"{place:g}") for place in places), *zip(members, members, strict=True)]:
        yield from _weights(value[key], f"{prefix}{name}.", seen, depth + 1)
