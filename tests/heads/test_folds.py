"""Splits that test every face once, and photographs that are there twice."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from featurestore import FeatureStore, FeatureStoreError
from featurestore.store.lock import store_lock
from featurestore.store.writer import SourceWriter
from heads.comparison import compare
from heads.grid import GridRequest, plan_grid
from heads.runs_table import best_run, write_runs_table
from heads.schedule import run_grid
from heads.splits import FRACTIONS, Split, choices, draw_folds, split_trials, trial_labels
from heads.tasks import identity_items
from heads.train import Settings
from heads.trials.matching import load_trials
from heads.trials.same_person import same_person_trials
from heads.trials.tables import FACES
from tests.heads.conftest import VIEWS, write_store, write_trials

QUICK = Settings(lr=5e-3, epochs=2, batch_size=64)


@pytest.mark.parametrize("kind", ["trial", "face", "view"])
def test_every_label_is_tested_in_one_fold(made: Path, judged: Path, kind: str, tmp_path: Path) -> None:
    trials = load_trials(judged, FeatureStore.open(made))
    labels = trial_labels(trials, kind)
    folds = draw_folds(labels, kind, 0, (0.5, 0.3, 0.2), trials.hash, 2)
    tested = [set(labels[split.indices("test")].ravel()) for split in folds]
    assert not tested[0] & tested[1]
    assert tested[0] | tested[1] == set(labels.ravel())
    for split in folds:
        assert not set(labels[split.indices("test")].ravel()) & set(labels[split.indices("train")].ravel())
        assert Split.load(split.save(tmp_path), trials.hash, len(trials)).fold == split.fold
    assert len({split.test for split in folds}) == 1 and len({split.name for split in folds}) == 2


@pytest.mark.parametrize("folds", [1, 31])
def test_folds_are_two_or_more_and_no_more_than_faces(made: Path, judged: Path, folds: int) -> None:
    trials = load_trials(judged, FeatureStore.open(made))
    with pytest.raises(FeatureStoreError, match=rf"`folds` {folds}: .* there are 30 different faces"):
        draw_folds(trial_labels(trials, "face"), "face", 0, FRACTIONS, trials.hash, folds)


@pytest.mark.parametrize("option", [{"hold_out": ["face-001"]}, {"split": "saved.json"}])
def test_folds_choose_what_is_tested(made: Path, judged: Path, tmp_path: Path, option: dict) -> None:
    with pytest.raises(FeatureStoreError, match="`folds` 3 tests everything once"):
        plan_grid(GridRequest(made, tmp_path, trials=judged, folds=3, **{"split": "face", **option}))


def test_the_choices_say_what_each_would_leave(made: Path, judged: Path) -> None:
    trials = load_trials(judged, FeatureStore.open(made))
    labels = trial_labels(trials, "face")
    found = {choice.option: choice for choice in choices(labels, "face", 0)}
    plain = split_trials(trials, "face", 0)
    assert found["`fractions` .70 .15 .15"].test == len(plain.indices("test"))
    folds = draw_folds(labels, "face", 0, (0.5, 0.3, 0.2), trials.hash, 3)
    assert found["`folds` 3 `fractions` .50 .30 .20"].test == sum(len(split.indices("test")) for split in folds)
    first, *others = ((min(c.train, 4 * c.validation, c.test)) for c in choices(labels, "face", 0))
    assert first >= max(others)


def test_the_answers_of_folds_are_pooled(made: Path, judged: Path, tmp_path: Path) -> None:
    grid = plan_grid(
        GridRequest(
            made,
            tmp_path,
            layers=["fc7-relu"],
            heads=["similarity"],
            trials=judged,
            split="face",
            folds=2,
            fractions=(0.5, 0.3, 0.2),
            seeds=[0, 1],
            settings=QUICK,
        )
    )
    run_grid(grid.parts, tmp_path)
    runs, summary = write_runs_table(tmp_path)
    assert len(runs) == 2 * (2 + 1) and set(runs["fold"]) == {"1 of 2", "2 of 2"}
    row = summary[summary["head"] == "similarity"].iloc[0]
    own = runs[runs["head"] == "similarity"]
    by_seed = own.groupby("seed").apply(lambda part: np.average(part["accuracy"], weights=part["n_test"]))
    assert row["accuracy"] == pytest.approx(by_seed.mean())
    assert row["sd"] == pytest.approx(by_seed.std(ddof=1))
    assert (row["n_seeds"], row["n_folds"]) == (2, 2)
    assert row["n_test"] == own[own["seed"] == 0]["n_test"].sum()
    assert row["over_zero_shot"] == pytest.approx(
        row["accuracy"] - summary[summary["head"] == "zero-shot"]["accuracy"].iloc[0]
    )
    with pytest.raises(FeatureStoreError, match=r"of 2 tests, .* fold='1 of 2'.* fold='2 of 2'"):
        best_run(tmp_path, head="similarity")  # the luckiest fold is not the best run
    best = best_run(tmp_path, head="similarity", fold="2 of 2")
    folds = [own[own["fold"] == f"{k} of 2"].sort_values("validation_loss")["name"].tolist() for k in (1, 2)]
    assert best["name"] == folds[1][0]
    with pytest.raises(FeatureStoreError, match="not tested on the same trials"):
        compare(tmp_path, [folds[0][0], folds[1][0]])
    beside = compare(tmp_path, [folds[0][0], "fc7-relu:zero-shot"])
    assert beside["n_test"].tolist() == [len(pd.read_csv(tmp_path / folds[0][0] / "predictions.csv"))]
    (tmp_path / folds[1][0] / "result.json").unlink()
    _, summary = write_runs_table(tmp_path)
    assert summary[summary["head"] == "similarity"]["n_seeds"].tolist() == [1]  # a seed without all folds is not pooled


def with_copy(path: Path, of: int, row: int) -> Path:
    """A made-up store in which item ``row`` has the photograph of item ``of``."""
    write_store(path)
    with store_lock(path, "test"):
        writer = SourceWriter(path, "made", {})
        table = writer.table.copy()
        table.loc[row, "image_sha256"] = table.loc[of, "image_sha256"]
        writer.replace_table(table)
        writer.publish()
    return path


def test_one_photograph_under_two_faces_is_never_on_both_sides(tmp_path: Path) -> None:
    path = with_copy(tmp_path / "twin.zarr", of=0, row=len(VIEWS) * 29)  # face-001's and face-030's frontal view
    write_trials(tmp_path / "t.csv", 3000)
    trials = load_trials(tmp_path / "t.csv", FeatureStore.open(path))
    aside = 0
    for seed in range(12):
        split = split_trials(trials, "face", seed, (0.5, 0.2, 0.3))
        train, test = (set(trials.photographs[split.indices(part)].ravel()) for part in ("train", "test"))
        assert not train & test
        aside += split.set_aside
    assert aside > 0


def test_one_photograph_under_two_keys_makes_one_triplet(tmp_path: Path) -> None:
    path = with_copy(tmp_path / "twin.zarr", of=0, row=1)  # face-001, frontal and left
    pairs = [(f"face-{face:03d}", view) for face in (1, 2, 3, 4) for view in ("frontal", "left")]
    rows = [[face, "face-020", "face-021", view, "up", "up", "face-020"] for face, view in pairs]
    columns = [*FACES, "view_1", "view_2", "view_3", "odd"]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "t.csv", index=False)
    trials = load_trials(tmp_path / "t.csv", FeatureStore.open(path))
    for seed in range(8):
        part = split_trials(trials, "trial", seed, (0.4, 0.2, 0.4)).part
        assert part[0] == part[1]


def test_same_person_trials_never_show_a_photograph_beside_its_copy(tmp_path: Path) -> None:
    source = FeatureStore.open(with_copy(tmp_path / "twin.zarr", of=0, row=1)).source()  # face-001, frontal and left
    drawn = same_person_trials(source, 400, seed=0)
    shown = set(drawn[["face_1", "view_1"]].itertuples(index=False, name=None))
    assert ("face-001", "frontal") in shown and ("face-001", "left") not in shown


def test_identities_are_not_tested_on_copies_of_what_they_learned(tmp_path: Path) -> None:
    path = with_copy(tmp_path / "twin.zarr", of=0, row=1)
    request = GridRequest(
        path, tmp_path, heads=["identity"], hold_out=["left"], fractions=(0.6, 0.2, 0.2), settings=QUICK
    )
    ((task, _),) = plan_grid(request).parts
    source = FeatureStore.open(path).source()
    assert len(identity_items(source)) == 120
    assert task.split.set_aside == 1 and 1 not in task.split.indices("test")
    assert task.description()["n_set_aside"] == 1
    ((task, _),) = plan_grid(replace(request, hold_out=["up"])).parts
    assert task.split.set_aside <= 1  # frontal and left may be in training and validation
