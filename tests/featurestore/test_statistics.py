"""Statistics of layers, means, and units that go with a trait: against whole arrays in float64, and against SciPy."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import zarr
from dask import array as da
from scipy import stats

from featurestore import FeatureStore
from featurestore.errors import FeatureStoreError
from featurestore.queries import layer_statistics, moments, units
from featurestore.queries.layer_statistics import mean, statistics
from featurestore.queries.selection import ArrayReader, select
from featurestore.queries.units import one_layer, unit_dimensions, unit_name, unit_statistics, units_with_trait
from featurestore.store.zarr_format import Layer
from tests.conftest import LAYERS

pytestmark = pytest.mark.filterwarnings("error")
SHAPE = (3, 2, 4)
UNEVEN = [1, 5, 2, 7, 3, 1]  # items of each face
DEAD = [0, 7, 23]
ROOMY = "8GiB"  # the tests' own process has run a network, and holds what it needed


@pytest.fixture(params=["whole", "blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything in one block, or 4 rows (and 4 units) to a block, so that a face of 5 is split."""
    if request.param == "blocks":
        for module in (layer_statistics, moments, units):
            monkeypatch.setattr(module, "block_rows", lambda *arguments, **options: 4)
        for module in (layer_statistics, moments):
            monkeypatch.setattr(module, "MOST_TASKS", 3)
        monkeypatch.setattr(units, "_RANKED_AT_ONCE", 3)
        monkeypatch.setattr(units, "_READ_AT_ONCE", 12 * 24 * 5)
    return request.param


def made(dtype: str = "float32", seed: int = 0) -> tuple[np.ndarray, pd.DataFrame]:
    """19 rows of rectified numbers far from zero mean, three units dead, in no order of faces; and their items."""
    rng = np.random.default_rng(seed)
    values = np.maximum(rng.normal(1, 2, (sum(UNEVEN), 24)), 0) + rng.normal(0, 3, (sum(UNEVEN), 1)) ** 2
    values[:, 0], values[:, 7], values[:, 23] = 0, 0.1, 1000
    values[:, 5] = np.where(np.arange(len(values)) % 3 == 0, values[:, 5], 0)
    faces = np.repeat([f"f{i}" for i in range(len(UNEVEN))], UNEVEN)
    views = np.concatenate([np.arange(n) for n in UNEVEN]).astype(str)
    table = pd.DataFrame({"face_id": faces, "view": views, "age": np.arange(len(faces)) % 4 * 1.5, "sex": ""})
    table["sex"] = np.where(table["face_id"] < "f3", "female", "male")
    order = rng.permutation(len(table))
    return values.reshape(-1, *SHAPE).astype(dtype)[order], table.iloc[order].reset_index(drop=True)


def by_hand(rows: np.ndarray) -> dict[str, float]:
    """From the whole array (n, features) float64, with the covariance's own eigenvalues."""
    n = len(rows)
    eigenvalues = np.linalg.eigvalsh(np.cov(rows.T, bias=True))
    active = rows[:, rows.any(axis=0)]
    sparseness = [(1 - unit.mean() ** 2 / (unit**2).mean()) / (1 - 1 / n) for unit in active.T]
    return {
        "items": n,
        "units": rows.shape[1],
        "mean": rows.mean(),
        "spread": rows.std(),
        "spread_over_items": np.sqrt(rows.var(axis=0).mean()),
        "sparsity": (rows == 0).mean(),
        "lifetime_sparseness": np.mean(sparseness),
        "dead": sum(len(set(unit)) == 1 for unit in rows.T),
        "effective_dimension": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
    }


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_layer_and_its_groups_are_described(blocks: str, dtype: str) -> None:
    values, items = made(dtype)
    rows = values.reshape(len(values), -1).astype(float)
    (row,) = statistics(values, "relu", items=items).to_dict("records")
    assert row.pop("layer") == "relu"
    assert row == pytest.approx(by_hand(rows), rel=1e-5)
    assert row["dead"] == 3
    table = statistics(values, items=items, by="sex")
    assert table["group"].tolist() == ["female", "male"]
    for name, part in table.drop(columns="layer").set_index("group").iterrows():
        assert part.to_dict() == pytest.approx(by_hand(rows[items["sex"] == name]), rel=1e-5)
    assert statistics(values, items=items, by="face")["items"].tolist() == UNEVEN
    assert len(statistics(values, items=items, by="view", where="sex == 'male'")) == 7


