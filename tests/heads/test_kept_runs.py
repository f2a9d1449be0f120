"""A store, trials and run folders written by version 0.1.0: they open for ever.

Nine faces × two views, rows of 20 numbers; a similarity head of rank 3 and its zero-shot baseline.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from featurestore import FeatureStore
from featurestore.errors import FeatureStoreError
from heads import load_head
from heads.grid import GridRequest, plan_grid
from heads.run_files import read_result
from heads.runs import train_run
from heads.runs_table import finished_runs, runs_table
from heads.splits import Split
from heads.train import Settings

KEPT = Path(__file__).parent / "data" / "version-0.1"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return Path(shutil.copytree(KEPT, tmp_path / "kept"))


def test_the_table_of_runs_has_what_was_written(kept: Path) -> None:
    """And what 0.1.0 did not write: the validation loss, from the metrics, and the ceiling of the tested trials."""
    written = pd.read_csv(kept / "runs" / "runs.csv").set_index("name")
    read = runs_table(finished_runs(kept / "runs")).set_index("name").loc[written.index]
    for column in ("accuracy", "low", "high", "p_zero_shot", "rank", "pull"):
        assert np.allclose(read[column].astype(float), written[column].astype(float), equal_nan=True), column
    (trained,) = (kept / "runs").glob("fc7-relu-similarity-*")
    losses = pd.read_csv(trained / "metrics.csv")["validation_loss"]
    assert read.loc[trained.name, "validation_loss"] == pytest.approx(losses.min())
    assert "normalised" not in read


def test_a_head_answers_as_it_did(kept: Path) -> None:
    (folder,) = (kept / "runs").glob("fc7-relu-similarity-*")
    head = load_head(folder / "weights.safetensors", "fc7-relu")
    predictions = pd.read_csv(folder / "predictions.csv")
    store = FeatureStore.open(kept / "store.zarr")
    rows = [
        store.rows("fc7-relu").gather(
            store.find(predictions[[f"face_{i}", f"view_{i}"]].set_axis(["face_id", "view"], axis=1))
        )
        for i in (1, 2, 3)
    ]
    with torch.no_grad():
        probabilities = head(*rows).softmax(dim=1).numpy()
    assert np.allclose(probabilities, predictions[["p_1", "p_2", "p_3"]], atol=1e-6)


def test_the_same_request_finds_them_finished(kept: Path) -> None:
    request = GridRequest(
        store=kept / "store.zarr",
        out=kept / "runs",
        trials=kept / "trials.csv",
        layers=["fc7-relu"],
        heads=["similarity"],
        rank=3,
        settings=Settings(epochs=3),
    )
    grid = plan_grid(request)
    assert (grid.runs, grid.finished) == (2, 2)
    ((task, runs),) = grid.parts
    assert train_run(task, runs[1], kept / "runs")["best_epoch"] == 3  # read, not trained: it has no state


def test_files_that_are_pipes_or_nested_too_deep_make_a_run_unfinished(kept: Path) -> None:
    """A folder that was sent can hold anything: a pipe would be waited for."""
    (trained,) = (kept / "runs").glob("fc7-relu-similarity-*")
    (untrained,) = (kept / "runs").glob("fc7-relu-zero-shot-*")
    for name in ("result.json", "config.json", "predictions.csv"):
        (trained / name).rename(trained / "aside")
        os.mkfifo(trained / name)
        assert read_result(trained) is None
        (trained / name).unlink()
        (trained / "aside").rename(trained / name)
    config = (trained / "config.json").read_text()
    for content in ("[" * 100_000, config.replace("random:0", "\\ud800")):
        assert content != config
        (trained / "config.json").write_text(content)
        assert list(runs_table(finished_runs(kept / "runs"))["name"]) == [untrained.name]


def test_predictions_without_a_column_of_the_trials_make_a_run_unfinished(kept: Path) -> None:
    (trained,) = (kept / "runs").glob("fc7-relu-similarity-*")
    path = trained / "predictions.csv"
    path.write_text(path.read_text().replace("view_2", "view_9"))
    assert read_result(trained) is None
    assert len(runs_table(finished_runs(kept / "runs"))) == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config", {"trials": 1}),
        ("config", {"trials": []}),
        ("config", {"fold": []}),
        ("result", {"validation_loss": "a"}),
    ],
)
def test_a_run_that_cannot_be_put_in_order_is_left_out(kept: Path, name: str, change: dict) -> None:
    (trained,) = (kept / "runs").glob("fc7-relu-similarity-*")
    path = trained / f"{name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    (untrained,) = (kept / "runs").glob("fc7-relu-zero-shot-*")
    assert list(runs_table(finished_runs(kept / "runs"))["name"]) == [untrained.name]


def test_a_split_of_what_no_split_can_hold_is_refused(kept: Path) -> None:
    (path,) = (kept / "runs" / "splits").glob("*.json")
    document = json.loads(path.read_text())
    for content in (json.dumps({**document, "train": [10**30]}), "[" * 100_000):
        path.write_text(content)
        with pytest.raises(FeatureStoreError, match="is not a split"):
            Split.load(path, document["of"], 120)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FeatureStoreError, match="there is no split"):
        Split.load(path, document["of"], 120)
