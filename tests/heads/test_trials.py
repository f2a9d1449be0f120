"""Trials: read in the forms people have, matched by key, refused where they make no sense."""

import gzip
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from featurestore import FeatureStore, FeatureStoreError
from featurestore.conditions import rows_that_meet
from heads.splits import KINDS, Split, draw_split, split_trials
from heads.trials.matching import Sessions, Trials, load_trials, match
from heads.trials.same_person import same_person_trials
from heads.trials.tables import FACES, VIEWS
from tests.heads.conftest import write_store, write_trials


def trials_from(made: Path, tmp_path: Path, rows: list[dict], name: str = "t.csv", **options) -> Trials:
    pd.DataFrame(rows).to_csv(tmp_path / name, index=False)
    return load_trials(tmp_path / name, FeatureStore.open(made), **options)


def row(a: str = "face-001", b: str = "face-002", c: str = "face-003", odd: str = "face-002", **more) -> dict:
    return {"face_1": a, "face_2": b, "face_3": c, "odd": odd, **more}


def test_items_are_found_by_key_in_every_line(made: Path, judged: Path) -> None:
    trials = load_trials(judged, FeatureStore.open(made))
    keys, table = FeatureStore.open(made).source().keys, pd.read_csv(judged)
    assert len(trials) == len(table) == 900
    for place, (face, view) in enumerate(zip(FACES, VIEWS, strict=True)):
        assert [keys[i] for i in trials.items[:, place]] == list(zip(table[face], table[view], strict=True))
    odd = trials.table[list(FACES)].to_numpy()[np.arange(900), trials.odd]
    assert (odd == table["odd"]).all()


def test_published_numbers_match_faces_that_end_in_them_and_time_outs_are_left_out(made: Path, tmp_path: Path) -> None:
    rows = [
        {"head1": 1, "head2": 12, "head3": 30, "head_odd": 12, "session": "2D"},
        {"head1": 4, "head2": 5, "head3": 6, "head_odd": 0, "session": "2D"},
        {"head1": 4, "head2": 5, "head3": 6, "head_odd": None, "session": "3D"},
        {"head1": 3, "head2": 2, "head3": 1, "head_odd": 3, "session": "3D"},
    ]
    views = Sessions({"2D": "frontal", "3D": "left"}, {})
    trials = trials_from(made, tmp_path, rows, sessions=views)
    assert trials.unanswered == 2
    keys = FeatureStore.open(made).source().keys
    assert [keys[i] for i in trials.items[0]] == [(f"face-{n:03d}", "frontal") for n in (1, 12, 30)]
    assert [keys[i] for i in trials.items[1]] == [(f"face-{n:03d}", "left") for n in (3, 2, 1)]
    assert trials.odd.tolist() == [1, 0]


def test_parquet_reads_as_csv_does(made: Path, judged: Path, tmp_path: Path) -> None:
    pd.read_csv(judged).to_parquet(tmp_path / "trials.parquet")
    store = FeatureStore.open(made)
    assert load_trials(tmp_path / "trials.parquet", store).hash == load_trials(judged, store).hash


