"""Which items and layers a query is about, blocks under a cap; RDMs, neighbours, RSA and the comparison of layers."""

import json
import subprocess
import sys
from pathlib import Path

import dask.array as da
import dask.config
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats
from scipy.spatial.distance import pdist, squareform

from featurestore import FeatureStore, FeatureStoreError
from featurestore.cluster import local_cluster
from featurestore.queries.blocks import block_rows, scheduler
from featurestore.queries.dissimilarity import rdm, summary
from featurestore.queries.layer_comparison import compare_layers
from featurestore.queries.layer_statistics import mean
from featurestore.queries.nearest import neighbours
from featurestore.queries.output import write_result
from featurestore.queries.selection import select
from featurestore.queries.similarity_analysis import rsa, tau_a
from tests.conftest import LAYERS, SHARED, run_pass, write_photographs

METRICS = ("cosine", "correlation", "euclidean", "cityblock")
ITEMS = [(f"f{i // 3}", str(i % 3)) for i in range(300)]


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    """300 × 700, as a layer after its ReLU: half of it zero."""
    return np.maximum(np.random.default_rng(0).standard_normal((300, 700)), 0).astype(np.float32)


@pytest.fixture(scope="module")
def dataset(values: np.ndarray) -> xr.Dataset:
    rng = np.random.default_rng(1)
    layers = {
        "early": (("item", "feature_700"), da.from_array(values, chunks=(100, -1))),
        "late": (("item", "feature_40"), values @ rng.standard_normal((700, 40)).astype(np.float32)),
        "other": (("item", "channel_5", "y_2", "x_2"), rng.standard_normal((300, 5, 2, 2)).astype(np.float32)),
    }
    faces, views = zip(*ITEMS, strict=True)
    return xr.Dataset(
        layers, {"face_id": ("item", list(faces)), "view": ("item", list(views)), "age": ("item", np.arange(300.0))}
    )


def test_a_store_and_its_arrays_give_the_same_rows(small_store: Path, small_rows: dict[str, np.ndarray]) -> None:
    store = FeatureStore.open(small_store)
    for data, options in (
        (store, {}),
        (store.source(), {}),
        (store.xarray(), {}),
        (store.xarray()[LAYERS[1]], {}),
        (store.dask(LAYERS[1]), {"items": store.items}),
        (np.asarray(store.rows(LAYERS[1])), {"items": store.items.index}),
    ):
        chosen = select(data, LAYERS[1], where="view == '2'", **options)
        (layer,) = chosen.layers
        wanted = small_rows[LAYERS[1]][1::2].reshape(5, -1)
        assert [tuple(key) for key in chosen.labels.index] == [(f"f{i}", "2") for i in range(1, 6)]
        assert layer.shape == small_rows[LAYERS[1]].shape[1:]
        blocks = layer.blocks(2)
        assert [len(block) for block in blocks] == [2, 2, 1]
        np.testing.assert_allclose(np.concatenate([block.load() for block in blocks]), wanted, rtol=1e-3, atol=1e-2)
        assert list(blocks[1].names) == ["f3|2", "f4|2"]


def test_groups_are_means_in_natural_order(values: np.ndarray) -> None:
    for by, group, rows in (("face", "f10", slice(30, 33)), ("view", "1", slice(1, 300, 3))):
        chosen = select(values, items=ITEMS, by=by)
        place = list(chosen.labels.index).index(group)
        assert place == (10 if by == "face" else 1)
        wanted = values[rows].mean(axis=0, dtype=np.float64)
        np.testing.assert_allclose(chosen.layers[0].block(slice(place, place + 1)).load()[0], wanted, rtol=1e-6)


