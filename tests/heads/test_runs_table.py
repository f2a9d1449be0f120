"""The tables of runs: what may be compared, by what to choose, and what a run was trained on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from featurestore import FeatureStoreError
from heads import best_run
from heads.comparison import compare
from heads.grid import GridRequest, plan_grid
from heads.runs_table import finished_runs, runs_table, summary_table, write_runs_table
from heads.schedule import run_grid
from heads.train import Settings
from tests.heads.conftest import write_store, write_trials

QUICK = Settings(lr=5e-3, epochs=4, batch_size=64)


def asked(made: Path, trials: Path, out: Path, **options) -> GridRequest:
    common = {"layers": ["fc7-relu"], "heads": ["similarity"], "trials": trials, "lr": [5e-3], "settings": QUICK}
    return GridRequest(made, out, **{**common, **options})


def trained(request: GridRequest) -> Path:
    run_grid(plan_grid(request).parts, request.out)
    return request.out


@pytest.fixture(scope="module")
def runs(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds on two layers, tested on 180 trials; and one head on a few trials of a condition, where it is always right."""
    out = tmp_path_factory.mktemp("runs")
    write_trials(out / "trials.csv", 1200, raters=2, error=0.15)
    trained(asked(made, out / "trials.csv", out, layers=["fc7-relu", "maxp_5_3"], seeds=[0, 1]))
    easy = pd.read_csv(out / "trials.csv").head(40).assign(easy=1)
    easy["odd"] = easy["face_1"]
    easy.to_csv(out / "easy.csv", index=False)
    trained(asked(made, out / "easy.csv", out, where=["easy == 1"], heads=["conv"], lr=[1e-2]))
    write_runs_table(out)
    return out


def test_few_trials_do_not_win_over_many(runs: Path) -> None:
    """1.000 on 22 trials stood above 0.726 on 423: only runs of one test are ranked, and not by the test."""
    table = pd.read_csv(runs / "runs.csv")
    small = table[table["n_test"] < 20]
    assert small["accuracy"].max() == 1.0 > table[table["n_test"] > 100]["accuracy"].max()
    assert table["n_test"].is_monotonic_decreasing
    assert small["group"].unique().tolist() == [2]
    for _, group in table.dropna(subset="validation_rank").groupby("group"):
        assert group["validation_loss"].is_monotonic_increasing
        assert group["validation_rank"].tolist() == list(range(1, len(group) + 1))
    assert table.loc[table["head"] == "zero-shot", "validation_rank"].isna().all()


def test_the_best_run_is_chosen_by_validation_within_one_test(runs: Path) -> None:
    table = pd.read_csv(runs / "runs.csv")
    best = best_run(runs, head="similarity", layer="fc7-relu")
    own = table[(table["head"] == "similarity") & (table["layer"] == "fc7-relu")]
    assert best["name"] == own.loc[own["validation_loss"].idxmin(), "name"]
    with pytest.raises(FeatureStoreError, match=r"of 2 tests, .* Say which: group=1: .*group=2"):
        best_run(runs)
    with pytest.raises(FeatureStoreError, match=r"no finished run in .* has head='fc'"):
        best_run(runs, head="fc")
    with pytest.raises(FeatureStoreError, match="no column colour"):
        best_run(runs, colour="red")


def test_the_summary_is_over_seeds(runs: Path) -> None:
    table, summary = pd.read_csv(runs / "runs.csv"), pd.read_csv(runs / "summary.csv")
    for row in summary[summary["n_seeds"] == 2].itertuples():
        own = table[(table["layer"] == row.layer) & (table["head"] == row.head) & (table["group"] == row.group)]
        assert row.accuracy == pytest.approx(own["accuracy"].mean())
        assert row.sd == pytest.approx(own["accuracy"].std())
        assert row.cluster_low < row.accuracy < row.cluster_high
    assert len(summary) == 4 + 2


def test_the_table_says_what_was_trained_on(runs: Path) -> None:
    table = pd.read_csv(runs / "runs.csv")
    assert (table["weights"] == "seed:0 (random numbers, not a trained network)").all()
    easy = table[table["group"] == 2]
    assert easy["where"].unique().tolist() == ["(easy == 1)"]
    assert easy["trials_file"].unique().tolist() == [str(runs / "easy.csv")]
    assert (easy["n_train"] + easy["n_validation"] + easy["n_test"] == 40).all()
    assert table["train_accuracy"].between(0, 1).all()
    config = json.loads((runs / easy.iloc[0]["name"] / "config.json").read_text())
    assert config["where"] == "(easy == 1)" and len(config["trials_sha256"]) == 64
    assert config["views"] == "frontal, left, right, up" and config["weights"].endswith("not a trained network)")


