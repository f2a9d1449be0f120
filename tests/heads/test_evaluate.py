"""Scores against slow loops, SciPy's own definitions and known answers."""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from featurestore import FeatureStore
from featurestore.intervals import accuracy
from heads.evaluation import audit_order, evaluate
from heads.features import Features
from heads.registry import draw_head
from heads.scores import accuracy_by, by_position, noise_ceiling, normalised, paired_test
from heads.trials.matching import Trials
from tests.heads.conftest import write_store


def raters(answers: np.ndarray) -> Trials:
    """``answers`` (triplets, raters), 0 … 2: as trials, each rater seeing the three in an order of their own."""
    rng = np.random.default_rng(0)
    items, odd, people = [], [], []
    for triplet, row in enumerate(answers):
        for person, answer in enumerate(row):
            order = rng.permutation(3)
            items.append(triplet * 3 + order)
            odd.append(int(np.flatnonzero(order == answer)[0]))
            people.append(f"p{person}")
    return Trials(np.array(items), np.array(odd), pd.DataFrame({"participant": people}), ("s",))


def test_the_ceiling_of_chance_is_chance() -> None:
    """Five raters who guess: in-sample majority would read .556."""
    ceiling = noise_ceiling(raters(np.random.default_rng(1).integers(0, 3, (3000, 5))))
    assert abs(ceiling.value - 1 / 3) < 0.012
    assert (ceiling.n, ceiling.triplets) == (15000, 3000)


def test_the_ceiling_equals_a_slow_loop() -> None:
    answers = np.random.default_rng(2).choice(3, (60, 4), p=(0.6, 0.3, 0.1))
    agreement = []
    for row in answers:
        for i in range(4):
            others = [answer for j, answer in enumerate(row) if j != i]
            most = max(others.count(k) for k in range(3))
            best = [k for k in range(3) if others.count(k) == most]
            agreement.append((row[i] in best) / len(best))
    assert noise_ceiling(raters(answers)).value == pytest.approx(np.mean(agreement))


def test_no_ceiling_without_repeats_and_a_rater_does_not_predict_themselves() -> None:
    assert noise_ceiling(raters(np.zeros((5, 1), int))) is None
    same = raters(np.zeros((5, 2), int))
    assert noise_ceiling(Trials(same.items, same.odd, pd.DataFrame({"participant": ["p"] * 10}), ("s",))) is None
    assert normalised(0.5, None) is None
    assert normalised(1 / 3, noise_ceiling(same)) == 0
    assert normalised(1.0, noise_ceiling(same)) == 1


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


def test_accuracy_by_face_counts_each_trial_once_per_face() -> None:
    table = pd.DataFrame({"face_1": ["a", "a", "b"], "face_2": ["a", "b", "c"], "face_3": ["b", "c", "d"]})
    scores = accuracy_by(table, np.array([True, False, True]), "face")
    assert scores["n"].to_dict() == {"a": 2, "b": 3, "c": 2, "d": 1}
    assert scores["value"].to_dict() == {"a": 0.5, "b": pytest.approx(2 / 3), "c": 0.5, "d": 1.0}


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
