"""Pickled tables of all versions of pandas as pandas reads them; nothing in a hostile one runs."""

import copyreg
import os
import pickle
import subprocess
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from featurestore.errors import FeatureStoreError
from featurestore.store import pickled_tables as module
from featurestore.store.pickled_tables import read_pickle

SAVED = sorted(
    (Path(__file__).parent / "data" / "pickled").glob("*.pkl")
)  # by pandas 1.5 and 2.0, written with to_pickle
KEYS = [("a", "1"), ("b", "2"), ("b", "10")]


@pytest.mark.parametrize("path", SAVED, ids=lambda path: path.stem)
def test_tables_of_older_pandas(path: Path) -> None:
    found = read_pickle(path)
    assert isinstance(found, pd.DataFrame)
    if path.stem.startswith("arrays"):
        assert list(zip(found["face_id"], found["view"], strict=True)) == KEYS
        assert list(found["age"]) == [1.5, 2, 3]
        np.testing.assert_array_equal(np.stack(found["fc7"]), np.arange(4) + np.arange(3)[:, None])
    else:
        assert list(found.index) == KEYS
        np.testing.assert_array_equal(found.to_numpy(), np.arange(12).reshape(3, 4))


@pytest.mark.parametrize("storage", ["python", "pyarrow"])
@pytest.mark.parametrize("protocol", range(6))
def test_tables_of_this_pandas(tmp_path: Path, storage: str, protocol: int) -> None:
    pd.set_option("mode.string_storage", storage)
    try:
        table = pd.DataFrame({
            "n": [1, 2, 3],
            "x": np.float32([0.5, 1, 2]),
            "face": ["a", "ä", None],
            "yes": [True, False, True],
            "y": np.int8([1, 2, 3]),
            "z": [2.5, 3, np.nan],
        })  # fmt: skip
        for index in (table.index, ["p", "q", "ü"], pd.MultiIndex.from_tuples(KEYS, names=["face_id", "view"])):
            expected = table.set_axis(index)
            (tmp_path / "t.pkl").write_bytes(pickle.dumps(expected, protocol))
            found = read_pickle(tmp_path / "t.pkl")
            pd.testing.assert_frame_equal(found.astype({"face": "str"}), expected, check_column_type=False)
    finally:
        pd.reset_option("mode.string_storage")


class Restored:
    """Pickled as an object of another class, with a state of that one's."""

    def __init__(self, kind: type, state: object) -> None:
        self.made = copyreg._reconstructor, (kind, object, None), state  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: int):
        return self.made


def test_the_state_of_tables_before_pandas_1_3(tmp_path: Path) -> None:
    """As ``BlockManager.__getstate__`` of pandas 1.0 made it, which no Python that is supported runs."""
    axes = [pd.Index(np.array(["x", "face", "y"], object)), pd.RangeIndex(2)]
    numbers = {"values": np.array([[1.0, 2], [3, 4]]), "mgr_locs": np.array([0, 2])}
    texts = {"values": np.array([["a", "b"]], object), "mgr_locs": slice(1, 2, 1)}
    state = (axes, [], [], {"0.14.1": {"axes": axes, "blocks": [numbers, texts]}})
    manager = Restored(pd.core.internals.managers.BlockManager, state)
    (tmp_path / "t.pkl").write_bytes(pickle.dumps(Restored(pd.DataFrame, {"_data": manager, "_typ": "dataframe"}), 4))
    found = read_pickle(tmp_path / "t.pkl")
    assert isinstance(found, pd.DataFrame)
    assert found.to_dict("list") == {"x": [1, 2], "face": ["a", "b"], "y": [3, 4]}


def test_dicts_of_arrays(tmp_path: Path) -> None:
    array = np.arange(6.0).reshape(2, 3)
    kinds = {"f": array, "g": np.asfortranarray(array), "h": array.astype(">f4"), "i": [1, 2.5], "u": np.float32(2)}
    for protocol in range(6):
        (tmp_path / "d.pkl").write_bytes(pickle.dumps({key: kinds[key] for key in "fghi"}, protocol))
        found = read_pickle(tmp_path / "d.pkl")
        assert list(found) == list("fghi")
        for key in "fghi":
            np.testing.assert_array_equal(found[key], kinds[key])


class Hostile:
    def __init__(self, function, *arguments) -> None:
        self.made = function, arguments

    def __reduce__(self):
        return self.made


