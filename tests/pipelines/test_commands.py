"""The commands as a user types them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest

from featurestore import FeatureStore
from pipelines._cli import Command, LogLines
from pipelines._params import Expression
from tests.commands import ROOT, command
from tests.conftest import write_photographs

SCRIPTS = sorted(path.stem for path in (ROOT / "pipelines").glob("[a-z]*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_examples(script: str) -> None:
    done = command(script, "--help")
    assert done.returncode == 0
    examples = done.stdout.partition("\nExamples:\n")[2]
    assert f"\n  python pipelines/{script}.py" in examples  # on a line of its own, as it is to be typed
    assert "\\b" not in examples


def test_layers_take_names_up_to_the_next_option(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 2, 1)
    options = ["--images", images, "--weights", "random:0", "--store", tmp_path / "s.zarr"]
    done = command("cache_layers", "--layers", "maxp_1_2", "relu_1_1", *options)
    assert done.returncode == 0, done.stderr
    assert "random numbers, not a trained network" in done.stdout
    assert list(FeatureStore.open(tmp_path / "s.zarr").layers) == ["relu_1_1", "maxp_1_2"]


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        (["--names", "a", "b"], ["a", "b"]),
        (["--names", "a,b"], ["a", "b"]),
        (["--names", "a, b", "c,", "--numbers", "1"], ["a", "b", "c"]),
        (["--names=a,b", "c"], ["a", "b", "c"]),
        (["--names", "Smith\\,Anna,b"], ["Smith,Anna", "b"]),
        (["--names", "a", "--names", "b,c"], ["a", "b", "c"]),
        (["rest,of", "--names", "a"], ["a"]),
    ],
)
def test_commas_separate_names(typed: list[str], names: list[str]) -> None:
    assert parsed(typed)["names"] == tuple(names)


def test_commas_separate_numbers_but_not_what_holds_them_itself() -> None:
    given = parsed(
        ["--numbers", "1,2", "3", "--where", "view in ['a', 'b']", "x, y", "--files", "a,b.csv", "--regex", "a{1,2}"]
    )
    assert given["numbers"] == (1, 2, 3)
    assert given["where"] == ("view in ['a', 'b']", "x, y")
    assert given["files"] == ("a,b.csv",)
    assert given["regex"] == "a{1,2}"


def parsed(line: list[str]) -> dict[str, object]:
    """What a command with an option of each kind makes of a line."""

    @click.command(cls=Command)
    @click.option("--names", multiple=True)
    @click.option("--numbers", multiple=True, type=int)
    @click.option("--where", multiple=True, type=Expression())
    @click.option("--files", multiple=True, type=click.Path())
    @click.option("--regex")
    @click.argument("rest", nargs=-1)
    def given(**values: object) -> None:
        pass

    return given.make_context("given", line).params


def test_a_log_file_sees_progress_soon_and_then_every_half_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    with LogLines(100, "computing", " images", clock=lambda: now[0]) as lines:
        for second in range(1, 101):
            now[0] = second
            lines.update()
    assert capsys.readouterr().err.splitlines() == [
        "computing: 3 of 100 images in 3 s, about 97 s left",
        "computing: 33 of 100 images in 33 s, about 67 s left",
        "computing: 63 of 100 images in 63 s, about 37 s left",
        "computing: 93 of 100 images in 93 s, about 7 s left",
        "computing: 100 of 100 images in 2 min",
    ]


def test_a_log_file_has_no_bar(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 1, 2)
    options = ["--images", images, "--weights", "random:0", "--store", tmp_path / "s.zarr"]
    done = command("cache_layers", "--layers", "relu_1_1", *options)
    assert done.stderr.startswith("computing: 2 of 2 images in ")
    assert "\r" not in done.stderr and "%" not in done.stderr


def test_layers_with_a_comma_between_them(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 1, 1)
    options = ["--images", images, "--weights", "random:0", "--store", tmp_path / "s.zarr", "--dry-run"]
    done = command("cache_layers", "--layers", "maxp_1_2,relu_1_1", *options)
    assert done.returncode == 0, done.stderr
    assert "maxp_1_2  64×112×112" in done.stdout
    assert "relu_1_1  64×224×224" in done.stdout


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 2, 1)
    done = command(
        "cache_layers",
        "--dry-run",
        "--images",
        images,
        "--weights",
        "random:0",
        "--store",
        tmp_path / "s.zarr",
        "--layers",
        "all",
    )
    assert done.returncode == 0, done.stderr
    assert "fc8" in done.stdout
    assert "2 images to compute" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]


def test_layers_are_listed_with_their_sizes() -> None:
    done = command("cache_layers", "--list-layers")
    lines = done.stdout.splitlines()
    assert lines[1].split()[:3] == ["conv_1_1", "64×224×224", "12,845,056"]
    assert any(line.startswith("39 layers") for line in lines)  # the 38 published ones and the descriptor


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "maxp_5_4", "--images", "{images}", "--weights", "random:0"], "Did you mean maxp_5_3"),
        (["--layers", "maxp_1_2", "--images", "{images}"], "--weights is missing"),
        (["--images", "{images}"], "--layers is missing"),
        (
            ["--layers", "maxp_1_2", "--images", "{images}/nowhere", "--weights", "random:0"],
            "there is no folder or CSV",
        ),
        (
            ["--layers", "maxp_1_2", "--images", "{images}", "--weights", "random:0", "--recipe", "vggface-bgrr"],
            "Did you mean vggface-bgr",
        ),
        (
            ["--layers", "maxp_1_2", "--images", "{images}", "--weights", "random:0", "--device", "tpu"],
            "'tpu' is not one of",
        ),
    ],
)
def test_what_is_typed_wrong_gets_a_message_and_a_status(tmp_path: Path, arguments: list[str], message: str) -> None:
    images = write_photographs(tmp_path / "p", 1, 1)
    store = tmp_path / "s.zarr"
    done = command("cache_layers", *[argument.format(images=images) for argument in arguments], "--store", store)
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not store.exists()


def test_skipped_photographs_are_listed_at_the_end(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 2, 2)
    (images / "f1" / "2.png").write_bytes(b"not a picture")
    arguments = ["--layers", "relu_1_1", "--images", images, "--weights", "random:0", "--store", tmp_path / "s.zarr"]
    stopped = command("cache_layers", *arguments)
    assert stopped.returncode == 1
    assert "('f1', '2')" in stopped.stderr
    assert "--on-error skip" in stopped.stderr
    skipped = command("cache_layers", *arguments, "--on-error", "skip")
    assert skipped.returncode == 0
    assert "1 photographs were left out" in skipped.stderr.splitlines()[-2]
    assert "f1/2.png" in skipped.stderr.splitlines()[-1]


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 1, 1)
    (tmp_path / "file").write_text("in the way")
    done = command(
        "cache_layers",
        "--layers",
        "relu_1_1",
        "--images",
        images,
        "--weights",
        "random:0",
        "--store",
        tmp_path / "file" / "s.zarr",
    )
    assert done.returncode == 1
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(
    os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may write anywhere, and there is no setpriv"
)
def test_a_read_only_store(tmp_path: Path) -> None:
    """Reading goes on; writing says why not."""
    images = write_photographs(tmp_path / "p", 2, 1)
    arguments = [
        "--layers",
        "relu_1_1",
        "--images",
        str(images),
        "--weights",
        "random:0",
        "--store",
        str(tmp_path / "s.zarr"),
    ]
    assert command("cache_layers", *arguments).returncode == 0
    folders = [tmp_path, *tmp_path.rglob("*")]
    for path in folders:
        path.chmod(0o555 if path.is_dir() else 0o444)
    unprivileged = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    line = [
        *unprivileged,
        sys.executable,
        str(ROOT / "pipelines" / "cache_layers.py"),
        *arguments[:2],
        "maxp_1_2",
        *arguments[2:],
    ]
    try:
        done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
        assert FeatureStore.open(tmp_path / "s.zarr").rows("relu_1_1").gather([1]).isfinite().all()
    finally:
        for path in folders:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert done.returncode == 1
    assert "cannot be written: Permission denied" in done.stderr


def test_real_photographs(orl: Path, tmp_path: Path) -> None:
    """Forty items of real people through the whole network: rows of one person are nearer than rows of two."""
    for person in (1, 2, 11, 20):
        shutil.copytree(orl / f"s{person}", tmp_path / "photos" / f"s{person}")
    done = command(
        "cache_layers",
        "--layers",
        "maxp_5_3",
        "--images",
        tmp_path / "photos",
        "--weights",
        "random:0",
        "--store",
        tmp_path / "s.zarr",
    )
    assert done.returncode == 0, done.stderr
    source = FeatureStore.open(tmp_path / "s.zarr").source()
    assert [view for _, view in source.keys[:10]] == [str(i) for i in range(1, 11)]
    flat = source.rows("maxp_5_3").gather(range(40)).flatten(1).numpy()
    flat -= flat.mean(axis=0)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    likeness = flat @ flat.T - 2 * np.eye(40)
    faces = np.array([face for face, _ in source.keys])
    assert (faces[likeness.argmax(axis=1)] == faces).mean() >= 0.95


def test_completion_offers_layers() -> None:
    environment = {
        **os.environ,
        "_CACHE_LAYERS_COMPLETE": "bash_complete",
        "COMP_WORDS": "cache-layers --layers fc7",
        "COMP_CWORD": "2",
    }
    code = "from pipelines.cache_layers import main; main(prog_name='cache-layers')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert {line.partition(",")[2] for line in done.stdout.split()} == {"fc7", "fc7-relu", "fc7-dropout"}


def test_every_document_of_a_store_is_plain_json(small_store: Path) -> None:
    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    for path in small_store.rglob("zarr.json"):
        assert json.loads(path.read_text(), parse_constant=refuse)["zarr_format"] == 3
