"""Each command started from nothing, as a script and as it is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT
from tests.conftest import write_photographs

SCRIPTS = sorted(path.stem for path in (ROOT / "pipelines").glob("[a-z]*.py"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_prints_its_help_and_examples(script: str, tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "pipelines" / f"{script}.py"), "--help"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"python pipelines/{script}.py" in done.stdout


def test_a_script_does_its_job(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 1, 2)
    line = [sys.executable, str(ROOT / "pipelines" / "cache_layers.py"), "--layers", "relu_1_1"]
    line += ["--images", str(images), "--weights", "random:0", "--store", str(tmp_path / "s.zarr")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Done: 2 of 2 images" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_installed_command_is_the_script(script: str) -> None:
    installed = Path(sys.executable).with_name(script.replace("_", "-"))
    if not installed.exists():
        pytest.skip("the package is not installed in this environment")
    done = subprocess.run([str(installed), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Examples:" in done.stdout
