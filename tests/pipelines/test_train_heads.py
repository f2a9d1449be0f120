"""The command as a user runs it."""

import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from featurestore import FeatureStore
from featurestore.devices import fast_precision
from heads.describe import draw, layer_table, summary
from heads.registry import build_head
from tests.commands import command
from tests.heads.conftest import write_store, write_trials


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``store/demo.zarr`` and its trials, where the command looks for them."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "store" / "demo_faces").mkdir(parents=True)
    write_store(folder / "store" / "demo.zarr")
    write_trials(folder / "store" / "demo_faces" / "trials.csv", 500, raters=5, error=0.1)
    return folder


def test_the_demo_grid_needs_no_further_option(folder: Path) -> None:
    line = [
        "--layers",
        "maxp_5_3",
        "fc7-relu",
        "--heads",
        "similarity",
        "--lr",
        "5e-4",
        "1e-3",
        "--seeds",
        0,
        "--epochs",
        2,
    ]
    done = command("train_heads", *line, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "500 odd-one-out trials" in done.stdout
    assert "train 350, validation 75, test 75" in done.stdout
    assert "of 75 test answers to 15 triplets, each against the other raters'" in done.stdout
    assert done.stdout.count("| epoch") == 8
    assert "All runs: store/runs/runs.csv" in done.stdout
    table = pd.read_csv(folder / "store" / "runs" / "runs.csv")
    assert sorted(table["head"]) == ["similarity"] * 4 + ["zero-shot"] * 2
    assert {"low", "high", "cluster_low", "ceiling", "of_ceiling", "lr", "seed", "wall_seconds"} <= set(table)
    assert {"split", "p_zero_shot", "weights", "trials_file", "where"} <= set(table)
    assert done.stdout.count("seed:0 (random numbers, not a trained network)") == 2  # in the plan and above the table
    assert "Choose by validation loss" in done.stdout
    assert "from 75 test answers to 15 repeated triplets; `repeated` is accuracy on these" in done.stdout
    assert table["split"].nunique() == 1
    again = command("train_heads", *line, cwd=folder)
    assert "6 of them finished before" in again.stdout
    assert "| epoch" not in again.stdout


def test_identities_and_same_person_trials_need_no_file(folder: Path) -> None:
    line = [
        "--store",
        "store/demo.zarr",
        "--layers",
        "fc7-relu",
        "--heads",
        "identity",
        "zero-shot",
        "--epochs",
        2,
        "--fractions",
        ".5",
        ".25",
        ".25",
    ]
    done = command("train_heads", *line, "--trials", "same-person", "--n-trials", 200, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "30 faces to identify" in done.stdout
    assert "200 odd-one-out trials" in done.stdout


def test_the_plan_says_what_is_trained_on_and_what_other_splits_would_leave(folder: Path) -> None:
    line = ["--layers", "fc7-relu", "--heads", "similarity", "--split", "face", "--where", "yaw <= 0", "--dry-run"]
    done = command("train_heads", *line, cwd=folder)
    assert done.returncode == 1 and "part of the split by face is empty" in done.stderr
    suggested = re.search(r"For example (--f.*), which leaves \d+ trials to train on", done.stderr)[1]
    done = command("train_heads", *line, *suggested.split(), cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "where     (yaw <= 0)" in done.stdout
    assert "views     frontal, left, up" in done.stdout
    assert "(sha256 " in done.stdout
    assert "  choices " in done.stdout and suggested in done.stdout
    assert done.stdout.count("  suggested: ") == 1
    assert "left out because they mix parts" in done.stdout


def test_the_plan_says_the_precision_and_how_to_have_float32(folder: Path) -> None:
    line = ["--layers", "fc7-relu", "--heads", "conv", "similarity", "--dry-run", "--out", "planned"]
    said = command("train_heads", *line, cwd=folder).stdout
    fast = fast_precision(torch.device("cpu"))
    chosen = {
        "bf16": "products in bf16 (conv); fp32 (similarity); --precision fp32 for float32 alone",
        "fp32": "products in fp32 (conv, similarity)\n",
    }
    assert f"256 examples each (--batch-size), {chosen[fast]}" in said
    assert chosen["fp32"] in command("train_heads", *line, "--precision", "fp32", cwd=folder).stdout
    assert (
        "products in bf16 (conv, similarity)" in command("train_heads", *line, "--precision", "bf16", cwd=folder).stdout
    )


def test_faulty_trials_are_left_out_and_kept(folder: Path) -> None:
    table = pd.read_csv(folder / "store" / "demo_faces" / "trials.csv")
    table.loc[[3, 5], "face_1"] = "nobody"
    table.to_csv(folder / "faulty.csv", index=False)
    line = ["--trials", "faulty.csv", "--layers", "fc7-relu", "--heads", "zero-shot", "--out", "faulty"]
    done = command("train_heads", *line, cwd=folder)
    assert done.returncode == 1
    assert "2 name a face that is not in store/demo.zarr" in done.stderr and "(lines 5, 7)" in done.stderr
    assert "leave them out: --on-error skip" in done.stderr
    done = command("train_heads", *line, "--on-error", "skip", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "2 faulty trials, kept in faulty/faulty-faulty.csv" in done.stdout
    assert pd.read_csv(folder / "faulty" / "faulty-faulty.csv")["line"].tolist() == [5, 7]


def test_trials_that_show_a_face_twice_are_told_apart(folder: Path) -> None:
    table = pd.read_csv(folder / "store" / "demo_faces" / "trials.csv").drop_duplicates(["face_1", "face_2", "face_3"])
    twice = table.index % 3 == 0
    table.loc[twice, "face_2"], table.loc[twice, "view_2"] = table.loc[twice, "face_1"], "up"
    table.loc[twice, "view_1"] = "left"
    table.loc[twice, "odd"] = table.loc[twice, "face_3"]
    table.to_csv(folder / "twice.csv", index=False)
    line = ["--trials", "twice.csv", "--layers", "fc7-relu", "--heads", "zero-shot", "--out", "twice"]
    done = command("train_heads", *line, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "trials that show one face twice: " in done.stdout
    assert "of the trials show one face twice: `two faces` is accuracy on these" in done.stdout


def test_runs_are_compared(folder: Path) -> None:
    line = ["--layers", "fc7-relu", "--heads", "similarity", "--epochs", 1, "--folds", 2, "--out", "folds"]
    done = command("train_heads", *line, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "similarity lr 0.0005 seed 0 fold 2 of 2: test accuracy" in done.stdout
    assert "500 test trials (" in done.stdout and " in each fold): trial-seed0-2folds-" in done.stdout
    done = command(
        "train_heads", "--compare", "fc7-relu:similarity", "fc7-relu:zero-shot", "--out", "folds", cwd=folder
    )
    assert done.returncode == 0, done.stderr
    assert "500 test trials" in done.stdout and "p holm" in done.stdout
    assert len(pd.read_csv(folder / "folds" / "comparison.csv")) == 1
    done = command("train_heads", "--compare", "fc7-relu:similarity", "fc6", "--out", "folds", cwd=folder)
    assert done.returncode == 1 and "no run in folds begins with 'fc6'" in done.stderr


def test_a_plan_without_a_run(folder: Path) -> None:
    done = command("train_heads", "--layers", "fc7-relu", "--out", "planned", "--dry-run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Plan (nothing is run)" in done.stdout
    assert "fc7-relu conv" in done.stdout
    assert not list((folder / "planned").glob("fc7*"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--layers", "fc6"], "layer 'fc6' is not in store/demo.zarr/"),
        (["--layers", "fc6"], "Add it: pipelines/cache_layers.py --layers fc6"),
        (["--heads", "conf"], "Did you mean conv?"),
        (["--store", "nowhere.zarr"], "there is no store nowhere.zarr"),
        (["--trials", "nowhere.csv"], "there is no file of trials nowhere.csv"),
        (["--fractions", "1", "1", "1"], "add up to 1"),
        (["--split", "faces"], "one of trial, face, view"),
        (["--split", "face", "--heads", "identity"], "--split view"),
        (["--where", "gender = 'x'"], "is no condition"),
        (["--rank", "lots"], "neither a number nor"),
        (["--session-view", "2D"], "such as 2D=frontal"),
        (["--precision", "tf32", "--device", "cpu"], "needs a GPU"),
        (["--scheduler", "tcp://127.0.0.1:1", "--heads", "zero-shot"], "no Dask scheduler"),
        (["--heads", "fc8-conv", "--layers", "maxp_5_3"], "take vectors"),
    ],
)
def test_what_cannot_be_done_is_said_without_a_traceback(folder: Path, line: list[str], message: str) -> None:
    done = command("train_heads", *line, cwd=folder)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_head_is_drawn(folder: Path) -> None:
    pytest.importorskip("pygraphviz")
    done = command("train_heads", "--layers", "fc7-relu", "--heads", "conv", "--draw", "head.svg", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Conv2d" in done.stdout
    picture = (folder / "head.svg").read_text()
    assert picture.count("Conv2d") == 4
    assert "<svg" in picture
    width, height = map(float, re.search(r'width="(\d+)pt" height="(\d+)pt"', picture).groups())
    assert height / width <= 297 / 210  # a page
    assert "shared by x1, x2, x3" in picture
    assert not re.search("getitem|unsqueeze|flatten|<title>(mul|sub)", picture)
    assert draw(build_head("similarity", (512, 7, 7)), folder / "head.png").read_bytes()[:4] == b"\x89PNG"


def test_tables_of_layers_and_heads() -> None:
    table = layer_table()
    assert len(table) == 39
    assert table.loc["maxp_5_3", ["features", "bridge", "conv"]].tolist() == [25088, 4096, 102_766_397]
    text = summary(build_head("conv", (4096,)))
    assert "1,230,757" in text
    assert "[1, 2, 3, 251]" in text


def test_a_head_sees_what_the_store_holds(folder: Path) -> None:
    store = FeatureStore.open(folder / "store" / "demo.zarr")
    shapes = {name: layer.shape for name, layer in store.layers.items()}
    assert layer_table(shapes)["features"].to_dict() == {"fc7-relu": 400, "maxp_5_3": 400}
    rows = store.rows("maxp_5_3").gather(range(6))
    assert build_head("conv", (16, 5, 5)).to_empty(device="cpu")(
        *rows.view(2, 3, 16, 5, 5).unbind(1)
    ).shape == torch.Size([2, 3])