def test_more_items_than_units(blocks: str) -> None:
    rng = np.random.default_rng(1)
    values = (rng.normal(100, 1, (60, 3)) * [1, 2, 5]).astype(np.float32)
    (row,) = statistics(values, items=[("f", str(i)) for i in range(60)]).itertuples()
    expected = by_hand(values.astype(float))
    assert row.effective_dimension == pytest.approx(expected["effective_dimension"], rel=1e-4)
    assert row.spread_over_items == pytest.approx(expected["spread_over_items"], rel=1e-6)


def test_what_needs_two_items_is_missing_with_one(blocks: str) -> None:
    values, items = made()
    alone = statistics(values, items=items, by="face").set_index("group").loc["f0"]
    assert alone[["spread_over_items", "lifetime_sparseness", "dead", "effective_dimension"]].isna().all()
    rows = values.reshape(len(values), -1)[items["face_id"] == "f0"]
    assert alone["mean"] == pytest.approx(rows.mean(), rel=1e-6)
    assert alone["spread"] == pytest.approx(rows.std(), rel=1e-6)


def test_dead_layers_and_negative_numbers(blocks: str) -> None:
    items = [("f", str(i)) for i in range(9)]
    zero, constant = (statistics(np.full((9, 5), value, np.float32), items=items).loc[0] for value in (0, 0.1))
    assert (zero["dead"], zero["sparsity"], constant["dead"], constant["sparsity"]) == (5, 1, 5, 0)
    assert constant["spread"] == 0
    assert constant["lifetime_sparseness"] == 0
    assert np.isnan([zero["effective_dimension"], constant["effective_dimension"], zero["lifetime_sparseness"]]).all()
    signed = statistics(np.random.default_rng(0).normal(size=(9, 5)), items=items).loc[0]
    assert np.isnan(signed["lifetime_sparseness"])
    assert signed["effective_dimension"] > 1


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_variance_is_split_between_and_within_faces(blocks: str, dtype: str) -> None:
    values, items = made(dtype)
    found = unit_statistics(values, items=items)
    assert found["mean"].dims == ("channel", "y", "x")
    assert found["mean"].shape == SHAPE
    rows = pd.DataFrame(values.reshape(len(values), -1).astype(float))
    means = rows.groupby(items["face_id"]).transform("mean")
    between, within = means.var(ddof=0).to_numpy(), ((rows - means) ** 2).mean().to_numpy()
    expected = {
        "mean": rows.mean(),
        "spread": rows.std(ddof=0),
        "between_faces": between,
        "within_faces": within,
    }
    for name, numbers in expected.items():
        np.testing.assert_allclose(found[name].values.ravel(), np.asarray(numbers), rtol=1e-5, atol=1e-12)
    np.testing.assert_allclose(found["between_faces"] + found["within_faces"], found["spread"] ** 2, rtol=1e-12)
    assert found["dead"].dtype == bool
    assert np.flatnonzero(found["dead"]).tolist() == DEAD
    share = found["share_between"].values.ravel()
    assert np.flatnonzero(np.isnan(share)).tolist() == DEAD
    alive = ~found["dead"].values.ravel()
    np.testing.assert_allclose(share[alive], between[alive] / (between + within)[alive], rtol=1e-5)
    assert (found["spread"].values.ravel()[DEAD] == 0).all()
    assert (found.attrs["items"], found.attrs["faces"]) == (19, 6)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(("by", "column"), [("face", "face_id"), ("view", "view"), ("sex", "sex"), ("age", "age")])
