"""Verification of pairs, against scikit-learn, SciPy and slow loops."""

import math
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import dask
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.spatial.distance import cdist

from featurestore import FeatureStore
from featurestore.errors import FeatureStoreError
from featurestore.queries import verification as module
from featurestore.queries.pairs import drawn_pairs, photograph_numbers
from featurestore.queries.verification import verify_faces
from tests.conftest import LAYERS, run_pass, write_photographs

FACES, VIEWS = 12, 4
ITEMS = [(f"f{face}", str(view)) for face in range(FACES) for view in range(VIEWS)]


def activations(seed: int = 0, noise: float = 1.2) -> np.ndarray:
    """(48, 6) float32: faces whose views differ about as much as they do."""
    rng = np.random.default_rng(seed)
    own = np.repeat(rng.standard_normal((FACES, 6)), VIEWS, axis=0)
    return (own + noise * rng.standard_normal(own.shape)).astype(np.float32)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_RESAMPLES", 100)


@pytest.mark.parametrize("metric", ["cosine", "correlation", "euclidean", "cityblock"])
def test_dissimilarities_are_those_of_scipy(metric: str) -> None:
    x = activations()
    pairs = verify_faces(x, items=ITEMS, metric=metric, n_pairs=50).pairs
    wanted = cdist(x.astype(float), x.astype(float), metric)
    for row in pairs.itertuples():
        i, j = ITEMS.index((row.face_1, row.view_1)), ITEMS.index((row.face_2, row.view_2))
        assert row.activations == pytest.approx(wanted[i, j], abs=1e-5)
        assert row.same == (row.face_1 == row.face_2)
    assert pairs["activations"].dtype == np.float32


@pytest.mark.parametrize("metric", ["cosine", "cityblock"])
@pytest.mark.parametrize("rounded", [False, True])
def test_curve_area_and_rates_are_those_of_scikit_learn(metric: str, rounded: bool) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    x = np.sign(activations()) if rounded else activations()  # signs are tied
    found = verify_faces(x, items=ITEMS, metric=metric, n_pairs=60, seed=3)
    (row,), pairs = found.table.to_dict("records"), found.pairs
    assert pairs["activations"].nunique() < 120 or not rounded
    assert row["area"] == pytest.approx(metrics.roc_auc_score(pairs["same"], -pairs["activations"]), abs=1e-12)
    false, true, threshold = metrics.roc_curve(pairs["same"], -pairs["activations"], drop_intermediate=False)
    np.testing.assert_allclose(found.roc["false_accepts"], false, atol=1e-12)
    np.testing.assert_allclose(found.roc["true_accepts"], true, atol=1e-12)
    np.testing.assert_allclose(found.roc["threshold"], -threshold)
    assert row["true_accepts_at_0.1"] == true[false <= 0.1].max()
    assert np.isnan([row["true_accepts_at_0.01"], row["true_accepts_at_0.001"]]).all()  # of 60 different pairs
    between = np.linspace(0, 1, 200_001)
    gap = np.abs(between - (1 - np.interp(between, false, true)))
    assert row["equal_error_rate"] == pytest.approx(between[gap.argmin()], abs=1e-5)


