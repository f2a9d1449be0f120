"""Scores against slow loops, SciPy's own definitions and known answers."""

import math
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from featurestore import FeatureStore
from featurestore.intervals import accuracy, accuracy_over, clustered_mean
from heads.evaluation import audit_order, evaluate
from heads.features import Features
from heads.registry import draw_head
from heads.scores import (
    CHANCE,
    accuracy_by,
    accuracy_by_face,
    agreement,
    by_position,
    ceiling_scores,
    clusters_of,
    difference,
    paired_test,
    score,
)
from heads.trials.tables import FACES, VIEWS
from tests.heads.conftest import write_store


def raters(answers: np.ndarray, faces: int | None = None) -> pd.DataFrame:
    """``answers`` (triplets, raters), 0 … 2: as trials, each rater seeing the three in an order of their own.

    The triplets are of different faces, or of ``faces`` drawn at random.
    """
    rng = np.random.default_rng(0)
    rows = []
    for triplet, row in enumerate(answers):
        three = triplet * 3 + np.arange(3) if faces is None else rng.choice(faces, 3, replace=False)
        for person, answer in enumerate(row):
            order = rng.permutation(3)
            shown = [f"face-{three[i]}" for i in order]
            position = int(np.flatnonzero(order == answer)[0])
            rows.append([*shown, "a", "a", "a", shown[position], position + 1, f"p{person}"])
    return pd.DataFrame(rows, columns=[*FACES, *VIEWS, "odd", "odd_position", "participant"])


def test_the_ceiling_of_chance_is_chance() -> None:
    """Five raters who guess: in-sample majority would read .556."""
    scores = ceiling_scores(raters(np.random.default_rng(1).integers(0, 3, (3000, 5))), None)
    assert abs(scores["ceiling"] - 1 / 3) < 0.012
    assert scores["n_repeated"] == 15000


def test_the_ceiling_equals_a_slow_loop() -> None:
    answers = np.random.default_rng(2).choice(3, (60, 4), p=(0.6, 0.3, 0.1))
    agrees = []
    for row in answers:
        for i in range(4):
            others = [answer for j, answer in enumerate(row) if j != i]
            most = max(others.count(k) for k in range(3))
            best = [k for k in range(3) if others.count(k) == most]
            agrees.append((row[i] in best) / len(best))
    assert agreement(raters(answers))[0] == pytest.approx(agrees)


def test_the_ceiling_and_the_accuracy_beside_it_are_of_the_same_answers() -> None:
    """200 hard triplets were repeated, 1,000 easy ones were not: .404 of one kind and .726 of all read "5.54 of ceiling"."""
    rng = np.random.default_rng(3)
    hard = raters(rng.choice(3, (60, 5), p=(0.6, 0.2, 0.2)), faces=40)
    easy = raters(rng.integers(0, 3, (1000, 1))).replace("^face", "other", regex=True)
    table = pd.concat([hard, easy], ignore_index=True)
    correct = np.concatenate([rng.random(300) < 0.5, rng.random(1000) < 0.8])
    scores = score(table, correct, CHANCE)
    ceiling, accuracy_repeated = np.nanmean(agreement(hard)[0]), correct[:300].mean()
    assert scores["n_repeated"] == 300
    assert scores["ceiling"] == pytest.approx(ceiling)
    assert scores["accuracy_repeated"] == pytest.approx(accuracy_repeated)
    assert scores["of_ceiling"] == pytest.approx((accuracy_repeated - CHANCE) / (ceiling - CHANCE))
    assert scores["of_ceiling_low"] < scores["of_ceiling"] < scores["of_ceiling_high"]
    assert scores["accuracy"] > 0.7 and scores["of_ceiling"] < 1