def test_means_of_groups(blocks: str, by: str, column: str, dtype: str) -> None:
    values, items = made(dtype)
    found = mean(values, items=items, by=by)
    expected = pd.DataFrame(values.reshape(len(values), -1).astype(float)).groupby(items[column]).mean()
    assert found["group"].values.tolist() == [str(name) for name in expected.index]
    assert found["items"].values.tolist() == items[column].value_counts().sort_index().tolist()
    assert found.dims == ("group", "channel", "y", "x")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.values.reshape(len(expected), -1), expected, rtol=2e-7)


def test_the_mean_of_all_reads_each_row_once(blocks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values, items = made()
    read: list[int] = []
    gather = ArrayReader.read
    monkeypatch.setattr(ArrayReader, "read", lambda self, rows: (read.extend(rows.tolist()), gather(self, rows))[1])
    found = mean(values, items=items)
    assert found.dims == ("channel", "y", "x")
    np.testing.assert_allclose(found, values.astype(float).mean(axis=0), rtol=2e-7)
    assert sorted(read) == list(range(19))
    read.clear()
    mean(values, items=items, by="view")
    unit_statistics(values, items=items)
    assert sorted(read) == sorted([*range(19), *range(19)])


def test_sums_of_many_groups_make_fewer_spans() -> None:
    values, items = made()
    chosen, rows = one_layer(select(values, items=items), "a mean")
    codes = np.arange(len(chosen)) % 3
    spans, held = layer_statistics._group_spans(rows, codes, 3, "1GiB")
    assert (len(spans), held) == (19, 8 * 24 * (3 + 19))
    spans, held = layer_statistics._group_spans(rows, codes, 3, 4 * 8 * 24 * (3 + 3 * 4))
    assert (len(spans), held) == (4, 8 * 24 * (3 + 3 * 4))
    assert [start for start, _ in spans[1:]] == [stop for _, stop in spans[:-1]]
    assert layer_statistics._group_spans(rows, codes, 3, 1)[0] == [(0, 19)]
    with pytest.raises(FeatureStoreError, match=r"`memory` 1.0 KiB is too little.*Give at least"):
        mean(values, items=items, by="view", memory=1024)


SCIPY = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}


