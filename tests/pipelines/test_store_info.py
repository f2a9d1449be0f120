"""What a store holds, and what is removed from it, as the command says it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from featurestore import FeatureStore
from featurestore.files import folder_bytes
from featurestore.store.lock import store_lock
from tests.commands import ROOT, command
from tests.conftest import LAYERS, run_pass, write_photographs
from tests.featurestore.test_cache import contents


@pytest.fixture(scope="module")
def two_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("info")
    images = write_photographs(folder / "p", 2, 11)
    run_pass(images, folder / "s.zarr", LAYERS)
    run_pass(images, folder / "s.zarr", LAYERS[1:], weights="random:1", compress="zstd", dtype="float16")
    return folder / "s.zarr"


@pytest.fixture
def store(two_sources: Path, tmp_path: Path) -> Path:
    return shutil.copytree(two_sources, tmp_path / "s.zarr")


def names(store: Path) -> dict[str, str]:
    return {source.attributes["weights"]: name for name, source in FeatureStore.open(store).sources.items()}


def test_a_store_is_described(store: Path) -> None:
    FeatureStore.open(store).source(layers=LAYERS).layers[LAYERS[1]].shard_path(5).unlink()  # the last two items
    done = command("store_info", store)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0].startswith(f"{store}: 2 sources, ")
    for line in (
        names(store)["seed:0"],
        "backbone vggface, weights random:0 (random numbers, not a trained network)",
        "recipe vggface-published, computed in fp32",
        "licence none: seeded random weights",
        "items 22, of 2 faces",
        "views 11: 1, 2, 3, 4, 5, 6, 7, 8 and 3 more",
        "layer shape stored as rows cached on disk",
    ):
        assert line in lines
    assert any(line.startswith("maxp_1_2 64×112×112 float32 22 of 22 ") for line in lines)
    assert any(line.startswith("maxp_2_2 128×56×56 float32 20 of 22 ") for line in lines)
    assert any(line.startswith("maxp_2_2 128×56×56 float16 zstd 22 of 22 ") for line in lines)


def test_layers_and_sources_are_removed(store: Path) -> None:
    before, held = contents(store), folder_bytes(store)
    dry = command("store_info", store, "--remove-layer", LAYERS[0], "--dry-run")
    assert "Would remove layer maxp_1_2 of vggface-" in dry.stdout
    assert contents(store) == before
    done = command("store_info", store, "--remove-layer", LAYERS[0])
    assert done.returncode == 0, done.stderr
    assert "Removed layer maxp_1_2 of vggface-" in done.stdout
    assert done.stdout.endswith("freed.\n")
    assert held - folder_bytes(store) > 22 * 64 * 112 * 112 * 4
    done = command("store_info", store, "--remove-layer", LAYERS[1], "--source", names(store)["seed:0"])
    assert done.returncode == 0, done.stderr
    assert FeatureStore.open(store).sources[names(store)["seed:0"]].n_items == 22
    done = command("store_info", store, "--remove", names(store)["seed:1"])
    assert "Removed source vggface-" in done.stdout
    assert list(names(store)) == ["seed:0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--remove-layer", "maxp_2_2"], "2 sources of .* hold maxp_2_2, so say which: --source, one of vggface-"),
        (["--remove-layer", "maxp_1_3"], "no source of .* holds maxp_1_3. Did you mean maxp_1_2"),
        (["--remove-layer", "maxp_1_3", "--source", "{0}"], "layer 'maxp_1_3' is not in .* Did you mean maxp_1_2"),
        (["--remove", "senet"], "has no source 'senet'. It is one of: vggface-"),
        (["--remove", "vgg"], "2 sources of .* begin with 'vgg', so say which"),
        (["--remove", "{0}", "--remove-layer", "maxp_2_2"], "give --remove SOURCE, or --remove-layer LAYER"),
        (["--source", "{0}"], "give --remove SOURCE, or --remove-layer LAYER"),
    ],
)
def test_what_is_typed_wrong_changes_nothing(two_sources: Path, arguments: list[str], message: str) -> None:
    before = contents(two_sources)
    done = command("store_info", two_sources, *(each.format(names(two_sources)["seed:0"]) for each in arguments))
    assert done.returncode in (1, 2)
    assert contents(two_sources) == before
    import re

    assert re.search(message, done.stderr), done.stderr


def test_there_is_no_store(tmp_path: Path) -> None:
    done = command("store_info", tmp_path / "nowhere.zarr", "--remove", "x")
    assert done.returncode == 1
    assert "there is no store" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_store_that_another_process_writes_is_left_alone(store: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from featurestore.store.lock import store_lock\n"
        "with store_lock(Path(sys.argv[1]), 'the other one'): print('held', flush=True); time.sleep(60)"
    )
    line = [sys.executable, "-c", code, str(store)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        before = contents(store)
        done = command("store_info", store, "--remove-layer", LAYERS[0])
        other.kill()
    assert done.returncode == 1
    assert f"is being written by process {other.pid}" in done.stderr
    assert "(the other one)" in done.stderr
    assert contents(store) == before
    with store_lock(store, "test"):
        pass


def test_a_removal_that_was_killed_is_finished_by_the_same_command(store: Path) -> None:
    going = names(store)["seed:1"]
    (store / going).rename(store / f"{going}.partial")  # as SIGKILL leaves it; test_killed_removal.py kills
    done = command("store_info", store, "--remove", going)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"Finished removing {going} from {store}, which had been interrupted.\n"
    assert sorted(path.name for path in store.iterdir()) == sorted([*names(store).values(), "zarr.json"])
    assert command("store_info", store, "--remove", going).returncode == 1


@pytest.mark.parametrize(
    ("word", "expected"), [("--remove-layer", set(LAYERS)), ("--remove", None), ("--source", None)]
)
def test_completion_offers_what_the_store_holds(two_sources: Path, word: str, expected: set[str] | None) -> None:
    environment = {
        **os.environ,
        "_STORE_INFO_COMPLETE": "bash_complete",
        "COMP_WORDS": f"store-info {two_sources} {word} ",
        "COMP_CWORD": "3",
    }
    code = "from pipelines.store_info import main; main(prog_name='store-info')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    found = {line.partition(",")[2] for line in done.stdout.split()}
    assert found == (expected or set(names(two_sources).values()))
