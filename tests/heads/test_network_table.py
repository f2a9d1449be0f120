"""Identification and same-person accuracy of every layer of several networks, against a slow loop."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from featurestore import FeatureStore, FeatureStoreError, identification_table
from heads.network_table import default_held_out, network_table
from heads.trials.same_person import same_person_trials
from heads.trials.tables import FACES, VIEWS
from tests.commands import command
from tests.heads.conftest import write_store


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources over the same photographs."""
    path = write_store(tmp_path_factory.mktemp("two") / "two.zarr", "still")
    return write_store(path, "moving", seed=1)


def test_every_layer_of_every_network_has_both_accuracies(two: Path) -> None:
    store = FeatureStore.open(two)
    table = network_table(store, "up", n_trials=200, seed=3)
    assert len(table) == 4 and table["weights"].str.contains("not a trained network").all()
    by_layer = identification_table(store, "up").set_index(["source", "layer"])
    drawn = same_person_trials(store.source("moving"), 200, 3)
    for row in table.itertuples():
        assert row.identification == by_layer.loc[(row.source, row.layer), "accuracy"]
        source = store.source(row.source)
        rows = source.rows(row.layer).gather(range(source.n_items)).flatten(1).double().numpy()
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        right = 0
        for trial in drawn.to_dict("records"):
            one, two_, three = (rows[source.find([(trial[f], trial[v])])[0]] for f, v in zip(FACES, VIEWS, strict=True))
            alike = [two_ @ three, one @ three, one @ two_]  # of the two others, where each place is odd
            right += trial[FACES[int(np.argmax(alike))]] == trial["odd"]
        assert row.same_person == pytest.approx(right / 200)
        assert row.same_person_low < row.same_person < row.same_person_high or row.same_person == 1
        assert (row.trials, row.same_person_chance) == (200, pytest.approx(1 / 3))


def test_the_last_views_are_held_out(two: Path) -> None:
    assert default_held_out(FeatureStore.open(two)) == ["up"]
    with pytest.raises(FeatureStoreError, match="no view behind"):
        network_table(FeatureStore.open(two), "behind")


@pytest.mark.parametrize(
    ("views", "held"),
    [
        (["1", "2", "3", "4", "5"], ["4", "5"]),
        (["1", "1|flipped", "2", "2|flipped", "3", "3|flipped", "4", "4|flipped", "5", "5|flipped"], None),
        (["a", "a|flipped", "b"], ["b"]),
        (["a", "b|flipped"], ["b|flipped"]),
    ],
)
def test_a_view_and_its_mirror_image_are_held_out_together(views: list[str], held: list[str] | None) -> None:
    """Apart, a photograph would be identified by its own mirror image: three of ten names would be 4|flipped, 5, 5|flipped."""
    source = SimpleNamespace(coordinate=lambda name: np.array(views, object))
    store: Any = SimpleNamespace(sources={"s": source})
    assert default_held_out(store) == (held or ["4", "4|flipped", "5", "5|flipped"])


def test_the_command_prints_and_keeps_the_table(two: Path, tmp_path: Path) -> None:
    line = [two, "--layers", "fc7-relu", "--n-trials", 50, "--out", tmp_path / "layers.csv"]
    done = command("compare_networks", *line)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("random numbers, not a trained network") == 2
    assert "chance 0.033" in done.stdout and "chance 0.333" in done.stdout
    assert "maxp_5_3" not in done.stdout
    assert len(pd.read_csv(tmp_path / "layers.csv")) == 2