def test_a_session_can_be_a_source_of_its_own(made: Path, tmp_path: Path) -> None:
    path = write_store(tmp_path / "two.zarr", "still")
    write_store(path, "moving", seed=1)
    rows = [row(session="2D"), row(odd="face-001", session="3D"), row(session="2D")]
    trials = trials_from(path, tmp_path, rows, view="frontal", sessions=Sessions({}, {"2D": "still", "3D": "moving"}))
    assert len(trials.sources) == 2
    n = FeatureStore.open(path).source("still").n_items
    number = trials.sources.index(FeatureStore.open(path).source("moving").name)
    assert (trials.items[1] // n == number).all()
    assert (trials.items[[0, 2]] // n == 1 - number).all()
    assert trials.odd.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("condition", "left"),
    [("gender == 'female'", 1), ("session == '3D'", 2), ("yaw <= 0", 3), ("response_time < 2", 1)],
)
def test_conditions_on_trials_and_on_items(made: Path, tmp_path: Path, condition: str, left: int) -> None:
    rows = [
        row("face-001", "face-003", "face-005", "face-003", session="2D", response_time=1.0),
        row(session="3D", response_time=3.0),
        row(session="3D", response_time=4.0),
    ]
    trials = trials_from(made, tmp_path, rows, view="frontal", where=[condition])
    assert len(trials) == left
    if "female" in condition:  # odd numbers are the female ones: of all three
        assert trials.table["face_1"].tolist() == ["face-001"]


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [row(odd="face-004")],
            {},
            r"1 of 1 trials are faulty.*\n  1 name an odd face .* three: 'face-004' \(line 2\)",
        ),
        (
            [row(), row("face-001", "face-001", "face-002", "face-001")],
            {},
            r"shown twice; .*odd_position.*anna.*\(line 3\)",
        ),
        ([row("face-999")], {}, r"1 name a face that is not in .*'face-999'"),
        ([row(), row("99", odd="99")], {}, r"'99'"),
        ([row()], {"view": None}, r"which view was shown, .* has 4: .*`view` frontal"),
        ([row()], {"view": "behind"}, r"1 show an item .*'face-001/behind'"),
        ([row()], {"where": ["gender == 'f'"]}, r"no trial"),
        ([row()], {"where": ["colour == 'red'"]}, r"names no column"),
        ([row(rt=1)], {"where": ["rt + 1"]}, r"is no condition"),
        ([row(rt=1)], {"where": ["rt <"]}, r"cannot be evaluated"),
        ([{"face_1": "a", "face_2": "b", "odd": "a"}], {}, r"no column face_3"),
        ([row(session="4D")], {"view": None, "sessions": Sessions({"2D": "frontal"}, {})}, r"session for which .*'4D'"),
        ([row()], {"view": None, "sessions": Sessions({"2D": "frontal"}, {})}, r"no column session"),
        ([row(odd="")], {}, r"no trials with an answer"),
    ],
)
def test_bad_trials_are_refused_with_the_line_and_the_way_out(
    made: Path, tmp_path: Path, rows: list[dict], options: dict, message: str
) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        trials_from(made, tmp_path, rows, **{"view": "frontal", **options})


SAME = ("face-001", "face-001", "face-002")
SEEN = {"view_1": "frontal", "view_2": "left", "view_3": "up"}


@pytest.mark.parametrize(
    ("answer", "place"),
    [
        ({"odd": "face-001", "odd_position": 2}, 1),
        ({"odd": "face-001", "odd_position": 1}, 0),
        ({"odd": "face-001", "odd_view": "left"}, 1),
        ({"odd": "", "odd_position": 3}, 2),
        ({"odd": "face-002", "odd_position": ""}, 2),
        ({"odd": "1", "odd_position": 2, "odd_view": "left"}, 1),
    ],
)
def test_a_face_shown_twice_is_odd_in_one_place(made: Path, tmp_path: Path, answer: dict, place: int) -> None:
    trials = trials_from(made, tmp_path, [{**row(*SAME), **SEEN, **answer}])
    assert trials.odd.tolist() == [place]
    assert trials.table["odd"].tolist() == [SAME[place]]
    assert trials.table["odd_position"].tolist() == [place + 1]


