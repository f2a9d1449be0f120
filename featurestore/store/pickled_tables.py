"""Pickled pandas tables and dicts of arrays, as earlier extractors saved them, read without running anything.

pandas' own classes are not reached from the file: stand-ins keep what they would be made of, and a plain table is built of it.
"""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from featurestore import safe_pickle
from featurestore.errors import FeatureStoreError
from featurestore.safe_pickle import Array, Refused

_OPERATIONS = 1 << 22  # a row with an array takes about thirty
_MOST_TIMES = 8  # bytes of numbers for a byte of the file: small integers in lists take one or two there


class _Frame:
    """Replaces pandas.DataFrame: its state."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Manager:
    """Replaces BlockManager: blocks of columns, and the two axes."""

    def __init__(self, blocks: Any = (), axes: Any = ()) -> None:
        self.blocks, self.axes = blocks, axes

    def __setstate__(self, state: Any) -> None:
        """Of pandas before 1.3."""
        (version,) = (value for key, value in state[3].items() if _text(key) == "0.14.1")
        named = {_text(key): value for key, value in version.items()}
        self.axes = named["axes"]
        blocks = [{_text(key): value for key, value in block.items()} for block in named["blocks"]]
        self.blocks = [_Block(block["values"], block["mgr_locs"]) for block in blocks]


@dataclass(frozen=True)
class _Block:
    values: Any
    places: Any


@dataclass(frozen=True)
class _Index:
    kind: str
    made_of: Any


class _Texts:
    """Replaces pandas' arrays of strings."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


@dataclass(frozen=True)
class _ArrowStrings:
    data: Any


Known: TypeAlias = dict[
    tuple[str, str], Any
]  # what a pickle names, and its stand-in; made for each file, as array_stand_ins


def _stand_ins() -> Known:
    class Frame(_Frame):
        pass

    class Manager(_Manager):
        pass

    class Texts(_Texts):
        pass

    def block(values: Any, places: Any, ndim: Any = 2) -> _Block:
        return _Block(values, places)

    def reconstructor(kind: Any, *_: Any) -> Any:
        """By which protocols 0 and 1 make what has a state."""
        if kind not in (Frame, Manager, Texts):
            raise Refused("it asks for copyreg._reconstructor, which is no part of an array")
        return kind()

    known: Known = {**safe_pickle.array_stand_ins(objects=True), **_plain_stand_ins(), **_index_stand_ins()}
    known |= _text_stand_ins(Texts)
    for module in ("pandas", "pandas.core.frame"):
        known[module, "DataFrame"] = Frame
    for module in ("pandas.core.internals.managers", "pandas.core.internals", "pandas._libs.internals"):
        known[module, "BlockManager"] = Manager
    for module in ("copyreg", "copy_reg"):
        known[module, "_reconstructor"] = reconstructor
    known["pandas._libs.internals", "_unpickle_block"] = block
    known["pandas._libs.missing", "NA"] = None
    return known


def _plain_stand_ins() -> Known:
    def part(start: Any, stop: Any, step: Any) -> slice:
        if not all(isinstance(each, int) for each in (start, stop, step)):
            raise ValueError("a part of a table has no ends")
        return slice(start, stop, step)

    def content(data: Any = b"", *_: Any) -> Any:
        """A number would be a promise of memory."""
        data = safe_pickle.encode(data)
        if not isinstance(data, bytes | bytearray):
            raise ValueError("bytes were expected")
        return data

    known: Known = {("pyarrow.lib", "py_buffer"): content}
    for module in ("builtins", "__builtin__"):
        known |= {(module, "slice"): part, (module, "bytearray"): content, (module, "object"): None}
    return known


def _index_stand_ins() -> Known:
    def index(kind: Any, made_of: Any) -> _Index:
        return _Index(kind, made_of)

    known: Known = {("pandas.core.indexes.base", "_new_Index"): index}
    kinds = {"base": ["Index"], "range": ["RangeIndex"], "multi": ["MultiIndex"]}
    kinds["numeric"] = ["Int64Index", "UInt64Index", "Float64Index", "NumericIndex"]
    for module, names in kinds.items():
        for name in names:
            known["pandas", name] = known[f"pandas.core.indexes.{module}", name] = name
    return known


