"""Dissimilarity of a face's views and of different faces', against a slow loop over all pairs."""

import math
from itertools import combinations
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import cdist

from featurestore import FeatureStore
from featurestore.errors import FeatureStoreError
from featurestore.queries import view_invariance as module
from featurestore.queries.view_invariance import invariance
from tests.conftest import LAYERS, run_pass, write_photographs

ANGLES = ["frontal", "yaw+30", "yaw-30", "60"]
ITEMS = [(f"f{face}", view) for face in range(8) for view in ANGLES if (face, view) != (3, "60")]
DEGREES = {"frontal": 0, "yaw+30": 30, "yaw-30": -30, "60": 60}


def activations(n: int = len(ITEMS), seed: int = 0) -> np.ndarray:
    """(n, 5) float32, of which neighbours are alike."""
    rng = np.random.default_rng(seed)
    return (np.repeat(rng.standard_normal((n, 5)), 4, axis=0)[:n] + rng.standard_normal((n, 5))).astype(np.float32)


def by_hand(x: np.ndarray, items: list, difference, metric: str = "cosine") -> dict:
    """Of each difference, the dissimilarities of same and of other pairs, with their faces."""
    d = cdist(x.astype(float), x.astype(float), metric)
    found: dict = {}
    for i, j in combinations(range(len(items)), 2):
        (face, view), (other, seen) = items[i], items[j]
        key = difference(view, seen)
        if key is not None:
            found.setdefault(key, ([], []))[int(face != other)].append((d[i, j], face, other))
    return {key: value for key, value in found.items() if value[0]}


def check(table: pd.DataFrame, wanted: dict) -> None:
    assert set(table["difference"]) == set(wanted)
    for row in table.itertuples():
        same, other = ([value for value, *_ in pairs] for pairs in wanted[row.difference])
        assert row.same == pytest.approx(np.mean(same), abs=1e-5)
        assert row.other == pytest.approx(np.mean(other), abs=1e-5)
        assert (row.n_pairs, row.n_other_pairs) == (len(same), len(other))
        assert row.n_faces == len({face for _, face, _ in wanted[row.difference][0]})
        spread = math.sqrt((np.var(same) + np.var(other)) / 2)
        assert row.separation == pytest.approx((np.mean(other) - np.mean(same)) / spread, rel=1e-4)


@pytest.mark.parametrize(
    ("metric", "size"),
    [("cosine", None), ("cosine", 1), ("cosine", 7), ("correlation", None), ("euclidean", None), ("cityblock", None)],
)
def test_differences_of_angles(monkeypatch: pytest.MonkeyPatch, metric: str, size: int | None) -> None:
    if size:
        monkeypatch.setattr(module, "block_rows", lambda *_, **__: size)
    x = activations()
    table = invariance(x, items=ITEMS, metric=metric)
    assert table["difference"].tolist() == [30, 60, 90]
    assert (table["layer"] == "activations").all()
    check(table, by_hand(x, ITEMS, lambda a, b: abs(DEGREES[a] - DEGREES[b]), metric))
    assert ((table["same_low"] < table["same"]) & (table["same"] < table["same_high"])).all()
    assert ((table["other_low"] < table["other"]) & (table["other"] < table["other_high"])).all()


def test_from_a_reference() -> None:
    x = activations()
    table = invariance(x, items=ITEMS, reference="yaw-30")
    assert table["difference"].tolist() == [30, 60, 90]
    check(table, by_hand(x, ITEMS, lambda a, b: abs(DEGREES[a] - DEGREES[b]) if "yaw-30" in (a, b) else None))


def test_angles_on_the_circle() -> None:
    views = ["0", "11.25", "180", "348.75"]
    items = [(face, view) for face in "abcd" for view in views]
    x = activations(16)

    def apart(a: str, b: str) -> float:
        turned = abs(float(a) - float(b))
        return min(turned, 360 - turned)

    table = invariance(x, items=items)
    assert table["difference"].tolist() == [11.25, 22.5, 168.75, 180]
    check(table, by_hand(x, items, apart))


def test_pairs_of_views_that_are_no_angles() -> None:
    views = ["left", "right", "profile 2", "profile 10"]
    items = [(face, view) for face in "abcd" for view in views]
    x = activations(16)
    table = invariance(x, items=items)
    assert "profile 2 – profile 10" in set(table["difference"])  # in natural order
    check(table, by_hand(x, items, lambda a, b: " – ".join(sorted((a, b), key=lambda v: (v[:7], len(v), v)))))


@pytest.mark.parametrize(
    ("view", "angle"),
    [
        ("yaw+30", 30),
        ("yaw-30.5", -30.5),
        ("-30", -30),
        ("348.75", 348.75),
        ("Frontal", 0),
        ("frontal|flipped", 0),
        ("30|flipped", -30),
        ("yaw30_pitch10", None),
        ("left", None),
    ],
)
def test_numbers_in_the_names_of_views(view: str, angle: float | None) -> None:
    assert module._angle(view) == angle