def test_which_of_two_pictures_was_odd_is_part_of_what_was_asked(made: Path, tmp_path: Path) -> None:
    """Otherwise a run on the one would be taken for a run on the other."""
    hashes = {
        trials_from(made, tmp_path, [{**row(*SAME, odd="face-001"), **SEEN, "odd_position": i}]).hash for i in (1, 2)
    }
    assert len(hashes) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"odd": "face-001", "odd_position": 3}, r"1 contradict themselves: .*'face-001' \(line 2\)"),
        ({"odd": "face-001", "odd_position": 4}, r"an odd_position that is not 1, 2 or 3: '4'"),
        ({"odd": "face-001", "odd_position": "left"}, r"an odd_position that is not 1, 2 or 3: 'left'"),
        ({"odd": "face-001", "odd_view": "up"}, r"an odd_view in which the odd face was not shown: 'up'"),
        ({"odd": "face-001"}, r"shown twice; say which with odd_position"),
    ],
)
def test_answers_that_contradict_themselves(made: Path, tmp_path: Path, answer: dict, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        trials_from(made, tmp_path, [{**row(*SAME), **SEEN, **answer}])


FAULTY = """face_1,face_2,face_3,odd,note
face-001,face-002,face-003,face-002,good
face-001,face-002,face-999,face-002,"a note
on two lines"
face-001,face-002,face-003,face-009,

face-001,face-002,face-003,face-001,good
face-001,face-002,face-003
face-001,face-998,face-003,face-001,
face-001,face-002,face-003,,no answer
"""


def test_all_faults_of_a_file_are_told_at_once_by_kind_and_line(made: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(FAULTY)
    store = FeatureStore.open(made)
    with pytest.raises(FeatureStoreError) as raised:
        load_trials(tmp_path / "t.csv", store, view="frontal")
    told = str(raised.value)
    assert "4 of 6 trials are faulty" in told
    assert re.search(r"2 name a face that is not in .*: 'face-999', 'face-998' \(lines 3, 9\)", told)
    assert re.search(r"1 name an odd face that is not one of the three: 'face-009' \(line 5\)", told)
    assert re.search(r"1 have more or fewer fields than the header's 5 \(line 8\)", told)
    assert "`on_error` skip" in told


def test_faulty_trials_can_be_left_out_and_are_kept(made: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(FAULTY)
    trials = load_trials(tmp_path / "t.csv", FeatureStore.open(made), view="frontal", on_error="skip")
    assert trials.table["line"].tolist() == [2, 7]
    assert trials.table["note"].tolist() == ["good", "good"]
    assert (len(trials.faulty), trials.unanswered, trials.excluded) == (4, 1, 0)
    assert trials.faulty["line"].tolist() == [3, 5, 8, 9]
    assert trials.faulty["fault"].str.contains("face-999").tolist() == [True, False, False, False]
    (tmp_path / "t.csv").write_text("face_1,face_2,face_3,odd\na,b,c,a\n")
    with pytest.raises(FeatureStoreError, match="No trial is left"):
        load_trials(tmp_path / "t.csv", FeatureStore.open(made), view="frontal", on_error="skip")


def test_faulty_rows_are_faulty_whatever_the_conditions(made: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(FAULTY)
    store = FeatureStore.open(made)
    with pytest.raises(FeatureStoreError, match="more or fewer fields"):
        load_trials(tmp_path / "t.csv", store, view="frontal", where=["note == 'good'"])
    trials = load_trials(tmp_path / "t.csv", store, view="frontal", where=["note == 'good'"], on_error="skip")
    assert trials.table["line"].tolist() == [2, 7] and trials.faulty["line"].tolist() == [8]


def test_conditions_are_on_the_columns_as_the_file_calls_them(made: Path, tmp_path: Path) -> None:
    rows = [row(line=7, fault="x", source="lab A"), row(line=8, fault="y", source="lab B")]
    for condition in ("line == 8", "fault == 'y'", "source == 'lab B'"):
        trials = trials_from(made, tmp_path, rows, view="frontal", where=[condition])
        assert trials.table["trial_line"].tolist() == [8]
        assert trials.table["line"].tolist() == [3]


def test_participants_are_read_as_they_are_written(made: Path, tmp_path: Path) -> None:
    names = ["NA", "None", "007", "7", "r1 ", "r1"]
    table = pd.DataFrame([row(participant=name, code="0012") for name in names])
    table.to_csv(tmp_path / "t.csv", index=False)
    trials = load_trials(tmp_path / "t.csv", FeatureStore.open(made), view="frontal")
    assert trials.table["participant"].tolist() == ["NA", "None", "007", "7", "r1", "r1"]
    assert trials.table["code"].tolist() == ["0012"] * 6


def test_a_face_may_be_called_na_or_007(tmp_path: Path) -> None:
    path = write_store(tmp_path / "s.zarr", faces=["NA", "007", *(f"f{i}" for i in range(28))])
    (tmp_path / "t.csv").write_text("face_1,face_2,face_3,odd\nNA,007,f1,NA\n")
    trials = load_trials(tmp_path / "t.csv", FeatureStore.open(path), view="frontal")
    assert trials.table[[*FACES, "odd"]].to_numpy().tolist() == [["NA", "007", "f1", "NA"]]


def test_files_that_are_no_tables(made: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b"\x00\xff\xfe binary")
    (tmp_path / "t.parquet").write_bytes(b"not parquet")
    for name in ("t.csv", "t.parquet", "absent.csv"):
        with pytest.raises(FeatureStoreError, match=name):
            load_trials(tmp_path / name, FeatureStore.open(made))


def test_same_person_trials_show_one_face_twice(made: Path) -> None:
    store = FeatureStore.open(made)
    table = same_person_trials(store.source(), 300, seed=1)
    trials = match(table, store)
    for line, odd in zip(trials.table.itertuples(), trials.odd, strict=True):
        faces = [line.face_1, line.face_2, line.face_3]
        views = [line.view_1, line.view_2, line.view_3]
        a, b = (i for i in range(3) if i != odd)
        assert faces[a] == faces[b] != faces[odd]
        assert views[a] != views[b]
    assert set(np.bincount(trials.odd) > 70) == {True}
    assert table.equals(same_person_trials(store.source(), 300, seed=1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_split_is_the_same_whatever_is_trained(made: Path, judged: Path, kind: str, tmp_path: Path) -> None:
    trials = load_trials(judged, FeatureStore.open(made))
    first = split_trials(trials, kind, seed=3, fractions=(0.5, 0.25, 0.25))
    np.random.seed(1)
    again = split_trials(trials, kind, seed=3, fractions=(0.5, 0.25, 0.25))
    other = split_trials(trials, kind, seed=4, fractions=(0.5, 0.25, 0.25))
    assert first.hash == again.hash != other.hash
    loaded = Split.load(first.save(tmp_path), trials.hash, len(trials))
    assert loaded.hash == first.hash
    assert np.array_equal(loaded.part, first.part)
    parts = [set(first.indices(name)) for name in ("train", "validation", "test")]
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


@pytest.mark.parametrize(("kind", "columns"), [("face", FACES), ("view", VIEWS)])
def test_no_face_or_view_of_the_test_is_in_training(
    made: Path, judged: Path, kind: str, columns: tuple[str, ...]
) -> None:
    trials = load_trials(judged, FeatureStore.open(made))
    split = split_trials(trials, kind, seed=0, fractions=(0.5, 0.25, 0.25))
    shown = [
        set(trials.table.iloc[split.indices(name)][list(columns)].to_numpy().ravel())
        for name in ("train", "validation", "test")
    ]
    assert all(shown)
    assert not shown[0] & shown[2] and not shown[0] & shown[1] and not shown[1] & shown[2]


def test_all_answers_to_one_triplet_fall_into_one_part(made: Path, tmp_path: Path) -> None:
    write_trials(tmp_path / "t.csv", 300, raters=5)
    trials = load_trials(tmp_path / "t.csv", FeatureStore.open(made))
    split = split_trials(trials, "trial", seed=0)
    part = pd.Series(split.part).groupby([str(sorted(three)) for three in trials.items.tolist()]).nunique()
    assert (part == 1).all()
    assert np.allclose(np.bincount(split.part) / 300, (0.7, 0.15, 0.15), atol=0.02)


def test_held_out_views_are_the_test(made: Path, judged: Path) -> None:
    trials = load_trials(judged, FeatureStore.open(made))
    split = split_trials(trials, "view", 0, (0.6, 0.2, 0.2), test=["frontal"])
    assert set(trials.table.iloc[split.indices("test")][list(VIEWS)].to_numpy().ravel()) == {"frontal"}


@pytest.mark.parametrize(
    ("labels", "fractions", "message"),
    [
        ([["a"], ["b"]], (0.7, 0.15, 0.15), "too few"),
        ([["a"], ["b"], ["c"]], (0.7, 0.2, 0.2), "add up to 1"),
        ([["a"], ["b"], ["c"]], (1.0, 0.0, 0.0), "add up to 1"),
        ([["a", "b"], ["b", "c"], ["a", "c"]], (0.4, 0.3, 0.3), "part of the split by face is empty"),
    ],
)
def test_splits_that_cannot_be(labels: list, fractions: tuple, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        draw_split(np.array(labels), "face", 0, fractions, "of")


def test_a_changed_or_foreign_split_file_is_refused(made: Path, judged: Path, tmp_path: Path) -> None:
    trials = load_trials(judged, FeatureStore.open(made))
    path = split_trials(trials, "trial", 0).save(tmp_path)
    with pytest.raises(FeatureStoreError, match="drawn for other examples"):
        Split.load(path, "0" * 64, len(trials))
    text = path.read_text()
    path.write_text(text.replace('"test": [', '"test": [0, '))
    with pytest.raises(FeatureStoreError, match="changed after it was written"):
        Split.load(path, trials.hash, len(trials))
    path.write_text("[]")
    with pytest.raises(FeatureStoreError, match="is not a split"):
        Split.load(path, trials.hash, len(trials))


def test_text_is_not_compared_with_numbers(made: Path, tmp_path: Path) -> None:
    """``participant != 3`` would hold for every text, and leave nobody out."""
    rows = [row(participant=i % 4, code=f"c{i}") for i in range(8)]
    assert len(trials_from(made, tmp_path, rows, view="frontal", where=["participant != 3"])) == 6
    with pytest.raises(FeatureStoreError, match=r"code with a number, but it holds text, such as 'c0'"):
        trials_from(made, tmp_path, rows, view="frontal", where=["code != 3"])
    with pytest.raises(FeatureStoreError, match="face_1 with a number"):
        trials_from(made, tmp_path, rows, view="frontal", where=["face_1 not in [1]"])
    heads = [{"head1": 1, "head2": 2, "head3": 3, "head_odd": odd} for odd in (1, 0, 2)]
    trials = trials_from(made, tmp_path, heads, view="frontal", where=["head_odd != 2"])
    assert (len(trials), trials.unanswered, trials.excluded) == (1, 1, 1)


@pytest.mark.parametrize(
    "condition",
    [
        "rt.to_csv('{folder}/F')",
        "rt.__class__ == 1",
        "rt == __import__('os').getpid()",
        "rt == @pd",
        "rt[0] == 1",
        "(lambda: rt)() == 1",
        "rt == 1 if rt else 2",
        "9**9**9 > rt",
        "(rt**9)**9 > 1",
        "rt < 'a' * 10**9",
        "code * 1000000000 == 'a'",
        "code == '%999999999d' % 7",
        "rt in [1] * 10**9",
        "rt == 1 << 9**9",
        "rt" + " < rt" * 15_000,
        "rt > 1" + " + 1" * 20_000,
        "rt > " + "-" * 50_000 + "1",
        "rt > " + "9" * 5_000,
    ],
    ids=lambda condition: condition[:20],
)
def test_conditions_are_comparisons_and_nothing_else(tmp_path: Path, condition: str) -> None:
    table = pd.DataFrame({"rt": [1.0, 2.0], "code": ["a", "b"]})
    with pytest.raises(
        FeatureStoreError, match=r"(?s)^`where` .{1,300}(A condition consists of|is no condition|than 500 times)"
    ):
        rows_that_meet(condition.replace("{folder}", str(tmp_path)), table)
    assert not (tmp_path / "F").exists()


@pytest.mark.parametrize(
    ("condition", "meets"),
    [
        ("rt > 1 & code == 'b' | `a b` == 5", [True, True, False]),
        ("not (rt > 1) or ~ok", [True, False, True]),
        ("ok", [True, True, False]),
        ("1 < rt <= 3", [False, True, True]),
        ("code in ['a', 'c'] and rt not in (3, 4)", [True, False, False]),
        ("(rt + 1) ** 2 - `a b` % 2 > -rt * 2 / 1 + 9", [False, True, True]),
        ("code != 'rt.x() & `a b`'", [True, True, True]),
        ("rt == rt and index >= 1", [False, True, True]),
    ],
)
def test_what_conditions_may_say(condition: str, meets: list[bool]) -> None:
    table = pd.DataFrame({"rt": [1.0, 2.0, 3.0], "code": ["a", "b", "c"], "a b": [5, 6, 7], "ok": [True, True, False]})
    assert rows_that_meet(condition, table).tolist() == meets


def test_face_zero_is_a_face_where_faces_count_from_zero(tmp_path: Path) -> None:
    path = write_store(tmp_path / "zero.zarr", faces=[str(i) for i in range(30)])
    rows = [{"head1": 0, "head2": 1, "head3": 2, "head_odd": 0}, {"head1": 3, "head2": 1, "head3": 2, "head_odd": 1}]
    trials = trials_from(path, tmp_path, rows, view="frontal")
    assert trials.odd.tolist() == [0, 1]


def test_a_table_in_any_order_keeps_items_and_labels_together(made: Path, judged: Path) -> None:
    store = FeatureStore.open(made)
    table = pd.read_csv(judged).sample(frac=1, random_state=0)
    trials = match(table, store)
    keys = store.source().keys
    odd = [keys[item][0] for item in trials.items[np.arange(len(trials)), trials.odd]]
    assert odd == trials.table["odd"].tolist() == table["odd"].tolist()


def test_options_without_effect_are_refused(made: Path, judged: Path) -> None:
    store = FeatureStore.open(made)
    with pytest.raises(FeatureStoreError, match="leave `view` and the views of sessions out"):
        load_trials(judged, store, view="frontal")
    with pytest.raises(FeatureStoreError, match="not both"):
        load_trials(judged, store, view="frontal", sessions=Sessions({"2D": "left"}, {}))


def test_damaged_archives_are_said_so(made: Path, judged: Path, tmp_path: Path) -> None:
    packed = gzip.compress(judged.read_bytes())
    (tmp_path / "short.csv.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "wrong.csv.gz").write_bytes(packed[:40] + b"\xff" * 50 + packed[90:])
    for name in ("short.csv.gz", "wrong.csv.gz"):
        with pytest.raises(FeatureStoreError, match=f"{name} cannot be read"):
            load_trials(tmp_path / name, FeatureStore.open(made))


def test_faces_of_thousands_of_digits_are_faulty(made: Path, tmp_path: Path) -> None:
    rows = [row(), row(a="9" * 5000)]
    with pytest.raises(FeatureStoreError, match=r"1 name a face that is not in .*'9+… \(5,002 characters\)") as raised:
        trials_from(made, tmp_path, rows, view="frontal")
    assert len(str(raised.value)) < 1500


def test_a_condition_on_a_table_without_rows(made: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("face_1,face_2,face_3,odd,rt\n")
    with pytest.raises(FeatureStoreError, match="compares odd with a number, but it holds text"):
        load_trials(tmp_path / "t.csv", FeatureStore.open(made), view="frontal", where=["odd == 3"])


def test_a_table_of_trials_with_more_columns_than_any_has(made: Path, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("face_1,face_2,face_3,odd" + ",x" * 100_000 + "\n")
    with pytest.raises(FeatureStoreError, match="it has 100,004 columns, more than 5,000"):
        load_trials(tmp_path / "t.csv", FeatureStore.open(made))