def test_sources_are_aligned_by_key_and_photograph(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 4, 2)
    run_pass(images, tmp_path / "s.zarr", LAYERS[:1])
    (images / "f1" / "1.png").unlink()
    (images / "f2" / "1.png").write_bytes(
        (images / "f3" / "1.png").read_bytes()
    )  # another photograph under a known key
    run_pass(images, tmp_path / "s.zarr", LAYERS, weights="random:1")
    store = FeatureStore.open(tmp_path / "s.zarr")
    chosen = select(store)
    assert len(chosen.layers) == 3
    assert [layer.name.rpartition(" ")[2] for layer in chosen.layers] == [LAYERS[0], *LAYERS]
    assert chosen.layers[0].name != chosen.layers[1].name
    assert list(chosen.names) == ["f1|2", "f2|2", "f3|1", "f3|2", "f4|1", "f4|2"]
    assert sum("not all sources share" in note for note in chosen.notes) == 2
    one, two = (layer.block(slice(0, 6)).load() for layer in chosen.layers[1:])
    second = chosen.layers[1].reader.layer.folder.parent.name  # type: ignore[attr-defined]
    rows = store.rows(LAYERS[0], second)
    assert np.array_equal(
        one,
        np.stack(
            [rows["f1", "2"], rows["f2", "2"], rows["f3", "1"], rows["f3", "2"], rows["f4", "1"], rows["f4", "2"]]
        ).reshape(6, -1),
    )
    assert one.shape != two.shape