def test_area_and_accuracy_against_a_slow_loop() -> None:
    found = verify_faces(activations(), items=ITEMS, n_pairs=40, seed=1)
    pairs, row = found.pairs, found.table.loc[0]
    same, different = (pairs.loc[pairs["same"] == kind, "activations"].tolist() for kind in (True, False))
    wins = sum((a < b) + 0.5 * (a == b) for a in same for b in different)
    assert row["area"] == pytest.approx(wins / len(same) / len(different), abs=1e-12)
    assert (row["n_same"], row["n_different"]) == (40, 40)
    right, thresholds = 0, []
    for fold in range(10):
        mine = pairs["fold"] == fold
        assert mine.sum() == 8
        assert pairs.loc[mine, "same"].sum() == 4
        others = pairs[~mine]
        levels = sorted(others["activations"].astype(float).unique())
        candidates = [levels[0] - 1e-9, *((a + b) / 2 for a, b in pairwise(levels)), levels[-1]]
        scores = [((others["activations"] <= t) == others["same"]).sum() for t in candidates]
        best = [t for t, score in zip(candidates, scores, strict=True) if score == max(scores)]
        thresholds.append(best[len(best) // 2])
        right += ((pairs.loc[mine, "activations"] <= thresholds[-1]) == pairs.loc[mine, "same"]).sum()
    assert row["accuracy"] == right / 80
    assert row["threshold"] == pytest.approx(np.mean(thresholds))
    assert row["accuracy_low"] < row["accuracy"] < row["accuracy_high"]


def test_intervals_are_those_of_resampled_faces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each resample as lists in which pairs are repeated, and all their comparisons."""
    monkeypatch.setattr(module, "_RESAMPLES", 1000)
    found = verify_faces(activations(), items=ITEMS, n_pairs=40)
    pairs, row = found.pairs, found.table.loc[0]
    distance, same = pairs["activations"].to_numpy(), pairs["same"].to_numpy()
    rng, areas = np.random.default_rng(5), []
    for _ in range(1000):
        drawn = dict(
            zip(*np.unique(rng.choice([f"f{face}" for face in range(FACES)], FACES), return_counts=True), strict=True)
        )
        one, other = (pairs[name].map(drawn).fillna(0).to_numpy(int) for name in ("face_1", "face_2"))
        times = np.where(same, one, one * other)
        mine, others = (np.repeat(distance[kind], times[kind]) for kind in (same, ~same))
        areas.append((mine[:, None] < others).mean())
    width = np.sqrt(12 / 11) * stats.t.ppf(0.975, 11) / 1.96
    low, high = row["area"] + width * (np.percentile(areas, [2.5, 97.5]) - row["area"])
    assert row["area_low"] == pytest.approx(low, abs=0.03)
    assert row["area_high"] == pytest.approx(high, abs=0.03)
    assert row["area_low"] < row["area"] < row["area_high"]
    assert row["equal_error_rate_low"] < row["equal_error_rate"] < row["equal_error_rate_high"]


def test_kinds_that_do_not_overlap() -> None:
    row = verify_faces(np.repeat(np.eye(FACES), VIEWS, axis=0), items=ITEMS, n_pairs=40).table.loc[0]
    assert (row["area"], row["equal_error_rate"], row["accuracy"], row["true_accepts_at_0.1"]) == (1, 0, 1, 1)
    assert row[["area_low", "area_high", "equal_error_rate_low", "equal_error_rate_high"]].isna().all()
    assert 0.9 < row["accuracy_low"] < row["accuracy_high"] == 1  # Wilson's


def test_pairs_are_drawn_without_repetition_and_all_if_there_are_fewer() -> None:
    x = activations()
    every = verify_faces(x, items=ITEMS, n_pairs=5000).pairs
    made = {((a, b), (c, d)) for a, b, c, d in every[["face_1", "view_1", "face_2", "view_2"]].to_numpy()}
    assert made == set(combinations(ITEMS, 2))
    assert len(every) == len(made)
    one, again, other = (verify_faces(x, items=ITEMS, n_pairs=30, seed=seed).pairs for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(one, again)
    assert not one.equals(other)
    assert one["same"].sum() == 30 == len(one) - 30
    assert not one[["face_1", "view_1", "face_2", "view_2"]].duplicated().any()


def test_each_pair_is_as_probable_as_another() -> None:
    items = [("a", "1"), ("b", "1"), ("a", "2"), ("a", "3"), ("b", "2"), ("c", "1")]  # faces in no order
    x = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
    chosen = module.select(x, items=items)
    counts: dict[tuple[str, ...], int] = {}
    for seed in range(200):
        pairs = drawn_pairs(chosen, 2, np.random.default_rng(seed))
        for pair in pairs[["face_1", "view_1", "face_2", "view_2"]].itertuples(index=False):
            counts[tuple(pair)] = counts.get(tuple(pair), 0) + 1
    same = [n for pair, n in counts.items() if pair[0] == pair[2]]
    different = [n for pair, n in counts.items() if pair[0] != pair[2]]
    assert (len(same), len(different)) == (4, 11)
    assert all(abs(n - 100) < 35 for n in same)
    assert all(abs(n - 400 / 11) < 25 for n in different)


def test_the_same_photograph_is_no_pair(tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "photographs", 4, 3)
    (photographs / "f1/2.png").write_bytes((photographs / "f1/1.png").read_bytes())
    (photographs / "f3/3.png").write_bytes((photographs / "f2/1.png").read_bytes())
    run_pass(photographs, tmp_path / "s.zarr", [LAYERS[0]])
    store = FeatureStore.open(tmp_path / "s.zarr")
    pairs = verify_faces(store, n_pairs=500).pairs
    made = {f"{row.face_1}|{row.view_1} {row.face_2}|{row.view_2}" for row in pairs.itertuples()}
    assert len(made) == 12 * 11 // 2 - 2
    assert not made & {"f1|1 f1|2", "f2|1 f3|3"}
    numbers, originals = photograph_numbers(store.items), store.source().originals
    np.testing.assert_array_equal(numbers[:, None] == numbers, originals[:, None] == originals)


def test_photographs_that_are_cut_mirrored_or_unknown() -> None:
    keys = pd.MultiIndex.from_tuples(
        [("a", "1"), ("a", "1|flipped"), ("b", "1"), ("c", "1"), ("d", "1"), ("e", "1")], names=["face_id", "view"]
    )
    labels = pd.DataFrame({"image_sha256": ["x", "x", "x", "x", "", ""], "box_x": [1.0, 1, 2, 1, 3, 3]}, keys)
    numbers = photograph_numbers(labels)
    assert [(i, j) for i, j in combinations(range(6), 2) if numbers[i] == numbers[j]] == [(0, 3)]
    assert len(set(photograph_numbers(labels[["box_x"]]))) == 6


@pytest.mark.parametrize("size", [1, 7])
def test_blocks_and_schedulers_change_nothing(small_store: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    store = FeatureStore.open(small_store)
    found = verify_faces(store, n_pairs=20)
    assert found.table["layer"].tolist() == LAYERS
    assert set(found.roc["layer"]) == set(LAYERS)
    monkeypatch.setattr(module, "block_rows", lambda *_, **__: size)
    with dask.config.set(scheduler="sync"):
        again = verify_faces(store.xarray(), n_pairs=20)
    pd.testing.assert_frame_equal(found.table, again.table, rtol=1e-5)
    pd.testing.assert_frame_equal(found.pairs, again.pairs, rtol=1e-5, check_dtype=False)
    x = store.rows(LAYERS[0]).gather(range(10)).flatten(1).double().numpy()
    wanted = cdist(x, x, "cosine")
    keys = list(store.source().keys)
    for row in found.pairs.itertuples():
        i, j = keys.index((row.face_1, row.view_1)), keys.index((row.face_2, row.view_2))
        assert getattr(row, LAYERS[0]) == pytest.approx(wanted[i, j], abs=1e-6)


def given() -> pd.DataFrame:
    drawn = verify_faces(activations(), items=ITEMS, n_pairs=30).pairs
    return drawn[["face_1", "view_1", "face_2", "view_2"]]


def test_a_table_and_a_csv_of_pairs(tmp_path: Path) -> None:
    x, table = activations(), given()
    table = table.assign(fold=np.arange(60) % 3)
    found = verify_faces(x, None, table, items=ITEMS)
    assert found.pairs["same"].sum() == 30
    table.to_csv(tmp_path / "pairs.csv", index=False)
    from_file = verify_faces(x, None, tmp_path / "pairs.csv", items=ITEMS)
    pd.testing.assert_frame_equal(found.table, from_file.table)
    assert found.pairs["fold"].astype(str).tolist() == from_file.pairs["fold"].tolist()
    numbers = verify_faces(x, None, table.astype({"view_1": int, "view_2": int}), items=ITEMS)  # their digits
    pd.testing.assert_frame_equal(found.pairs, numbers.pairs)


def test_pairs_say_which_are_the_same(tmp_path: Path) -> None:
    """Two ids of one person, and one id of two."""
    table = given()
    other = table["face_1"] != table["face_2"]
    claimed = table.assign(same=np.where(other, "True", "FALSE"))
    claimed.to_csv(tmp_path / "pairs.csv", index=False)
    plain, turned = (
        verify_faces(activations(), None, each, items=ITEMS).table for each in (table, tmp_path / "pairs.csv")
    )
    assert turned.loc[0, "area"] == pytest.approx(1 - plain.loc[0, "area"])
    ones = verify_faces(activations(), None, table.assign(same=other.astype(int)), items=ITEMS).table
    assert ones.loc[0, "area"] == turned.loc[0, "area"]


LFW: dict[str, Callable[[str, int], str]] = {
    "as the files": lambda name, i: f"{name}_{i:04d}",
    "four digits": lambda _, i: f"{i:04d}",
    "a number": lambda _, i: str(i),
}


@pytest.mark.parametrize("view", LFW.values(), ids=LFW)
def test_lfw_pairs(tmp_path: Path, view: Callable[[str, int], str]) -> None:
    names = ["Abel_Pacheco", "Akhmed_Zakayev", "Ziwang_Xu", "Zico"]
    items = [(name, view(name, i)) for name in names for i in range(1, 4)]
    x = activations()[: len(items)]
    lines = []
    for fold in range(2):
        lines += [f"{name}\t{1 + fold}\t3" for name in names[:3]]
        lines += [f"{a}\t1\t{b}\t{3 - fold}" for a, b in pairwise(names)]
    (tmp_path / "pairs.txt").write_text("2\t3\n" + "\n".join(lines) + "\n")
    found = verify_faces(x, None, tmp_path / "pairs.txt", items=items)
    assert found.pairs["fold"].tolist() == [0] * 6 + [1] * 6
    assert found.pairs["same"].tolist() == ([True] * 3 + [False] * 3) * 2
    wanted = cdist(x.astype(float), x.astype(float), "cosine")
    for row, line in zip(found.pairs.itertuples(), lines, strict=True):
        first, i, *second, j = line.split("\t")
        places = [items.index((a, view(a, int(k)))) for a, k in ((first, i), (second[0] if second else first, j))]
        assert row.activations == pytest.approx(wanted[tuple(places)], abs=1e-6)
    (tmp_path / "dev.txt").write_text("6\n" + "\n".join(lines[:3] + lines[6:9] + lines[3:6] + lines[9:]))
    dev = verify_faces(x, None, str(tmp_path / "dev.txt"), items=items)
    assert dev.table.loc[0, "area"] == pytest.approx(found.table.loc[0, "area"])
    assert sorted(dev.pairs["fold"].unique()) == list(range(6))  # drawn: there are 6 pairs of a kind


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\t1\nf1\t1\t2\n", r"has 1 pairs, and its first line '1\\t1' says 1 × 2 × 1"),
        pytest.param(f"{'9' * 5000}\nf1\t1\t2\n", "has 1 pairs, and its first line '9+… .5,000", id="many digits"),
        pytest.param(f"1\nf1\t1\t2\nf1\t1\tf2\t{'9' * 5000}\n", "line 3 is no pair", id="a view of many"),
        ("1\nf1\t1\t2\nf1\t1\tx\n", r"line 3 is no pair: 'f1\\t1\\tx'"),
        ("1\nf1\t1\t2\nf1\t1\tf2\t2\tf3\n", "line 3 is no pair"),
        ("1\nf1\t1\t2\nf1\t1\tf99\t2\n", r"1 items that `pairs` name are not among the 48 items: f99\|f99_0002"),
        ("face_1,view_1,face_2\n", "has no column view_2; it has face_1, view_1, face_2"),
        ("", "pairs.txt cannot be read as a CSV"),
        ("face_1,view_1,face_2,view_2\nf1,1,,2\n", "line 2 has no face_2"),
        ("face_1,view_1,face_2,view_2\nf1,1,f2\n", "line 2 has 3 fields, the header 4"),
        ("face_1,view_1,face_2,view_2,same\nf1,1,f2,2,maybe\n", "has 'maybe' in the column same. Give 1 or 0"),
        ("face_1,view_1,face_2,view_2,fold\nf1,1,f2,2,a\n", "are in one fold"),
        ("face_1,view_1,face_2,view_2\nf1,1,f1,1\n", r"1 of 1 `pairs` are an item and itself: f1\|1"),
        ("face_1,view_1,face_2,view_2\nf1,1,f1,9\n", r"f1\|9\. Face 'f1' has the views 0, 1, 2, 3\."),
        ("face_1,view_1,face_2,view_2\nf1,1,f111,9\n", r"There is no face 'f111'\. Did you mean f11, f1"),
        ("face_1,view_1,face_2,view_2\nf1,1,f1,2\nf1,1,f1,3\n", "2 pairs of the same face and 0 of different faces"),
        (
            "face_1,view_1,face_2,view_2\nf1,1,f1,2\nf1,1,f1,3\nf1,1,f2,2\nf1,1,f2,3\n",
            "the pairs are of 2 faces, and verification needs at least 3",
        ),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(FeatureStoreError, match=message):
        verify_faces(activations(), None, tmp_path / "pairs.txt", items=ITEMS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "cosin"}, r"no `metric` 'cosin'\. Did you mean cosine"),
        ({"n_pairs": 1}, "`n_pairs` 1 is too few"),
        ({"pairs": "nowhere.csv"}, r"no file nowhere\.csv\. Check the path given with `pairs`"),
        ({"pairs": pd.DataFrame({"face_1": ["f1"]})}, "`pairs` has no column view_1, face_2, view_2"),
        ({"where": "view == '1'"}, "0 pairs of the same face and 66 of different faces"),
        ({"where": "face_id == 'f1'"}, "6 pairs of the same face and 0 of different"),
        ({"where": "face_id in ['f1', 'f2']"}, "the pairs are of 2 faces"),
        ({"where": "face_id == 'f1' and view == '1'"}, "1 items are left, and verification needs at least 3"),
        ({"memory": "1MiB"}, "`memory` 1.0 MiB is too little"),
    ],
)
def test_what_can_be_wrong(options: dict, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        verify_faces(activations(), items=ITEMS, **options)


def test_tables_that_name_no_item() -> None:
    table = given()
    for wrong, message in [
        (table.astype({"view_1": float}), r"numbers with a point in view_1, such as \d\.0"),
        (table.assign(face_2=[None, *table["face_2"][1:]]), "row 0 has no face_2"),
    ]:
        with pytest.raises(FeatureStoreError, match=message):
            verify_faces(activations(), None, wrong, items=ITEMS)
    with pytest.raises(FeatureStoreError, match=r"`items` holds \('f0', '0'\) twice"):
        verify_faces(activations(), None, table, items=[ITEMS[0], *ITEMS[:-1]])


def test_nan_is_refused_by_name() -> None:
    x = activations()
    x[3, 2] = math.nan
    with pytest.raises(FeatureStoreError, match=r"'activations' holds NaN or infinite numbers for .* f0\|3"):
        verify_faces(x, items=ITEMS)


def test_a_photograph_and_its_mirror_image_are_no_pair() -> None:
    views = ["1", "1|flipped", "2"]
    table = pd.DataFrame({"face_id": np.repeat(["a", "b", "c"], 3), "view": views * 3})
    table["image_sha256"] = [f"{i:064x}" for i in (1, 1, 2, 3, 3, 4, 5, 5, 6)]
    chosen = module.select(np.ones((9, 2), np.float32), items=table)
    same = drawn_pairs(chosen, 50, np.random.default_rng(0)).query("same")
    assert len(same) == 6
    assert set(same["view_1"] + same["view_2"]) == {"12", "1|flipped2"}
