"""The README's examples, run as they stand."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from featurestore import FeatureStore
from featurestore.photos.recipes import recipe_from_dict
from tests.commands import ROOT, command

pytestmark = pytest.mark.xdist_group("readme")  # one process makes what they share
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for of, text in fenced if of == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the README's reader stands after ``make demo``, with twelve faces instead of a hundred."""
    folder = tmp_path_factory.mktemp("reader")
    made = command("make_faces", "--faces", 12, "--trials", 600, "--out", folder / "store" / "demo_faces")
    assert made.returncode == 0, made.stderr
    done = command("cache_layers", "--layers", "maxp_5_3", "fc7-relu", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "using demo faces in store/demo_faces and seeded random weights (random:0)" in done.stdout
    assert "random numbers, not a trained network" in done.stdout
    return folder


def test_the_main_job_keeps_keys_and_metadata(folder: Path) -> None:
    store = FeatureStore.open(folder / "store" / "demo.zarr")
    assert store.rows("maxp_5_3").shape == (60, 512, 7, 7)
    assert store.rows("fc7-relu").gather(store.find([("face-003", "frontal")])).shape == (1, 4096)
    assert {"gender", "yaw", "skin"} <= set(store.items.columns)


def test_the_commands_run(folder: Path) -> None:
    lines = [
        line for block in blocks("") for line in block.replace("\\\n", " ").splitlines() if line.startswith("python ")
    ]
    runnable = [line for line in lines if "photos" not in line and "VGG_FACE" not in line]  # nobody's files are here
    assert len(runnable) >= 9
    for line in runnable:
        _, script, *arguments = shlex.split(line)
        assert (ROOT / script).is_file()
        done = command(Path(script).stem, *arguments, cwd=folder)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_python_runs(folder: Path) -> None:
    """After the commands, as the reader does: it loads a head that they trained."""
    code = "\n".join(blocks("python"))
    assert "tensorstore.open" in code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_the_recipe_is_one() -> None:
    (recipe,) = blocks("toml")
    assert recipe_from_dict({"name": "mine", **tomllib.loads(recipe)}).short_side == 256


def test_ci_runs_the_command_of_the_readme() -> None:
    commands = [block.strip() for block in blocks("") if block.startswith("make ")]
    assert commands[:2] == ["make demo", "make test"]
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()