def test_items_without_a_row_are_left_out_and_counted(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 3, 2)
    run_pass(images, tmp_path / "s.zarr", LAYERS, items_per_shard=2)
    layer = FeatureStore.open(tmp_path / "s.zarr").layers[LAYERS[1]]
    layer.shard_path(1).unlink()
    chosen = select(FeatureStore.open(tmp_path / "s.zarr"))
    assert list(chosen.names) == ["f1|1", "f1|2", "f3|1", "f3|2"]
    assert chosen.notes == ("2 items of which a layer has no row yet",)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda d: select(d, "erly"), r"no layer erly\. Did you mean early\?"),
        (lambda d: select(d, where="aeg > 3"), r"'aeg' is not defined.*Did you mean age"),
        (lambda d: select(d, where="age > 999"), r"none of the 300 items meet `where` age > 999"),
        (lambda d: select(d, by="vew"), r"no column 'vew'.*Did you mean view"),
        (lambda d: rdm(d, "early", metric="cosin"), r"no `metric` 'cosin'\. Did you mean cosine"),
        (lambda d: rdm(d, "early", where="face_id == 'f1' and view != '0'"), r"2 items are left, and an RDM needs at least 3"),
        (lambda d: rdm(d, "early", pca=1.5), r"`pca` 1.5 is no share"),
        (lambda d: rdm(d, "early", memory="some"), r"`memory` 'some' is no number of bytes"),
        (lambda d: rdm(d, "early", memory="10MB"), r"`memory` 9.5 MiB is too little: a block of one row .* Give at least"),
        (lambda d: neighbours(d, "early", ["f7", ("f8", "9")]), r"`of` \('f8', '9'\) is not among .* It is one of: 0, 1, 2"),
        (lambda d: neighbours(d, "early", "f77x"), r"`of` 'f77x' .* Did you mean f77"),
        (lambda d: neighbours(d), r"neighbours are those in one layer; this would be early, late, other"),
        (lambda d: compare_layers(d, measure="ckaa"), r"no `measure` 'ckaa'\. Did you mean cka"),
        (lambda d: compare_layers(d, where="age < 3"), r"3 items are left, and comparing layers needs at least 4"),
        (lambda d: select(d["early"].values), r"an array with its `items` \(face, view\); got ndarray"),
        (lambda d: select(d["early"].values, items=ITEMS[1:]), r"`items` has 299 rows, and the array 300"),
        (lambda d: select(d, []), r"`layers` is empty"),
        (lambda d: select(d["late"].T), r"has the dimensions feature_40, item; the first has to be item"),
        (lambda d: select(pd.DataFrame(d["late"].values), items=ITEMS), r"got DataFrame with items"),
        (lambda d: select(d["late"].values, items=["f1|1"] * 300), r"`items` are \(face, view\) pairs or a table; got 'f1\|1'"),
        (lambda d: neighbours(d, "late", k=0), r"`k` 0 is no number of neighbours"),
        (lambda d: scheduler("thread").__enter__(), r"`scheduler` 'thread' is neither an address"),
    ],
)  # fmt: skip
def test_bad_input(dataset: xr.Dataset, ask, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        ask(dataset)


@pytest.mark.parametrize("metric", METRICS)
def test_an_rdm_is_scipys(dataset: xr.Dataset, values: np.ndarray, metric: str) -> None:
    lazy = rdm(dataset, "early", metric=metric)
    assert isinstance(lazy.data, da.Array)
    assert len(lazy.chunks[0]) > 1  # blocks of both halves
    found, wanted = lazy.values, squareform(pdist(values.astype(np.float64), metric))
    unit = 1.0 if metric in METRICS[:2] else wanted.max()
    assert np.abs(found - wanted).max() / unit < 1e-6
    assert np.array_equal(found, found.T)
    assert not found.diagonal().any()
    assert float(lazy.sel(item="f3|1", other="f20|2")) == found[10, 62]


def test_processes_give_the_same(small_store: Path) -> None:
    store = FeatureStore.open(small_store)
    here = rdm(store, LAYERS[1], metric="correlation").values
    with scheduler("processes"), dask.config.set(num_workers=2):
        assert np.array_equal(rdm(store, LAYERS[1], metric="correlation").values, here)


def test_an_rdm_of_half_precision_rows(tmp_path: Path) -> None:
    run_pass(write_photographs(tmp_path / "p", 5, 2), tmp_path / "s.zarr", LAYERS[1:], dtype="float16", compress="zstd")
    store = FeatureStore.open(tmp_path / "s.zarr")
    rows = store.rows(LAYERS[1]).gather(range(10)).flatten(1).double().numpy()
    assert np.abs(rdm(store, LAYERS[1]).values - squareform(pdist(rows, "cosine"))).max() < 1e-6


def test_an_rdm_of_principal_components(values: np.ndarray) -> None:
    """Fewer items than features, and more."""
    for data, items in ((values, ITEMS), (values[:, :60], ITEMS)):
        centred = data.astype(np.float64) - data.mean(axis=0, dtype=np.float64)
        left, singular, _ = np.linalg.svd(centred, full_matrices=False)
        explained = np.cumsum(singular**2) / (singular**2).sum()
        k = int(np.searchsorted(explained, 0.8)) + 1
        wanted = squareform(pdist(left[:, :k] * singular[:k]))
        found = rdm(data, "x", items=items, metric="euclidean", pca=0.8).values
        assert np.abs(found - wanted).max() / wanted.max() < 1e-5


@pytest.mark.parametrize("metric", METRICS[:2])
def test_rows_without_a_direction_are_named(values: np.ndarray, metric: str) -> None:
    changed = values.copy()
    changed[7] = 0 if metric == "cosine" else 0.1
    with pytest.raises(
        FeatureStoreError, match=r"layer 'x': the rows of 1 items .*: f2\|1\. Choose `metric` euclidean"
    ):
        rdm(changed, "x", items=ITEMS, metric=metric).compute()
    changed[7, 3] = np.nan
    with pytest.raises(FeatureStoreError, match=r"layer 'x' holds NaN or infinite numbers for 1 items: f2\|1"):
        rdm(changed, "x", items=ITEMS, metric=metric).compute()


def test_the_summary_of_an_rdm(dataset: xr.Dataset) -> None:
    matrix = rdm(dataset, ["early", "late"])
    assert matrix.dims == ("layer", "item", "other")
    table = summary(matrix.compute())
    first = matrix[0].values
    same = np.equal.outer(*[np.arange(300) // 3] * 2)
    assert table["within faces"][0] == pytest.approx(first[same & ~np.eye(300, dtype=bool)].mean(), rel=1e-5)
    assert table["between faces"][0] == pytest.approx(first[~same].mean(), rel=1e-5)
    assert table["largest"][1] == matrix[1].values.max()


@pytest.mark.parametrize("other_faces", [False, True])
def test_neighbours_are_those_of_the_whole_matrix(values: np.ndarray, other_faces: bool) -> None:
    data = np.concatenate([values[:150], values[:150]])  # every item twice: ties, of which the earlier comes first
    table = neighbours(data, "x", items=ITEMS, k=4, other_faces=other_faces)
    wanted = squareform(pdist(data.astype(np.float64), "cosine")).round(5)
    faces = np.arange(300) // 3
    wanted[np.equal.outer(faces, faces) if other_faces else np.eye(300, dtype=bool)] = np.inf
    order = np.argsort(wanted, axis=1, kind="stable")[:, :4]
    found = np.array(
        [ITEMS.index(key) for key in zip(table["neighbour_face_id"], table["neighbour_view"], strict=True)]
    )
    near = np.take_along_axis(wanted, found.reshape(300, 4), 1)
    assert np.array_equal(near, np.take_along_axis(wanted, order, 1))
    assert np.array_equal(found.reshape(300, 4)[:150, 0], np.arange(150, 300))  # the copy, at zero
    assert table["rank"].tolist() == [1, 2, 3, 4] * 300
    some = neighbours(data, "x", ["f7", ("f8", "1"), "f9|2"], items=ITEMS, k=4, other_faces=other_faces)
    assert some[["face_id", "view"]].drop_duplicates().to_numpy().tolist() == [
        ["f7", "0"], ["f7", "1"], ["f7", "2"], ["f8", "1"], ["f9", "2"],
    ]  # fmt: skip
    assert some["neighbour_face_id"].tolist()[:4] == table["neighbour_face_id"].tolist()[84:88]


def test_of_one_face_in_a_tuple_and_of_a_mirrored_view(values: np.ndarray) -> None:
    items = [(face, view) for face in ("a", "b|c") for view in ("frontal", "frontal|flipped")]
    for of, asked in (
        (("a",), items[:2]),
        (("a", "b|c"), items),
        (("a", "frontal"), items[:1]),
        (["a|frontal|flipped"], items[1:2]),
        (["b|c|frontal|flipped", "b|c|frontal"], items[:1:-1]),
    ):
        table = neighbours(values[:4], "x", of, items=items, k=1)
        assert list(zip(table["face_id"], table["view"], strict=True)) == asked


def test_a_column_of_differences_is_missing(values: np.ndarray) -> None:
    with pytest.raises(FeatureStoreError, match=r"`pairs` 'age' is neither .* no such column: give a CSV of pairs\.$"):
        rsa(values[:9], "age", items=ITEMS[:9])


def test_an_array_without_names_is_written_alone(tmp_path: Path) -> None:
    assert write_result(xr.DataArray(np.eye(3)[0], dims="feature"), tmp_path / "a.npy") == [tmp_path / "a.npy"]
    assert np.load(tmp_path / "a.npy").tolist() == [1, 0, 0]


@pytest.mark.parametrize("metric", ["euclidean", "cityblock"])
def test_of_equal_neighbours_the_earlier_comes_first(metric: str) -> None:
    data = np.repeat(np.arange(12.0, dtype=np.float32).reshape(6, 2), 6, axis=0)
    table = neighbours(data, items=ITEMS[:36], k=2, metric=metric)
    distances = squareform(pdist(data, metric))
    np.fill_diagonal(distances, np.inf)
    wanted = np.argsort(distances, axis=1, kind="stable")[:, :2].ravel()
    found = zip(table["neighbour_face_id"], table["neighbour_view"], strict=True)
    assert [ITEMS.index(key) for key in found] == wanted.tolist()


def test_neighbours_of_a_key_that_is_there_twice(values: np.ndarray) -> None:
    table = neighbours(values[:4], of=[("a", "1")], items=[("a", "1"), ("a", "1"), ("b", "1"), ("c", "1")], k=1)
    assert len(table) == 2


def test_the_correlation_of_rows_that_vary_little_about_their_mean() -> None:
    data = (1000 + 0.003 * np.random.default_rng(0).standard_normal((10, 500))).astype(np.float32)
    found = rdm(data, items=ITEMS[:10], metric="correlation").values
    np.testing.assert_allclose(found, squareform(pdist(data.astype(np.float64), "correlation")), atol=1e-6)


def test_the_levels_of_a_multiindex_are_found_by_name(values: np.ndarray) -> None:
    turned = pd.MultiIndex.from_tuples([(view, face) for face, view in ITEMS], names=["view", "face_id"])
    assert list(select(values, items=turned).labels.index) == ITEMS


def test_missing_truth_meets_no_condition(values: np.ndarray) -> None:
    table = pd.DataFrame(ITEMS, columns=["face_id", "view"]).assign(
        smiles=pd.array([True, None, False] * 100, "boolean")
    )
    assert len(select(values, items=table, where="smiles")) == 100


def test_a_source_named_twice_is_one(small_store: Path) -> None:
    store = FeatureStore.open(small_store)
    assert [layer.name for layer in select(store, sources=[*store.sources, *store.sources]).layers] == LAYERS


def test_fewer_items_than_neighbours_asked_for(values: np.ndarray) -> None:
    table = neighbours(values[:4], "x", ("f0", "1"), items=ITEMS[:4], k=9)
    assert len(table) == 3
    assert table["rank"].tolist() == [1, 2, 3]


def _alignment(one: np.ndarray, other: np.ndarray, biased: bool) -> float:
    """CKA by the definitions, with all kernels in memory."""

    def hsic(k: np.ndarray, m: np.ndarray) -> float:
        n = len(k)
        if biased:
            centring = np.eye(n) - 1 / n
            return float(np.trace(k @ centring @ m @ centring))
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        ones = np.ones(n)
        return float(
            np.trace(k @ m)
            + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
            - 2 / (n - 2) * (ones @ k @ m @ ones)
        )

    return hsic(one, other) / np.sqrt(hsic(one, one) * hsic(other, other))


@pytest.mark.parametrize("measure", ["cka", "cka-biased", "rbf-cka", "rdm"])
def test_layers_compared_as_by_the_definition(dataset: xr.Dataset, measure: str) -> None:
    table = compare_layers(dataset, measure=measure, bandwidth=0.5)
    rows = [dataset[name].values.reshape(300, -1).astype(np.float64) for name in dataset]
    if measure == "rdm":
        wanted = np.corrcoef([pdist(values, "cosine") for values in rows])
    else:
        distances = [squareform(pdist(values)) for values in rows]
        kernels = (
            [np.exp(-((d / (0.5 * np.median(d[np.triu_indices(300, 1)]))) ** 2) / 2) for d in distances]
            if measure == "rbf-cka"
            else [values @ values.T for values in rows]
        )
        wanted = np.array([[_alignment(one, other, measure == "cka-biased") for other in kernels] for one in kernels])
    np.testing.assert_allclose(table.to_numpy(), wanted, atol=2e-6)
    assert list(table.index) == list(table.columns) == ["early", "late", "other"]


def test_blocks_of_any_size_compare_alike(dataset: xr.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compare_layers(dataset, measure="rbf-cka")
    monkeypatch.setattr("featurestore.queries.layer_comparison.block_rows", lambda *args, **options: 37)
    np.testing.assert_allclose(compare_layers(dataset, measure="rbf-cka"), whole, rtol=1e-6)


def test_a_layer_that_does_not_vary_is_not_compared(dataset: xr.Dataset) -> None:
    table = compare_layers(dataset.assign(same=(("item", "g"), np.ones((300, 4), np.float32))))
    assert table["same"].isna().all()
    assert table.loc["early", "late"] > 0.1


def test_rsa_finds_what_people_saw(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    faces = rng.standard_normal((30, 12)).astype(np.float32)
    names = [f"h{i}" for i in range(30)]
    items = [(name, view) for name in names for view in ("a", "b")]
    data = faces.repeat(2, axis=0)
    seen = squareform(squareform(squareform(pdist(faces, "cosine")), checks=False) + 0.2 * rng.random(435))
    square = pd.DataFrame(seen, names, names)
    (row,) = rsa(data, square, items=items, permutations=400, resamples=200).to_dict("records")
    wanted = squareform(seen, checks=False), pdist(faces.astype(np.float64), "cosine")
    assert row["spearman"] == pytest.approx(stats.spearmanr(*wanted).statistic, abs=1e-6)
    assert row["pearson"] == pytest.approx(stats.pearsonr(*wanted).statistic, abs=1e-6)
    assert row["spearman_low"] < row["spearman"] < row["spearman_high"]
    assert row["spearman_p"] == 1 / 401
    upper = np.triu_indices(30, 1)
    pairs = pd.DataFrame(
        {"": [f"({i}, {j})" for i, j in zip(*upper, strict=True)], "similarity": -seen[upper], "time": 1.0}
    )
    pairs.drop(index=[5, 77]).to_csv(tmp_path / "pairs.csv", index=False)
    table = rsa(data, tmp_path / "pairs.csv", items=items, permutations=50, resamples=50)
    assert table["spearman"][0] == pytest.approx(row["spearman"], abs=0.02)
    assert table["n_pairs"][0] == 433
    assert table.attrs["missing"] == ["h0, h6", "h2, h23"]
    shuffled = square.to_numpy()[np.ix_(*[rng.permutation(30)] * 2)]
    unrelated = rsa(data, pd.DataFrame(shuffled, names, names), items=items, permutations=400, resamples=50)
    assert unrelated["spearman_p"][0] > 0.02
    stranger = pd.DataFrame(
        {"face_1": ["h1", "h1", "h2", "x"], "face_2": ["h2", "h3", "h3", "h1"], "rating": [1.0, 2, 3, 4]}
    )
    some = rsa(data, stranger, items=items, permutations=10, resamples=10)
    assert (some["n_faces"][0], some["n_pairs"][0], some.attrs["unknown"]) == (3, 3, ["x"])


def test_rsa_with_the_judgments_of_faces() -> None:
    table = SHARED / "data" / "human_similarity" / "3D_similarity-rt.csv"
    if not table.is_file():
        pytest.skip("the judgments (shared/data/human_similarity) are not on this machine")
    data = np.random.default_rng(0).standard_normal((100, 20)).astype(np.float32)
    found = rsa(data, table, items=[(f"face{i}", "1") for i in range(100)], by=None, permutations=99, resamples=20)
    given = pd.read_csv(table)
    assert (found["n_faces"][0], found["n_pairs"][0], found.attrs["value"]) == (100, 4950, "similarity")
    assert found["spearman"][0] == pytest.approx(
        stats.spearmanr(pdist(data, "cosine"), -given["similarity"]).statistic, abs=1e-6
    )


def test_rsa_of_constant_judgments_is_missing(values: np.ndarray) -> None:
    pairs = pd.DataFrame(
        {"face_1": ["f0", "f0", "f1"], "face_2": ["f1", "f2", "f2"], "r": [0.1] * 3}
    )  # not 0.1 in the mean
    found = rsa(values, pairs, items=ITEMS, permutations=10, resamples=10).iloc[0]
    assert found[["spearman", "spearman_p", "pearson", "pearson_low", "pearson_high", "pearson_p"]].isna().all()


def test_rsa_with_names_that_look_like_numbers(values: np.ndarray, tmp_path: Path) -> None:
    names = ["01", "02", "03", "NA"]
    items = [(name, "1") for name in names]
    square = pd.DataFrame(squareform(pdist(values[:4], "cosine")), names, names)
    square.to_csv(tmp_path / "square.csv")
    found = rsa(values[:4], tmp_path / "square.csv", items=items, permutations=10, resamples=10)
    assert found["n_faces"][0] == 4
    assert found["pearson"][0] == pytest.approx(1)
    pairs = pd.DataFrame({"face_1": ["1", "1", "2"], "face_2": ["2", "3", "3"], "r": [1.0, 2, 3]})
    with pytest.raises(FeatureStoreError, match=r"0 faces in common.* names 1, 2; the store holds 01, 02, 03"):
        rsa(values[:4], pairs, items=items)
    views = pairs.assign(face_1=["01", "01", "02"], face_2=["02", "NA", "NA"], view_1="1", view_2="1")
    found = rsa(values[:4], views, items=items, by=None, permutations=10, resamples=10)
    assert found["n_pairs"][0] == 3


def test_rsa_with_differences_of_a_trait(dataset: xr.Dataset) -> None:
    found = rsa(dataset, "age", "late", permutations=20, resamples=20)
    ages = np.arange(300.0).reshape(100, 3).mean(axis=1)
    means = dataset["late"].values.reshape(100, 3, -1).mean(axis=1)
    wanted = stats.spearmanr(pdist(means, "cosine"), pdist(ages[:, None])).statistic
    assert found["spearman"][0] == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(
        FeatureStoreError, match=r"`pairs` 'aeg' is neither a file nor a metadata column of numbers. Did you mean age"
    ):
        rsa(dataset, "aeg")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pd.DataFrame({"a": []}), r"`pairs` has no rows"),
        (pd.DataFrame({"f1": [0, 1], "f2": ["much", 0]}, ["f1", "f2"]), r"no number in dissimilarity for f1, f2"),
        (pd.DataFrame({"a": ["x", "y"], "b": [1, 2]}), r"neither columns face_1 and face_2, nor pairs"),
        (pd.DataFrame({"face_1": ["f1"], "face_2": ["f2"], "r": [1.0]}), r"2 faces in common, and RSA needs at least 3"),
        (pd.DataFrame({"face_1": ["f1", "f1", "f2"], "face_2": ["f2", "f3", "f1"], "r": [1.0, 2, 3]}), r"has f1, f2 twice"),
        (pd.DataFrame({"face_1": ["f1", "f1", "f2"], "face_2": ["f2", "f3", "f3"], "r": [1.0, np.nan, 3]}), r"no number in r"),
        (pd.DataFrame({"face_1": ["f1"], "face_2": ["f2"], "r": ["much"]}), r"no column of numbers; it has face_1, face_2, r"),
    ],
)  # fmt: skip
def test_bad_pairs(values: np.ndarray, table: pd.DataFrame, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        rsa(values, table, items=ITEMS)


def test_tau_a_counts_ties_as_neither() -> None:
    one, other = np.random.default_rng(0).integers(0, 5, (2, 40))
    signs = [np.sign(one[i] - one[j]) * np.sign(other[i] - other[j]) for i in range(40) for j in range(i)]
    assert tau_a(one, other) == pytest.approx(np.mean(signs))


def test_results_are_written_whole(dataset: xr.Dataset, tmp_path: Path) -> None:
    matrix = rdm(dataset, "early")
    for ending in ("csv", "parquet", "zarr", "npy"):
        assert tmp_path / f"r.{ending}" in write_result(matrix, tmp_path / f"r.{ending}")
    wanted = matrix.values
    assert (tmp_path / "r.csv").read_text().startswith("item,f0|0,f0|1,")
    table = pd.read_csv(tmp_path / "r.csv", index_col=0)
    assert list(table.index) == list(table.columns)
    np.testing.assert_allclose(table.to_numpy(), wanted, atol=1e-6)
    for found in (
        pd.read_parquet(tmp_path / "r.parquet").to_numpy(),
        xr.open_zarr(tmp_path / "r.zarr")["dissimilarity"].values,
        np.load(tmp_path / "r.npy"),
    ):  # each was computed anew, and products of matrices are not the same to the last bit
        np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert pd.read_csv(tmp_path / "r.names.csv")["item"].tolist() == list(table.index)
    assert not list(tmp_path.glob("*partial*"))
    with pytest.raises(FeatureStoreError, match=r"`out` .*r.zarr is there already"):
        write_result(matrix, tmp_path / "r.zarr")
    with pytest.raises(FeatureStoreError, match=r"ends in none of .csv, .parquet, .zarr, .npy"):
        write_result(matrix, tmp_path / "r.txt")
    with pytest.raises(FeatureStoreError, match=r"takes one matrix: name one layer"):
        write_result(rdm(dataset), tmp_path / "all.csv")


def test_an_array_without_names_is_written(tmp_path: Path, values: np.ndarray) -> None:
    assert write_result(mean(values, items=ITEMS), tmp_path / "mean.npy") == [tmp_path / "mean.npy"]
    np.testing.assert_allclose(np.load(tmp_path / "mean.npy"), values.mean(axis=0), rtol=1e-4)


def test_blocks_shrink_with_the_cap() -> None:
    sizes = [block_rows(100_000, 2 << 30, per_row) for per_row in (1 << 18, 1 << 20, 1 << 22)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] >= 1
    with dask.config.set(num_workers=4):
        assert block_rows(100_000, 2 << 30, 1 << 22) < sizes[-1]


def test_a_cluster_gives_the_same(small_store: Path) -> None:
    store = FeatureStore.open(small_store)
    here = rdm(store, LAYERS[1]).values
    with local_cluster(2) as client, scheduler(client.scheduler.address) as where:
        assert where.startswith(f"2 workers at {client.scheduler.address}")
        assert np.array_equal(rdm(store, LAYERS[1]).values, here)
        assert compare_layers(store).shape == (2, 2)
    with pytest.raises(FeatureStoreError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9"):
        scheduler("tcp://127.0.0.1:9").__enter__()


CAPPED = """
import json, sys, numpy as np
from tests.benchmarks.measure import peak_anonymous
from featurestore import FeatureStore
from featurestore.queries.blocks import beside_this_program
from featurestore.queries.dissimilarity import rdm
store = FeatureStore.open(sys.argv[1])
memory = beside_this_program("700MiB")
peak = peak_anonymous(lambda: rdm(store, "maxp_5_3", memory=memory).to_zarr(sys.argv[2]))
print(json.dumps(peak))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_cap_holds(tmp_path: Path) -> None:
    """An RDM of 2,000 × 25,088 numbers (200 MB) in a process that may have 700 MiB, itself included."""
    from tests.benchmarks.measure import fill_store

    fill_store(tmp_path / "s.zarr", 2048, (512, 7, 7), 256)
    arguments = [sys.executable, "-c", CAPPED, str(tmp_path / "s.zarr"), str(tmp_path / "r.zarr")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) < 700 << 20
    assert xr.open_zarr(tmp_path / "r.zarr")["dissimilarity"].shape == (2048, 2048)