def test_intervals_are_those_of_resampled_faces() -> None:
    """Each resample of faces as pairs that are repeated: those of two faces as often as the product of their counts."""
    rng = np.random.default_rng(4)
    items = [(f"f{face}", view) for face in range(30) for view in ("0", "30")]
    x = np.repeat(rng.standard_normal((30, 4)), 2, axis=0) + 0.7 * rng.standard_normal((60, 4)) + 1
    ((same, other),) = by_hand(x, items, lambda a, b: 30 if a != b else None).values()
    drawn = []
    for _ in range(1000):
        counts = pd.Series(rng.integers(0, 30, 30)).value_counts()
        times = {f"f{face}": n for face, n in counts.items()}
        one = np.array([times.get(face, 0) for _, face, _ in same])
        two = np.array([times.get(a, 0) * times.get(b, 0) for _, a, b in other])
        drawn.append([np.average([d for d, *_ in pairs], weights=w) for pairs, w in ((same, one), (other, two))])
    (row,) = invariance(x, items=items).to_dict("records")
    for name, errors in zip(("same", "other"), np.std(drawn, axis=0), strict=True):
        half = (row[f"{name}_high"] - row[f"{name}_low"]) / 2
        assert half == pytest.approx(
            2.045 * np.sqrt(30 / 29) * errors, rel=0.12
        )  # Student's t with 29 degrees of freedom


def test_too_few_faces_for_an_interval() -> None:
    items = [("a", "0"), ("a", "30"), ("b", "0"), ("b", "30"), ("c", "0")]
    (row,) = invariance(activations(5), items=items).to_dict("records")
    assert (row["n_faces"], row["n_pairs"], row["n_other_pairs"]) == (2, 2, 4)
    assert np.isnan([row["same_low"], row["same_high"]]).all()
    assert row["other_low"] < row["other"] < row["other_high"]


def test_the_same_photograph_is_no_pair(tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "photographs", 4, 2)
    (photographs / "f1/2.png").write_bytes((photographs / "f1/1.png").read_bytes())
    (photographs / "f3/2.png").write_bytes((photographs / "f2/1.png").read_bytes())
    run_pass(photographs, tmp_path / "s.zarr", [LAYERS[0]])
    (row,) = invariance(FeatureStore.open(tmp_path / "s.zarr")).to_dict("records")
    assert (row["n_faces"], row["n_pairs"], row["n_other_pairs"]) == (3, 3, 4 * 3 - 1)


def test_all_layers_of_a_store(small_store: Path, small_rows: dict[str, np.ndarray]) -> None:
    store = FeatureStore.open(small_store)
    table = invariance(store)
    assert table["layer"].tolist() == LAYERS
    items = list(store.source().keys)
    for name, rows in small_rows.items():
        wanted = by_hand(rows.reshape(10, -1), items, lambda a, b: module.ANOTHER if a != b else 0)
        check(table[table["layer"] == name], wanted)
    with dask.config.set(scheduler="sync"):
        pd.testing.assert_frame_equal(table, invariance(store.xarray()))
    assert invariance(store, LAYERS[0], where="face_id != 'f1'").loc[0, "n_faces"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "cosin"}, r"no `metric` 'cosin'\. Did you mean cosine"),
        ({"reference": "frontl"}, r"no view 'frontl' for `reference`\. Did you mean frontal"),
        ({"where": "face_id < 'f2'"}, "2 faces are left, and a comparison of views needs at least 3"),
        ({"where": "view == '60'"}, "all items have the view '60', so there are no views to compare"),
        (
            {"where": "(face_id == 'f1' and view == '60') or (face_id != 'f1' and view == 'frontal')"},
            "no face has two views to be compared",
        ),
        (
            {"where": "(face_id == 'f1') == (view == '60')", "reference": "60"},
            "no face has two views of which one is '60' to be compared",
        ),
        ({"memory": "1MiB"}, "`memory` 1.0 MiB is too little"),
    ],
)
def test_what_can_be_wrong(options: dict, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        invariance(activations(), items=ITEMS, **options)


def test_views_that_are_named_apart() -> None:
    items = [(f"f{i // 2}", f"photograph_{i}") for i in range(1002)]
    with pytest.raises(FeatureStoreError, match=r"1,002 different views, and at most 1,000"):
        invariance(activations(1002), items=items)


def test_nan_is_refused_by_name() -> None:
    x = activations()
    x[3, 2] = math.nan
    with pytest.raises(FeatureStoreError, match=r"'activations' holds NaN or infinite numbers for 1 items: f0\|60"):
        invariance(x, items=ITEMS)


def test_photographs_numbered_with_zeros_have_no_angles() -> None:
    items = [(f"f{face}", f"{view:04d}") for face in range(4) for view in range(1, 4)]
    assert invariance(activations(12), items=items)["difference"].tolist() == [module.ANOTHER]


def test_blocks_of_any_size_sum_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = invariance(activations(), items=ITEMS)
    monkeypatch.setattr(module, "block_rows", lambda *args, **options: 4)
    pd.testing.assert_frame_equal(invariance(activations(), items=ITEMS), whole, rtol=1e-5)