def check_correlations(found: pd.DataFrame, rows: np.ndarray, trait: np.ndarray, method: str) -> None:
    """Unit by unit by SciPy; those that are dead are not in the table."""
    alive = [unit for unit in range(rows.shape[1]) if len(set(rows[:, unit])) > 1]
    assert sorted(found["unit"]) == alive
    assert found.attrs["dead"] == rows.shape[1] - len(alive)
    results = {unit: SCIPY[method](rows[:, unit], trait) for unit in alive}
    for row in found.itertuples():
        assert row.r == pytest.approx(results[row.unit].statistic, abs=1e-6)
        assert row.p == pytest.approx(results[row.unit].pvalue, rel=1e-4, abs=1e-12)
    assert found["p"].is_monotonic_increasing
    np.testing.assert_allclose(found["q"], stats.false_discovery_control(found["p"]))
    np.testing.assert_array_equal(
        np.ravel_multi_index([found[name] for name in ("channel", "y", "x")], SHAPE), found["unit"]
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_units_that_go_with_a_trait_of_items(blocks: str, method: str, dtype: str) -> None:
    values, items = made(dtype)
    rows = values.reshape(len(values), -1).astype(float)
    found = units_with_trait(values, "relu", "age", items=items, method=method)
    check_correlations(found, rows, items["age"].to_numpy(), method)
    assert list(found) == ["unit", "channel", "y", "x", "r", "p", "q"]
    assert (found.attrs["over"], found.attrs["n"], found.attrs["without_trait"]) == ("items", 19, 0)
    known = items["age"] > 1
    trait = items[known].set_index(["face_id", "view"])["age"].iloc[::-1]
    again = units_with_trait(values, None, trait, items=items, method=method)
    check_correlations(again, rows[known], items["age"][known].to_numpy(), method)
    assert (again.attrs["n"], again.attrs["without_trait"]) == (known.sum(), (~known).sum())
    assert again.attrs["trait"] == "age"


@pytest.mark.parametrize("method", ["pearson", "spearman"])
def test_units_that_go_with_a_trait_of_faces(blocks: str, method: str) -> None:
    values, items = made()
    rated = pd.Series({"f4": 3.5, "f0": 1.0, "f1": np.nan, "f2": 2.0, "f3": 2.0, "f5": 8.0, "other": 9.0})
    faces = ["f0", "f2", "f3", "f4", "f5"]
    rows = pd.DataFrame(values.reshape(len(values), -1).astype(float)).groupby(items["face_id"]).mean().loc[faces]
    found = units_with_trait(values, None, rated, items=items, method=method)
    check_correlations(found, rows.to_numpy().astype(np.float32).astype(float), rated[faces].to_numpy(), method)
    assert (found.attrs["over"], found.attrs["n"], found.attrs["without_trait"]) == ("faces", 5, 1)
    items["rating"] = items["face_id"].map(rated)
    pd.testing.assert_frame_equal(found, units_with_trait(values, None, "rating", items=items, method=method))
    items["known"] = pd.array(items["rating"] > 2, "boolean")  # bool as 0 and 1
    assert units_with_trait(values, None, "known", items=items, method=method).attrs["over"] == "faces"


def test_a_perfect_correlation_and_a_dead_layer(blocks: str) -> None:
    items = [(f"f{i}", "1") for i in range(8)]
    trait = pd.Series(np.arange(8), [face for face, _ in items])
    values = np.stack([np.arange(8), -np.arange(8), np.ones(8)], 1).astype(np.float32)
    for method in ("pearson", "spearman"):
        found = units_with_trait(values, None, trait, items=items, method=method)
        np.testing.assert_allclose(found.set_index("unit")["r"].sort_index(), [1, -1], rtol=1e-7)
        np.testing.assert_allclose(found["p"], 0, atol=1e-20)
        nothing = units_with_trait(np.ones((8, 3), np.float32), None, trait, items=items, method=method)
        assert (len(nothing), nothing.attrs["dead"]) == (0, 3)
        assert list(nothing) == ["unit", "feature", "r", "p", "q"]


def test_a_store_and_its_forms(small_store: Path) -> None:
    store = FeatureStore.open(small_store)
    stored = {name: np.asarray(zarr.open_array(small_store / store.source().name / name)[:]) for name in LAYERS}
    table = statistics(store, memory=ROOMY).set_index("layer")
    assert table.index.tolist() == LAYERS
    for name, rows in stored.items():
        flat = rows.reshape(len(rows), -1).astype(float)
        assert table.loc[name, "sparsity"] == (flat == 0).mean()
        assert table.loc[name, "dead"] == (flat == flat[0]).all(axis=0).sum()
        values = np.linalg.svd(flat - flat.mean(axis=0), compute_uv=False) ** 2
        assert table.loc[name, "effective_dimension"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)
    rows = stored["maxp_2_2"]
    views = store.source().items.index.get_level_values("view")
    found = mean(store, "maxp_2_2", by="view", memory=ROOMY)
    np.testing.assert_allclose(found.sel(group="2"), rows[views == "2"].mean(axis=0), rtol=1e-5, atol=1e-6)
    xr.testing.assert_allclose(found, mean(xr.open_zarr(store.source().folder), "maxp_2_2", by="view", memory=ROOMY))
    lazy = da.from_array(rows, chunks=(3, -1, -1, -1))
    keys = list(store.source().items.index)
    xr.testing.assert_allclose(
        unit_statistics(store, "maxp_2_2", memory=ROOMY),
        unit_statistics(lazy, "maxp_2_2", items=keys, memory=ROOMY),
    )
    for query in (mean, unit_statistics):
        with pytest.raises(FeatureStoreError, match=r"this would be maxp_1_2, maxp_2_2. Name one `layer`"):
            query(store)


@pytest.mark.parametrize("shape", [(5,), (4, 3), (3, 2, 4)])
def test_dimensions_are_those_of_a_store(shape: tuple[int, ...]) -> None:
    stored = Layer("a", shape, np.dtype("float32"), "none", 1, 1, Path("a")).metadata()["dimension_names"]
    named = [f"{name}_{size}" for name, size in zip(unit_dimensions(shape), shape, strict=True)]
    assert ["item", *named] == stored


def test_units_have_names() -> None:
    assert unit_name(23, SHAPE) == "channel 2, y 1, x 3"
    assert unit_name((2, 1, 3), SHAPE) == "channel 2, y 1, x 3"
    assert unit_name(np.int64(17), (30,)) == "feature 17"
    assert unit_name(4, (2, 3)) == "token 1, feature 1"
    assert unit_name(3, (1, 2, 2, 1)) == "axis_0 0, axis_1 1, axis_2 1, axis_3 0"
    for wrong in (24, -1, (2, 1), (3, 0, 0)):
        with pytest.raises(FeatureStoreError, match=r"shape \(3, 2, 4\) has no `unit` .*: give a number from 0 to 23"):
            unit_name(wrong, SHAPE)


@pytest.mark.parametrize(
    ("trait", "options", "message"),
    [
        ("agee", {}, r"no column 'agee' for `trait`. Did you mean age\?"),
        ("sex", {}, r"`trait` 'sex' is not numeric: it holds '(fe)?male', '(fe)?male'"),
        (3, {}, r"a Series indexed by face_id or by \(face_id, view\), not int"),
        ("age", {"method": "spearmann"}, r"no `method` 'spearmann'. Did you mean spearman, pearson\?"),
        ("age", {"where": "age == 3"}, r"`trait` 'age' is 3 for all \d faces, so nothing goes with it"),
        ("age", {"where": "face_id == 'f2'"}, r"known of 2 items, and a correlation needs at least 3"),
        (pd.Series({"f0": 1.0, "f1": np.inf, "f2": 1, "f3": 3}), {}, "'trait' is infinite for 1 faces"),
        (
            pd.Series([1.0, 2.0], ["g1", "g2"]),
            {},
            r"is of none of the items: it is indexed by g1, g2, and the items are of f\d",
        ),
        (pd.Series([1.0, 2.0], ["f1", "f1"]), {}, r"has two numbers for 'f1'"),
        (pd.Series(["a", "b"], ["f1", "f2"]), {}, r"is not numeric: it holds 'a', 'b'"),
        (pd.Series([1.0], pd.MultiIndex.from_tuples([("a", "b", "c")])), {}, "indexed by 3 levels; it needs face_id"),
    ],
)
def test_what_can_be_wrong_with_a_trait(trait: object, options: dict[str, str], message: str) -> None:
    values, items = made()
    with pytest.raises(FeatureStoreError, match=message):
        units_with_trait(values, None, trait, items=items, **options)  # type: ignore[arg-type]


def test_what_else_can_be_wrong() -> None:
    values, items = made()
    for query in (statistics, mean):
        with pytest.raises(FeatureStoreError, match=r"no column 'vieww' to be grouped by. Did you mean view"):
            query(values, items=items, by="vieww")
    with pytest.raises(FeatureStoreError, match=r"1 items are left, and a variance needs at least 2"):
        unit_statistics(values, items=items, where="face_id == 'f0'")
    with pytest.raises(FeatureStoreError, match=r"`memory` 1.0 KiB is too little"):
        statistics(values, items=items, memory=1024)
    values[3, 0, 0, 0] = np.nan
    for query in (statistics, unit_statistics, mean):
        with pytest.raises(FeatureStoreError, match=r"holds NaN or infinite numbers for 1 items"):
            query(values, items=items)
    plain = items[["face_id", "view", "sex"]]
    with pytest.raises(FeatureStoreError, match=r"They have no numeric column: give a Series of numbers"):
        units_with_trait(values, None, "age", items=plain)


@pytest.mark.parametrize("scale", [1e-30, 1e25])
@pytest.mark.parametrize("rows", [7, 100])
def test_the_effective_dimension_of_tiny_and_of_huge_numbers(
    scale: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)
    monkeypatch.setattr("featurestore.queries.layer_statistics.moment_rows", lambda *args, **options: rows)
    found = statistics(data * np.float32(scale), items=[("f", str(i)) for i in range(40)])
    values = np.linalg.eigvalsh(np.cov(data.T))
    assert found["effective_dimension"][0] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-4)