def owned(folder: Path) -> str:
    return str(folder / "owned")


def hostile(folder: Path) -> dict[str, object]:
    code = f"__import__('os').mkdir({owned(folder)!r})"
    bad = {
        "posix.mkdir": Hostile(os.mkdir, owned(folder)),
        "posix.system": Hostile(os.system, f"mkdir {owned(folder)}"),
        "builtins.eval": Hostile(eval, code),
        "builtins.exec": Hostile(exec, code),
        "builtins.getattr": Hostile(getattr, (), "index"),
        "subprocess.check_call": Hostile(subprocess.check_call, ["mkdir", owned(folder)]),
        "pandas.io.pickle.read_pickle": Hostile(pd.read_pickle, "x.pkl"),
        "pandas.core.computation.eval.eval": Hostile(pd.eval, "1 + 1"),
    }
    table = pd.DataFrame({"face_id": ["a"], "view": ["1"], "fc7": [np.zeros(2)]})
    things: dict[str, object] = {}
    for name, one in bad.items():
        things[name] = one
        things[f"{name} in a cell"] = table.assign(x=pd.Series([one], dtype=object))
        things[f"{name} in a dict"] = {("a", "1"): np.zeros(2), ("a", "2"): one}
        things[f"{name} in an array"] = {"a": np.array([one], object)}
    return things


def test_nothing_runs(tmp_path: Path) -> None:
    things = hostile(tmp_path)
    assert len(things) == 32
    for name, thing in things.items():
        for protocol in range(6):
            (tmp_path / "h.pkl").write_bytes(pickle.dumps(thing, protocol))
            with pytest.raises(FeatureStoreError, match="can run code: it asks for ") as refused:
                read_pickle(tmp_path / "h.pkl")
            function = name.split(" ")[0].rpartition(".")[2]
            assert f".{function}, which is no part" in str(refused.value), name
            assert not Path(owned(tmp_path)).exists()
    pickle.loads(pickle.dumps(things["posix.mkdir"]))  # so the files could have done it
    assert Path(owned(tmp_path)).exists()


def nested_tuples(levels: int) -> bytes:
    """{((1, 1), (1, 1)): 1} and so on: hashing such a key takes a step for each of its 2**levels numbers."""
    return b"\x80\x04}K\x01\x94" + b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(levels)) + b"K\x01s."


BOMBS = {
    "a key that holds itself twice, 60 times over": nested_tuples(60),
    "a very deep key": b"\x80\x04}K\x01" + b"\x85" * 100_000 + b"K\x01s.",
    "a buffer of a terabyte": b"\x80\x04cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "a memo number": b"\x80\x04}r\xff\xff\xff\x7f.",
    "very many operations": b"\x80\x04]" + b"N0" * (1 << 17) + b".",
}


def test_bombs_do_not_go_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_OPERATIONS", 1 << 17)
    array = np.zeros(1 << 12)
    bombs = dict(BOMBS)
    bombs["one array a thousand times"] = pickle.dumps({str(i): array for i in range(1000)})
    bombs["one array in a thousand cells"] = pickle.dumps(pd.DataFrame({"fc7": [array] * 1000}))
    bombs["a list in a list"] = pickle.dumps({"a": [[1.0]]})
    bombs["not all of it"] = pickle.dumps({"a": array})[:-100]
    bombs["a text"] = pickle.dumps("a")
    bombs["nothing"] = b""
    for name, content in bombs.items():
        (tmp_path / "b.pkl").write_bytes(content)
        start = time.perf_counter()
        with pytest.raises(FeatureStoreError, match=r"is damaged, or no pickle|holds neither a table") as refused:
            read_pickle(tmp_path / "b.pkl")
        assert time.perf_counter() - start < 10, name
        assert len(str(refused.value)) < 500, name


def test_the_bombs_are_pickles() -> None:
    """They are refused for what they hold, not because they are no pickles."""
    assert pickle.loads(nested_tuples(2)) == {((1, 1), (1, 1)): 1}


def test_what_a_pickle_sets_is_gone_with_it(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02cpandas\nDataFrame\nN}U\x0c__setstate__c_codecs\nencode\ns\x86b.")
    with pytest.raises(FeatureStoreError):
        read_pickle(tmp_path / "a.pkl")
    for path in SAVED:
        read_pickle(path)