def test_answers_that_were_shuffled_are_chance_within_the_interval(made: Path, tmp_path: Path) -> None:
    table = write_trials(tmp_path / "t.csv", 900, raters=3)
    rng = np.random.default_rng(1)
    places = rng.integers(1, 4, len(table))
    table["odd"] = table[["face_1", "face_2", "face_3"]].to_numpy()[np.arange(len(table)), places - 1]
    table.to_csv(tmp_path / "t.csv", index=False)
    trained(asked(made, tmp_path / "t.csv", tmp_path, heads=["similarity", "conv"], seeds=[0, 1]))
    _, summary = write_runs_table(tmp_path)
    assert (summary["cluster_low"] < 1 / 3).all() and (summary["cluster_high"] > 1 / 3).all()
    assert summary["of_ceiling_low"].isna().all()
    assert summary["ceiling_note"].str.contains("chance").all()
    trained_heads = summary[summary["head"] != "zero-shot"]
    assert (trained_heads["over_low"] < 0).all() and (trained_heads["over_high"] > 0).all()


def test_runs_and_layers_are_compared_on_the_same_trials(runs: Path) -> None:
    table = pd.read_csv(runs / "runs.csv")
    one, other = (
        table[(table["layer"] == layer) & (table["head"] == "similarity")].iloc[0] for layer in ("fc7-relu", "maxp_5_3")
    )
    found = compare(runs, [one["name"], other["name"]])
    right = [pd.read_csv(runs / row["name"] / "predictions.csv")["correct"].to_numpy(float) for row in (one, other)]
    assert found["difference"].tolist() == [pytest.approx((right[0] - right[1]).mean())]
    assert found["low"].iloc[0] < found["difference"].iloc[0] < found["high"].iloc[0]
    layers = compare(runs, ["fc7-relu", "maxp_5_3"])
    assert sorted(zip(layers["first"], layers["second"], strict=True)) == [
        ("fc7-relu:similarity", "maxp_5_3:similarity"),
        ("fc7-relu:zero-shot", "maxp_5_3:zero-shot"),
    ]
    seeds = layers[layers["first"] == "fc7-relu:similarity"].iloc[0]
    means = table[table["head"] == "similarity"].groupby("layer")["accuracy"].mean()
    assert seeds["difference"] == pytest.approx(means["fc7-relu"] - means["maxp_5_3"])
    assert np.isnan(seeds["p_mcnemar"])  # averaged over seeds