@pytest.mark.parametrize(
    ("table", "from_keys", "note"),
    [
        (raters(np.zeros((50, 1), int)), False, "0 test answers are to triplets that another participant answered"),
        (raters(np.zeros((10, 2), int)), False, "20 test answers .*, 10 of them; 30 answers to 10 triplets are needed"),
        (raters(np.zeros((2, 20), int)), False, "40 test answers .*, 2 of them; 30 answers to 10 triplets are needed"),
        (raters(np.zeros((50, 5), int)).assign(participant="p"), False, "0 test answers"),
        (raters(np.zeros((50, 5), int)), True, "made from the keys"),
        (
            raters(np.random.default_rng(0).integers(0, 3, (40, 3))),
            False,
            "cannot be told from chance|no more than by chance",
        ),
    ],
)
def test_a_ceiling_that_cannot_be_given_says_why(table: pd.DataFrame, from_keys: bool, note: str) -> None:
    scores = score(table, np.ones(len(table), bool), CHANCE, from_keys)
    assert re.search(note, scores["ceiling_note"])
    assert math.isnan(scores["of_ceiling_low"]) and math.isnan(scores["of_ceiling"])
    if from_keys:
        assert math.isnan(scores["ceiling"])


def judged_by_effects(
    rng: np.random.Generator, n: int, faces: int, people: int, spread: float
) -> tuple[pd.DataFrame, np.ndarray]:
    """Trials that are right with probability .6, more or less for each of its faces and its participant."""
    shown = np.array([rng.choice(faces, 3, replace=False) for _ in range(n)])
    who = rng.integers(people, size=n)
    p = 0.6 + (rng.normal(0, spread, faces)[shown]).sum(axis=1) + rng.normal(0, spread, people)[who]
    table = pd.DataFrame(shown.astype(str), columns=list(FACES)).assign(participant=who)
    return table, rng.random(n) < np.clip(p, 0, 1)


@pytest.mark.parametrize(
    ("n", "faces", "people", "spread"), [(420, 40, 20, 0.08), (420, 40, 20, 0.0), (200, 12, 10, 0.08)]
)
def test_the_interval_over_faces_covers_the_truth_as_often_as_it_says(
    n: int, faces: int, people: int, spread: float
) -> None:
    """Wilson's covers it far less often, where faces and participants matter."""
    rng = np.random.default_rng(4)
    covered = np.zeros(2)
    for _ in range(200):
        table, correct = judged_by_effects(rng, n, faces, people, spread)
        mean, wilson = clustered_mean(correct, list(clusters_of(table).values())), accuracy(correct)
        covered += [mean.low <= 0.6 <= mean.high, wilson.low <= 0.6 <= wilson.high]
    assert 0.91 <= covered[0] / 200 <= 0.995  # .95, give or take what 200 draws allow
    if spread:
        assert covered[1] / 200 < 0.8


def test_trials_that_share_a_cluster_are_counted_in_pairs_once() -> None:
    """The variance over clusters against a slow loop over all pairs of trials, one of which shows a face twice."""
    table, correct = judged_by_effects(np.random.default_rng(5), 60, 200, 100, 0.1)
    table.loc[0, "face_2"] = table.loc[0, "face_1"]
    off = correct - correct.mean()
    faces, people = table[list(FACES)].to_numpy(), table["participant"].to_numpy()
    shared = sum(
        off[i] * off[j]
        for i in range(60)
        for j in range(60)
        if i == j or set(faces[i]) & set(faces[j]) or people[i] == people[j]
    )
    counts = {face: (faces == face).any(axis=1) for face in np.unique(faces)} | {
        p: people == p for p in np.unique(people)
    }
    jackknife = sum((off[of].sum() ** 2) * (1 / (1 - of.mean()) ** 2 - 1) for of in counts.values())
    expected = math.sqrt(max(shared + jackknife, (off**2).sum())) / 60
    assert clustered_mean(correct, [faces, people]).standard_error == pytest.approx(expected, rel=1e-3)


def test_raters_who_always_agree_give_a_ceiling_without_an_interval() -> None:
    """Not 1.000 [1.000, 1.000]: nothing is known of the spread."""
    table = raters(np.zeros((40, 3), int))
    scores = score(table, np.arange(120) % 4 > 0, CHANCE)
    assert scores["ceiling"] == 1.0 and math.isnan(scores["ceiling_low"])
    assert "agree in every repeated triplet" in scores["ceiling_note"]
    assert scores["of_ceiling"] == pytest.approx((0.75 - CHANCE) / (1 - CHANCE))
    assert scores["of_ceiling_low"] < scores["of_ceiling"] < scores["of_ceiling_high"]


