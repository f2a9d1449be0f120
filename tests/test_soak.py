"""A small dose of the soak (``python -m tests.soak``), and that it notices what it is there to notice."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from featurestore.errors import FeatureStoreError
from tests.commands import FORKS
from tests.soak.__main__ import main
from tests.soak.cases import KINDS, make_case, read_seeds
from tests.soak.workers import READ, REFUSED, Outcome, Watch, _memory, _read, make_seeds

CASES = 25  # of each kind
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="memory is measured as Linux tells it"),
    pytest.mark.xdist_group("soak"),
]


def in_a_process(function, *arguments) -> int | None:
    process = FORKS.Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode


def test_a_small_dose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is damaged is read or refused, in little memory, and nothing runs. Time is for the soak itself to judge."""
    monkeypatch.setattr("tests.soak.workers.MOST_SECONDS", 300.0)
    done = CliRunner().invoke(main, ["fuzz", "--n", str(CASES), "--workers", "1", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.output.endswith("0 findings.\n")
    counts = [line.split()[1:3] for line in done.output.splitlines() if line.startswith("  ")][1:]
    assert len(counts) == len(KINDS)
    assert all(int(read) and int(refused) and int(read) + int(refused) == CASES for read, refused in counts)


def test_a_case_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    both = tmp_path / "one", tmp_path / "other"
    for folder in both:
        assert in_a_process(make_seeds, folder) == 0
    for kind in KINDS:
        one, other = (read_seeds(folder / kind) for folder in both)
        assert one == other
        assert make_case(kind, 7, 0, one) == make_case(kind, 7, 0, other)
        assert make_case(kind, 7, 0, one) != make_case(kind, 7, 1, one)


def test_one_case_again() -> None:
    done = CliRunner().invoke(main, ["again", "--kind", "images", "--case", "0"])
    assert done.exit_code == 0, done.output


def outcome_of(read, watch: Watch, folder: Path) -> Outcome:
    return _read(read, watch, folder, _memory("VmRSS"))


def notices(folder: Path) -> None:
    """In a process of its own: an audit hook cannot be taken off again."""
    watch, outside, inside = Watch(), folder.parent / "outside", folder / "inside"

    def refuse() -> None:
        raise FeatureStoreError("no")

    assert outcome_of(lambda: None, watch, folder).what == READ
    assert outcome_of(refuse, watch, folder).what == REFUSED
    assert outcome_of(lambda: inside.write_text("a"), watch, folder).what == READ
    assert outcome_of(lambda: np.ones(1 << 28), watch, folder).what == "over 1 GiB"
    assert outcome_of(lambda: np.ones(1 << 20), watch, folder).what == READ  # what was freed is forgotten
    failed = outcome_of(lambda: int("a"), watch, folder)
    assert failed.what == "other exception" and failed.detail.startswith("ValueError at ")
    assert outcome_of(lambda: outside.write_text("a"), watch, folder).what == "wrote outside"
    for run in (lambda: os.system(f"touch {outside}"), lambda: subprocess.run(["touch", outside]), os.fork):
        assert outcome_of(run, watch, folder).what == "ran code"
    assert not outside.exists()


def test_what_it_notices(tmp_path: Path) -> None:
    folder = tmp_path / "case"
    folder.mkdir()
    assert in_a_process(notices, folder) == 0
