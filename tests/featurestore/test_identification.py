"""Nearest neighbours of held-out views, against a slow loop, for all networks in one store."""

from pathlib import Path

import numpy as np
import pytest

from featurestore import FeatureStore, identification_table
from featurestore.errors import FeatureStoreError
from featurestore.queries import identification as module
from tests.conftest import run_pass, write_photographs

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
    right, probes = 0, 0
    for i, (face, view) in enumerate(opened.keys):
        if view not in held:
            continue
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
        assert row.low <= row.accuracy <= row.high
        assert row.weights == "random:0"
    assert list(table["accuracy"]) == sorted(table["accuracy"], reverse=True)


def test_the_same_pictures_are_found(tmp_path: Path) -> None:
    """A view that is a copy of another of its face: whatever the network, it is the nearest."""
    photographs = write_photographs(tmp_path / "photographs", 4, 2)
    for face in photographs.iterdir():
        (face / "3.png").write_bytes((face / "1.png").read_bytes())
    run_pass(photographs, tmp_path / "s.zarr", ["maxp_1_2"])
    table = identification_table(FeatureStore.open(tmp_path / "s.zarr"), held_out=["3"])
    assert table["accuracy"].tolist() == [1.0]


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