def _text_stand_ins(kind: type[_Texts]) -> Known:
    """Of pandas' strings, in Arrow's memory or as objects."""

    def arrow(data: Any, *_: Any) -> _ArrowStrings:
        return _ArrowStrings(data)

    def same(name: Any, *_: Any) -> Any:
        return name

    def texts(*_: Any) -> _Texts:
        return kind()

    known: Known = {
        ("pandas", "StringDtype"): same,
        ("pandas.core.arrays.string_", "StringDtype"): same,
        ("pandas._libs.arrays", "__pyx_unpickle_NDArrayBacked"): texts,
        ("pyarrow.lib", "_restore_array"): arrow,
        ("pyarrow.lib", "type_for_alias"): same,
    }
    for name in ("ArrowStringArray", "ArrowStringArrayNumpySemantics", "StringArray", "StringArrayNumpySemantics"):
        for module in ("pandas.arrays", "pandas.core.arrays.string_", "pandas.core.arrays.string_arrow"):
            known[module, name] = kind
    return known


def read_pickle(path: Path) -> "pd.DataFrame | dict[Any, Any]":
    """The table, or the dict of arrays (of one level or two), that a pickle of any protocol holds. It is read whole.

    Cells of a table are text, numbers or arrays; rows have an index only where the file names one. FeatureStoreError, and
    nothing run, for a pickle that names anything else than what arrays and tables are made of, and for a damaged one.
    """
    content = path.read_bytes()
    try:
        found = safe_pickle.load(content, _stand_ins(), _OPERATIONS)
        if not isinstance(found, _Frame | dict):
            raise FeatureStoreError(
                f"{path} holds neither a table (pandas.DataFrame) nor a dict of arrays but a {type(found).__name__.strip('_')}."
            )
        limit = [_MOST_TIMES * len(content)]
        return _table(found, limit) if isinstance(found, _Frame) else _dict(found, limit, 2)
    except Refused as error:
        raise FeatureStoreError(
            f"{path} was not loaded, because such a file can run code: {error} or a table. If you trust it, open it yourself and "
            "save the arrays as .npy or HDF5."
        ) from None
    except FeatureStoreError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise FeatureStoreError(f"{path} is damaged, or no pickle of arrays: {first.rstrip('.')[:200]}.") from None


def _text(value: Any) -> Any:
    """Text of bytes and of NumPy's strings, numbers of NumPy's; other things as they are."""
    if isinstance(value, Array) and value.shape == ():
        value = value.numpy().item()
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _dict(found: dict[Any, Any], limit: list[int], levels: int) -> dict[Any, Any]:
    made: dict[Any, Any] = {}
    for key, value in found.items():
        plain = tuple(map(_text, key)) if isinstance(key, tuple) else _text(key)
        if not isinstance(plain, str | int | tuple):
            raise ValueError(f"a key is a {type(plain).__name__.strip('_')}")
        nested = isinstance(value, dict) and levels > 1
        made[plain] = _dict(value, limit, levels - 1) if nested else _cell(value, limit)
        if not isinstance(made[plain], np.ndarray | dict):
            raise ValueError(f"{str(plain)[:80]!r} is not an array")
    return made


def _cell(value: Any, limit: list[int]) -> Any:
    """Text, a number or an array; ``limit`` is how many bytes all arrays may have from here on."""
    value = _text(value)
    if isinstance(value, Array):
        value = value.numpy()
    elif isinstance(value, list | tuple) and value and all(isinstance(each, int | float) for each in value):
        value = np.array(value)
    if isinstance(value, np.ndarray):
        limit[0] -= value.nbytes
        if value.dtype.kind == "O" or limit[0] < 0:
            raise ValueError("arrays of objects" if value.dtype.kind == "O" else "more numbers than it has bytes")
        return value
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"a cell holds a {type(value).__name__.strip('_')}")


def _table(frame: _Frame, limit: list[int]) -> pd.DataFrame:
    state = {_text(key): value for key, value in frame.state.items()}
    manager = state.get("_mgr", state.get("_data"))
    if not isinstance(manager, _Manager):
        raise ValueError("a table has no columns")
    columns, rows = (_index(axis, limit) for axis in manager.axes)
    if columns is None:
        columns = pd.RangeIndex(sum(len(_values(block, limit)[0]) for block in manager.blocks))
    parts: list[Any] = []
    names: list[int] = []
    for block in manager.blocks:
        values, places = _values(block, limit)
        names += np.arange(len(columns))[places].tolist()
        parts.append(pd.DataFrame(values.T))
    if sorted(names) != list(range(len(columns))):
        raise ValueError("a table's columns are not all there")
    table = pd.concat(parts, axis=1) if parts else pd.DataFrame()
    table = table.iloc[:, np.argsort(names)]
    table.columns = columns
    if rows is not None:
        table.index = rows
    return table


