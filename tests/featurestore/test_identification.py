"""Nearest neighbours of held-out views, against a slow loop, for all networks in one store."""

from pathlib import Path

import numpy as np
import pytest
import torch

from featurestore import FeatureStore, identification_table
from featurestore.errors import FeatureStoreError
from featurestore.queries import identification as module
from featurestore.store.importing import import_activations
from tests.conftest import run_pass, write_photographs

RANDOM = "(random numbers, not a trained network)"
NETWORKS = {
    "inception_resnet_v1": ["maxpool_3a", "descriptor"],
    "resnet50_ft": ["layer1.0", "descriptor"],
    "senet50_scratch": ["descriptor"],
    "vggface": ["maxp_1_2"],
    "torchvision:squeezenet1_1": ["features.3"],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """5 networks side by side over the same 12 photographs: 4 faces × 3 views of their own noise."""
    folder = tmp_path_factory.mktemp("networks")
    photographs = write_photographs(folder / "photographs", 4, 3)
    for backbone, layers in NETWORKS.items():
        run_pass(photographs, folder / "all.zarr", layers, backbone=backbone)
    return FeatureStore.open(folder / "all.zarr")


def by_hand(store: FeatureStore, source: str, layer: str, held: set[str]) -> float:
    opened = store.source(source)
    rows = opened.rows(layer).gather(range(opened.n_items)).flatten(1).double().numpy()
    photographs = [Path(path).read_bytes() for path in opened.items["path"]]
    right, probes = 0, 0
    for i, (face, view) in enumerate(opened.keys):
        if view not in held:
            continue
        if any(photographs[i] == photographs[j] for j, (_, seen) in enumerate(opened.keys) if seen not in held):
            continue  # the gallery holds its copy
        probes += 1
        best, who = -2.0, None
        for j, (other, seen) in enumerate(opened.keys):
            if seen in held:
                continue
            cosine = rows[i] @ rows[j] / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
            if cosine > best:
                best, who = cosine, other
        right += who == face
    return right / probes


@pytest.mark.parametrize("block", [1 << 25, 1])
def test_one_call_gives_every_layer_of_every_network(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)  # 1: a row at a time
    table = identification_table(store, held_out=["2", "3"])
    assert {(row.backbone, row.layer) for row in table.itertuples()} == {
        (backbone, layer) for backbone, layers in NETWORKS.items() for layer in layers
    }
    for row in table.itertuples():
        assert row.accuracy == by_hand(store, row.source, row.layer, {"2", "3"}), row
        assert (row.probes, row.gallery, row.chance) == (8, 4, 0.25)
        assert (row.set_aside, row.not_shared) == (0, 0)
        assert row.low <= row.accuracy <= row.high
        assert row.weights == f"random:0 {RANDOM}"
    assert list(table["accuracy"]) == sorted(table["accuracy"], reverse=True)


def test_a_probe_is_not_identified_by_its_own_copy(tmp_path: Path) -> None:
    """Two of four held-out views are copies of gallery photographs: of the same face, and of another one."""
    photographs = write_photographs(tmp_path / "photographs", 4, 10)
    for probe, original in (("f1/10", "f1/3"), ("f2/10", "f3/1")):
        (photographs / f"{probe}.png").write_bytes((photographs / f"{original}.png").read_bytes())
    run_pass(photographs, tmp_path / "s.zarr", ["maxp_1_2"])
    store = FeatureStore.open(tmp_path / "s.zarr")
    (row,) = identification_table(store, held_out="10", layers="maxp_1_2", sources="vggface").itertuples()
    assert row.accuracy == by_hand(store, row.source, row.layer, {"10"})
    assert (row.probes, row.gallery, row.set_aside) == (2, 36, 2)
    with pytest.raises(FeatureStoreError, match=r"no view 11 in .* it has 1, 2, 3, 4, 5, 6, 7, 8, 9, 10"):
        identification_table(store, "11")
    for face in photographs.iterdir():
        (face / "2.png").write_bytes((face / "1.png").read_bytes())
    run_pass(photographs, tmp_path / "copies.zarr", ["maxp_1_2"])
    (row,) = identification_table(FeatureStore.open(tmp_path / "copies.zarr"), held_out="2").itertuples()
    assert np.isnan(row.accuracy)
    assert (row.probes, row.set_aside) == (0, 4)


def test_sources_are_compared_on_the_photographs_they_share(tmp_path: Path) -> None:
    photographs, store = write_photographs(tmp_path / "p", 4, 3), tmp_path / "s.zarr"
    run_pass(photographs, store, ["maxp_1_2"])
    (photographs / "f1" / "3.png").unlink()
    (photographs / "f2" / "1.png").write_bytes((photographs / "f2" / "1.png").read_bytes() + b"another file")
    (write_photographs(tmp_path / "q", 1, 1, seed=9) / "f1").rename(photographs / "f5")
    run_pass(photographs, store, ["maxp_1_2"], weights="random:1")
    table = identification_table(FeatureStore.open(store), "3").set_index("weights")
    assert table["not_shared"].to_dict() == {f"random:{seed} {RANDOM}": 2 for seed in (0, 1)}
    assert (table["probes"] == 3).all()
    assert (table["gallery"] == 7).all()
    alone = identification_table(FeatureStore.open(store), "3", sources=table.loc[f"random:0 {RANDOM}", "source"])
    assert alone.loc[0, ["probes", "gallery", "not_shared"]].tolist() == [4, 8, 0]
    run_pass(write_photographs(tmp_path / "q", 2, 2, seed=9), store, ["relu_1_1"], weights="random:2")
    with pytest.raises(FeatureStoreError, match=r"have no photograph in common.*`sources`"):
        identification_table(FeatureStore.open(store), "2")


def test_layers_and_sources_can_be_chosen(store: FeatureStore) -> None:
    table = identification_table(store, ["3"], layers=["descriptor"], sources=["resnet50", "senet50"])
    assert sorted(table["backbone"]) == ["resnet50_ft", "senet50_scratch"]


@pytest.mark.parametrize(
    ("held_out", "layers", "message"),
    [
        (["frontal"], None, "no view frontal in .* it has 1, 2, 3"),
        ([], None, "none given"),
        (["1", "2", "3"], None, "no face of .* has views both held out and not"),
        (["3"], ["fc7"], "no source of .* holds the layer fc7"),
    ],
)
def test_what_can_be_wrong(store: FeatureStore, held_out: list[str], layers, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        identification_table(store, held_out, layers)


def test_tiny_and_huge_rows_have_a_direction(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = np.repeat(rng.standard_normal((6, 3)), 4, axis=0) + rng.standard_normal((24, 3)) / 4
    items = [(f"f{i // 4}", str(i % 4)) for i in range(24)]
    for name, values in (
        ("plain", data.astype(np.float32)),
        ("scaled", (data * 10.0 ** rng.integers(-30, 31, (24, 1))).astype(np.float32)),
    ):
        np.save(tmp_path / "rows.npy", values)
        import_activations(
            tmp_path / "rows.npy", tmp_path / f"{name}.zarr", kind="numpy", layer="x", name=name, items=items
        )
    plain, scaled = (
        identification_table(FeatureStore.open(tmp_path / f"{name}.zarr"), "3") for name in ("plain", "scaled")
    )
    assert plain["accuracy"][0] == scaled["accuracy"][0] > 0


def test_rows_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.ones((4, 3), np.float32))
    items = [("a", "1"), ("a", "2"), ("b", "1"), ("b", "2")]
    import_activations(tmp_path / "rows.npy", tmp_path / "x.zarr", kind="numpy", layer="x", items=items)
    opened = FeatureStore.open(tmp_path / "x.zarr").source().rows("x")
    opened.gather = lambda rows: torch.full((len(rows), 3), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(FeatureStoreError, match=r"layer 'x' holds NaN or infinite numbers for 2 of 2 items"):
        module.nearest(opened, np.array([0, 2]), np.array([1, 3]))