def test_heads_that_always_differ_have_no_p_of_nothing() -> None:
    table = raters(np.zeros((4, 1), int))
    always = difference(table, np.ones(4), np.zeros(4))
    assert always.value == 1.0 and math.isnan(always.p) and math.isnan(always.low)
    assert difference(table, np.ones(4), np.ones(4)).p == 1.0


def test_trials_that_show_a_face_twice_are_scored_apart() -> None:
    table = raters(np.zeros((40, 1), int))
    table.loc[:9, "face_2"] = table.loc[:9, "face_1"]
    correct = np.arange(40) < 20
    scores = score(table, correct, CHANCE)
    assert (scores["n_two_faces"], scores["accuracy_two_faces"]) == (10, 1.0)
    assert scores["accuracy_three_faces"] == pytest.approx(10 / 30)
    assert math.isnan(score(table[10:], correct[10:], CHANCE)["accuracy_three_faces"])


def test_two_participants_are_said_not_to_count() -> None:
    table = raters(np.zeros((20, 2), int))
    assert score(table, np.arange(40) % 2 == 0, CHANCE)["clusters"] == "60 faces, 2 participants not counted"
    assert score(table.assign(participant=""), np.ones(40, bool), CHANCE)["clusters"] == "60 faces"


def test_columns_of_the_trials_called_face_id_or_view_are_not_taken_for_ours() -> None:
    table = raters(np.zeros((20, 1), int)).assign(face_id="target", view="lab")
    correct = np.ones(20, bool)
    assert "target" not in accuracy_by_face(table, correct).index
    assert list(accuracy_by(table, correct, "view").index) == ["a"]


def test_two_clusters_say_nothing_of_their_spread() -> None:
    values, faces = np.array([1.0, 0.0, 1.0, 1.0]), [np.array(["a", "a", "b", "b"])]
    mean = clustered_mean(values, faces)
    assert mean.value == 0.75 and math.isnan(mean.low) and math.isnan(mean.p)
    assert math.isnan(accuracy_over(values, faces).low) and math.isnan(accuracy_over(values, faces).high)


def test_wilson_interval_by_its_formula() -> None:
    n, right, z = 40, 31, 1.959963984540054
    p = right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    score = accuracy(np.arange(n) < right)
    assert (score.low, score.high) == (pytest.approx(centre - half), pytest.approx(centre + half))


def test_paired_test_is_the_binomial_on_disagreements() -> None:
    a = np.array([1] * 50 + [1] * 12 + [0] * 3 + [0] * 20, bool)
    b = np.array([1] * 50 + [0] * 12 + [1] * 3 + [0] * 20, bool)
    result = paired_test(a, b)
    p = 2 * sum(math.comb(15, k) for k in range(4)) / 2**15
    assert (result.only_first, result.only_second) == (12, 3)
    assert result.p == pytest.approx(p)
    assert result.difference == pytest.approx(9 / 85)
    assert paired_test(a, a).p == 1
    with pytest.raises(ValueError, match="same trials"):
        paired_test(a, b[:3])


def test_accuracy_of_a_face_where_it_is_odd_and_where_it_is_merely_shown() -> None:
    rows = [["a", "b", "c", "a"], ["a", "b", "d", "b"], ["10", "9", "a", "a"]]
    table = pd.DataFrame(rows, columns=[*FACES, "odd"])
    scores = accuracy_by_face(table, np.array([True, False, True]))
    assert list(scores.index) == ["9", "10", "a", "b", "c", "d"]  # as people sort them
    assert scores.loc["a", ["when_odd", "n_when_odd", "when_shown", "n_when_shown"]].tolist() == [1.0, 2, 0.0, 1]
    assert scores.loc["b", ["when_odd", "n_when_odd", "when_shown", "n_when_shown"]].tolist() == [0.0, 1, 1.0, 1]
    assert math.isnan(scores.loc["c", "when_odd"]) and scores.loc["c", "n_when_odd"] == 0
    assert scores.loc["c", "when_shown_low"] < 1.0