def _values(block: Any, limit: list[int]) -> tuple[np.ndarray, Any]:
    """(columns, rows) of a block, and their places among the columns."""
    places = block.places.numpy() if isinstance(block.places, Array) else block.places
    values = _column(block.values, limit)
    if not isinstance(places, slice | np.ndarray) or values.ndim not in (1, 2):
        raise ValueError("a table's columns have no places")
    return values if values.ndim == 2 else values[None], places


def _column(values: Any, limit: list[int]) -> np.ndarray:
    """Numbers, or objects that are cells, out of NumPy's or pandas' arrays."""
    if isinstance(values, _Texts):
        return _texts(values)
    if not isinstance(values, Array):
        raise ValueError(f"a column is a {type(values).__name__.strip('_')}")
    array = values.numpy()
    if array.dtype.kind != "O":
        limit[0] -= array.nbytes
        return array.astype(object) if array.dtype.kind in "SU" else array
    flat = np.empty(array.size, object)
    for i, value in enumerate(array.ravel()):
        flat[i] = _cell(value, limit)
    return flat.reshape(array.shape)


def _texts(values: _Texts) -> np.ndarray:
    """(n,) object: str, or None where it is missing."""
    if isinstance(values.state, tuple):  # (dtype, array), and attributes
        array = next(each for each in values.state if isinstance(each, Array)).numpy()
        return np.array([_text(each) if isinstance(_text(each), str) else None for each in array.ravel()], object)
    state = {_text(key): value for key, value in values.state.items()}
    strings: Any = state.get("_pa_array", state.get("_data"))
    kind, length, _, offset, (valid, ends, data), *_ = strings.data
    sizes = {"large_string": "<i8", "string": "<i4"}
    if kind not in sizes or offset != 0:
        raise ValueError("a column of strings is none")
    bounds = np.frombuffer(ends, sizes[kind])[: length + 1].tolist()
    if len(bounds) != length + 1 or bounds[0] < 0 or any(a > b for a, b in pairwise(bounds)):
        raise ValueError("a column of strings ends early")
    mask = np.unpackbits(np.frombuffer(valid, np.uint8), bitorder="little") if valid else np.ones(length, np.uint8)
    pairs = pairwise(bounds)
    return np.array([data[a:b].decode() if seen else None for (a, b), seen in zip(pairs, mask, strict=False)], object)


def _index(index: Any, limit: list[int]) -> pd.Index | None:
    """None for positions, which name nothing."""
    if not isinstance(index, _Index) or not isinstance(index.made_of, dict):
        raise ValueError("a table has no index")
    made_of = {_text(key): value for key, value in index.made_of.items()}
    if index.kind == "RangeIndex":
        return None
    if index.kind == "MultiIndex":
        levels = [_level(level, limit) for level in made_of["levels"]]
        codes = [code.numpy() for code in made_of["codes" if "codes" in made_of else "labels"]]
        return pd.MultiIndex.from_arrays(
            [_taken(level, code) for level, code in zip(levels, codes, strict=True)],
            names=[_text(name) for name in made_of["names"]],
        )
    return pd.Index(_level(index, limit), name=_text(made_of.get("name")))


def _taken(level: np.ndarray, codes: np.ndarray) -> np.ndarray:
    if len(codes) and codes.min() < 0:
        raise ValueError("an index has missing values")
    taken: np.ndarray = level[codes]
    return taken


def _level(index: Any, limit: list[int]) -> np.ndarray:
    """(n,) of a plain index."""
    made_of = {_text(key): value for key, value in index.made_of.items()}
    if index.kind == "RangeIndex":
        ends = [made_of[name] for name in ("start", "stop", "step")]
        if not all(isinstance(end, int) for end in ends) or len(range(*ends)) > limit[0]:
            raise ValueError("an index has no ends")
        return np.arange(*ends)
    return _column(made_of["data"], limit).ravel()