def test_many_comparisons_are_corrected_as_holm_did(runs: Path) -> None:
    found = compare(runs, ["fc7-relu:similarity", "fc7-relu:zero-shot", "maxp_5_3:similarity", "maxp_5_3:zero-shot"])
    p = found["p"].to_numpy()
    assert len(p) == 6
    order = np.argsort(p)
    running = 0.0
    for k, i in enumerate(order):
        running = max(running, min(1.0, (6 - k) * p[i]))
        assert found["p_holm"].iloc[i] == pytest.approx(running)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["fc7-relu:similarity", "fc7-relu:conv"], "were not tested on the same trials"),
        (["fc7-relu"], "two names or more"),
        (["fc7-relu:zero-shot", "fc7-relu-zero-shot"], "Say which|the same runs"),
        (["fc7-relu", "fc6"], "Did you mean|It is one of"),
    ],
)
def test_what_cannot_be_compared(runs: Path, names: list[str], message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        compare(runs, names)


def test_nothing_is_compared_with_itself(runs: Path) -> None:
    table = pd.read_csv(runs / "runs.csv")
    own = table[(table["layer"] == "fc7-relu") & (table["head"] == "similarity")]["name"]
    with pytest.raises(FeatureStoreError, match="the same runs, or have runs in common"):
        compare(runs, [own.iloc[0], "fc7-relu:similarity"])  # a seed and the mean that it is in
    found = compare(runs, ["fc7-relu", "fc7-relu:zero-shot"])
    assert set(found["first"]) == {"fc7-relu:similarity", "fc7-relu:conv"}
    with pytest.raises(FeatureStoreError, match="no finished runs in"):
        compare(runs / "nowhere", ["a", "b"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("predictions.csv", None),
        ("predictions.csv", "correct\nTrue\n"),
        ("predictions.csv", "\x00"),
        ("result.json", '{"state": "finished"}'),
        ("config.json", "{"),
    ],
)
def test_a_damaged_run_is_trained_again(made: Path, tmp_path: Path, name: str, content: str | None) -> None:
    write_trials(tmp_path / "t.csv", 200)
    request = asked(made, tmp_path / "t.csv", tmp_path / "runs", settings=replace(QUICK, epochs=1))
    trained(request)
    before = write_runs_table(tmp_path / "runs")[0].set_index("name")["accuracy"]
    (folder,) = (tmp_path / "runs").glob("fc7-relu-similarity-*")
    full = (folder / name).read_text()
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(
            content if name != "predictions.csv" or "\x00" in content else full[: len(full) // 2]
        )
    grid = plan_grid(request)
    assert (grid.runs, grid.finished) == (2, 1)
    assert len(write_runs_table(tmp_path / "runs")[0]) == 1  # the sound one stays
    trained(request)
    after = write_runs_table(tmp_path / "runs")[0].set_index("name")["accuracy"]
    assert after.to_dict() == before.to_dict()


def test_rows_stored_in_half_precision_are_another_run(tmp_path: Path) -> None:
    write_trials(tmp_path / "t.csv", 200)
    for dtype in ("float32", "float16"):
        path = write_store(tmp_path / f"{dtype}.zarr", dtype=dtype)
        request = asked(path, tmp_path / "t.csv", tmp_path / "runs", heads=["zero-shot"])
        assert plan_grid(request).finished == 0
        trained(request)
    assert sorted(pd.read_csv(_written(tmp_path / "runs"))["dtype"]) == ["float16", "float32"]


def _written(folder: Path) -> Path:
    write_runs_table(folder)
    return folder / "runs.csv"


def test_a_reused_run_is_described_as_it_was_asked_for_last(made: Path, tmp_path: Path) -> None:
    table = write_trials(tmp_path / "t.csv", 200)
    trained(asked(made, tmp_path / "t.csv", tmp_path / "runs", heads=["zero-shot"]))
    table.assign(participant="p", response_time=1).to_csv(tmp_path / "corrected.csv", index=False)
    request = asked(
        made, tmp_path / "corrected.csv", tmp_path / "runs", heads=["zero-shot"], where=["response_time > 0"]
    )
    assert plan_grid(request).finished == 1
    trained(request)
    (row,) = pd.read_csv(_written(tmp_path / "runs")).to_dict("records")
    assert row["trials_file"].endswith("corrected.csv") and row["where"] == "(response_time > 0)"


def test_heads_without_a_measure_are_compared_with_the_only_zero_shot_there_is(made: Path, tmp_path: Path) -> None:
    write_trials(tmp_path / "t.csv", 300)
    trained(
        asked(made, tmp_path / "t.csv", tmp_path, heads=["fc8-fc"], measure="dot", settings=replace(QUICK, epochs=1))
    )
    runs, summary = write_runs_table(tmp_path)
    assert runs.set_index("head")["p_zero_shot"].notna().to_dict() == {"fc8-fc": True, "zero-shot": False}
    assert summary.set_index("head")["over_zero_shot"].notna().to_dict() == {"fc8-fc": True, "zero-shot": False}


def test_what_was_held_out_is_said(made: Path, tmp_path: Path) -> None:
    trained(asked(made, None, tmp_path, heads=["identity"], hold_out=["left", "up"], settings=replace(QUICK, epochs=1)))
    (row,) = pd.read_csv(_written(tmp_path)).to_dict("records")
    assert row["held_out"] == "left, up" and row["views"] == "frontal, left, right, up"


def test_a_run_that_is_not_reused_says_why(made: Path, tmp_path: Path) -> None:
    write_trials(tmp_path / "t.csv", 200)
    request = asked(made, tmp_path / "t.csv", tmp_path / "runs", settings=replace(QUICK, epochs=1))
    trained(request)
    assert not plan_grid(request).not_reused
    other = write_store(tmp_path / "made.zarr", image="another")
    (reason,) = plan_grid(replace(request, store=other)).not_reused
    assert "photographs have changed" in reason and "face-001/frontal" in reason and "more" in reason
    table = pd.read_csv(tmp_path / "t.csv")
    table.assign(participant="p").to_csv(tmp_path / "t.csv", index=False)
    assert not plan_grid(replace(request, split_seed=3)).not_reused  # another split was asked for: that is why
    table.iloc[:-1].to_csv(tmp_path / "t.csv", index=False)
    (reason,) = plan_grid(request).not_reused
    assert "t.csv has changed since" in reason


def test_predictions_keep_every_column_of_the_trials(made: Path, tmp_path: Path) -> None:
    table = write_trials(tmp_path / "t.csv", 200)
    table.assign(response_time=1.5, source="lab A", correct="yes", line=7).to_csv(tmp_path / "t.csv", index=False)
    trained(asked(made, tmp_path / "t.csv", tmp_path / "runs", heads=["zero-shot"]))
    (path,) = (tmp_path / "runs").glob("*/predictions.csv")
    kept = pd.read_csv(path)
    assert (kept["response_time"] == 1.5).all()
    assert (
        set(kept["trial_source"]) == {"lab A"}
        and set(kept["trial_correct"]) == {"yes"}
        and set(kept["trial_line"]) == {7}
    )
    assert kept["correct"].dtype == bool
    asked_for = pd.read_csv(tmp_path / "t.csv")
    shown = asked_for.iloc[kept["line"] - 2]  # as an editor counts: the header is line 1
    assert (shown["face_1"].to_numpy() == kept["face_1"].to_numpy()).all()


def test_the_tables_of_no_runs(tmp_path: Path) -> None:
    assert runs_table(finished_runs(tmp_path)).empty
    assert summary_table([]).empty