def test_evaluate_equals_one_trial_at_a_time(tmp_path: Path) -> None:
    """Across two sources: every row comes from the right one."""
    path = write_store(tmp_path / "two.zarr", "a")
    write_store(path, "b", seed=4)
    parts = [FeatureStore.open(path).source(name).rows("fc7-relu") for name in ("a", "b")]
    features = Features(parts)
    head = draw_head("similarity", (400,), seed=0, rank=0)
    rng = np.random.default_rng(0)
    items = rng.integers(0, len(features), (1500, 3))
    rows = torch.cat([part.gather(range(len(part))) for part in parts])
    logits = evaluate(head, features, items)
    for i in (0, 7, 1023, 1024, 1499):
        plain = head(*(rows[item][None] for item in items[i]))
        assert np.allclose(logits[i], plain.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_statistics_of_rows(made: Path) -> None:
    rows = FeatureStore.open(made).source().rows("maxp_5_3")
    items = np.array([3, 3, 9, 50, 77, 101])
    mean, scale = Features([rows]).statistics(items)
    plain = rows.gather([3, 9, 50, 77, 101]).flatten(1).double()
    assert np.allclose(mean, plain.mean(0), rtol=1e-5)
    assert scale == pytest.approx(1 / float((plain - plain.mean(0)).square().mean().sqrt()), rel=1e-5)


def test_statistics_of_large_rows_in_half_precision(tmp_path: Path) -> None:
    """Activations of hundreds are ordinary, and their squares are more than float16 can hold."""
    path = write_store(tmp_path / "half.zarr", dtype="float16", times=100.0)
    rows = FeatureStore.open(path).source().rows("fc7-relu")
    plain = rows.gather(range(120)).double()
    mean, scale = Features([rows]).statistics(np.arange(120))
    assert float(plain.max()) > 1000
    assert np.allclose(mean, plain.mean(0), rtol=1e-4)
    assert scale == pytest.approx(1 / float((plain - plain.mean(0)).square().mean().sqrt()), rel=1e-4)


def test_the_order_audit_finds_a_head_that_answers_by_place(made: Path) -> None:
    features = Features([FeatureStore.open(made).source().rows("fc7-relu")])
    rng = np.random.default_rng(0)
    items = np.array([rng.choice(120, 3, replace=False) for _ in range(200)])
    odd = rng.integers(0, 3, 200)
    fair = audit_order(draw_head("zero-shot", (400,), 0), features, items, odd)
    assert fair.consistent == 1
    assert np.ptp(fair.positions["value"]) == 0
    biased = draw_head("conv", (400,), 0)
    biased.logits = lambda rows, examples, generator=None: torch.tensor([[2.0, 1.0, 0.0]]).repeat(len(examples), 1)  # type: ignore[method-assign]
    audit = audit_order(biased, features, items, odd)
    assert audit.consistent == 0
    assert audit.positions["value"].tolist() == [1, 0, 0]
    assert audit.positions["answered"].tolist() == [1, 0, 0]
    assert by_position(odd, odd)["value"].tolist() == [1, 1, 1]


def test_zero_shot_equals_a_slow_loop_over_pairs(made: Path) -> None:
    rows = FeatureStore.open(made).source().rows("fc7-relu")
    items = np.array([[0, 5, 9], [100, 3, 60], [7, 8, 119]])
    chosen = evaluate(draw_head("zero-shot", (400,), 0), Features([rows]), items).argmax(1)
    x = rows.gather(range(120)).numpy().astype(float)
    for three, odd in zip(items, chosen, strict=True):
        alike = {}
        for a, b in combinations(range(3), 2):
            u, v = x[three[a]], x[three[b]]
            alike[3 - a - b] = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
        assert odd == max(alike, key=alike.get)
