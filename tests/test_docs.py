"""The examples of README.md and docs/, run as they are printed."""

import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from featurestore import FeatureStore
from featurestore.photos.recipes import recipe_from_dict
from heads import best_run
from tests.commands import ROOT, command
from tests.heads.conftest import write_store, write_trials

pytestmark = pytest.mark.xdist_group("docs")  # one process makes what they share
# In the order in which a reader meets them: a page may use what an earlier one has made.
PAGES = (
    *("README.md", "docs/explanations.md", "docs/stores.md", "docs/questions.md", "docs/networks.md", "docs/heads.md"),
    "docs/format.md",
)
ADDITIONS = (
    "featurestore/networks/tiny_face.py",
    "featurestore/checkpoints/formats/npz.py",
    "heads/models/weighted_distance.py",
)


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text("utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for of, content in fenced if of == language]


def commands(page: str) -> list[str]:
    """Those that can be run here: nobody's photographs and weights are, and test_remote runs those with an object store."""
    lines = [line for block in blocks(page, "") for line in block.replace("\\\n", " ").splitlines()]
    elsewhere = ("photos", "VGG_FACE", "s3://")
    return [line for line in lines if line.startswith("python ") and not any(each in line for each in elsewhere)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reader's folder after ``make demo``, with twelve faces instead of a hundred."""
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


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_and_the_python_of_a_page_run(folder: Path, page: str) -> None:
    for line in commands(page):
        if "NAME" in line:
            line = line.replace(
                "NAME", best_run(folder / "store" / "runs", layer="fc7-relu", head="similarity")["name"]
            )
        _, script, *arguments = shlex.split(line)
        assert (ROOT / script).is_file()
        done = command(Path(script).stem, *arguments, cwd=folder)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
    code = "\n".join(blocks(page, "python"))
    assert code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_the_pages_have_examples() -> None:
    assert len([line for page in PAGES for line in commands(page)]) >= 10


def test_the_recipe_is_one() -> None:
    (recipe,) = blocks("docs/networks.md", "toml")
    assert recipe_from_dict({"name": "mine", **tomllib.loads(recipe)}).short_side == 256


def test_the_page_on_scale_shows_what_a_dry_run_prints(tmp_path: Path) -> None:
    """Its numbers are of a list of 3.31 million, its lines those of any; what it gives to Slurm and Kubernetes can be parsed."""
    (tmp_path / "vggface2.txt").write_text("".join(f"n{i // 20:06d}/{i % 20:04d}_01.jpg\n" for i in range(400)))
    (line,) = commands("docs/scale.md")[:1]
    done = command("cache_layers", *shlex.split(line)[2:], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (shown,) = blocks("docs/scale.md", "text")
    beginnings = [re.match(r"  (\S*)", row)[1] for row in shown.splitlines() if row]  # type: ignore[index]
    printed = done.stdout.splitlines()
    assert {"time", "bytes", "maxp_5_3", "files", "requests", "workers"} <= set(beginnings)
    assert all(any(row.startswith(f"  {name} ") for row in printed) for name in beginnings if name)
    (script,) = blocks("docs/scale.md", "py")
    compile(script, "slurm_workers.py", "exec")
    (resource,) = blocks("docs/scale.md", "yaml")
    assert yaml.safe_load(resource)["kind"] == "DaskCluster"


def test_ci_runs_the_command_of_the_readme() -> None:
    making = [block.strip() for block in blocks("README.md", "") if block.startswith("make ")]
    assert making == ["make demo", "make photos PHOTOS=folder", "make test"]
    assert making[-1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_readme_is_short_and_says_each_thing_under_one_heading() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 160
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        outside = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        headings = re.findall(r"^#+ (.*)$", outside, re.MULTILINE)
        assert len(headings) == len(set(headings)), page


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text("utf-8")):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.fixture(scope="module")
def additions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three files of the architecture page, in folders beside the packages'."""
    folder = tmp_path_factory.mktemp("additions")
    found = {code.partition("\n")[0].removeprefix("# "): code for code in blocks("docs/architecture.md", "python")}
    assert tuple(found) == ADDITIONS
    for name, code in found.items():
        assert len(code.splitlines()) < 40, name
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(code.partition("\n")[2])
    return folder


def with_additions(additions: Path, code: str, cwd: Path) -> str:
    """Standard output of ``code``, run as if the three files were in the packages."""
    extended = f"""
        import featurestore.networks, featurestore.checkpoints.formats, heads.models
        for package in (featurestore.networks, featurestore.checkpoints.formats, heads.models):
            package.__path__.append({str(additions)!r} + "/" + package.__name__.replace(".", "/"))
    """
    line = [sys.executable, "-c", textwrap.dedent(extended) + textwrap.dedent(code)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_added_network_and_format_cache_layers(folder: Path, additions: Path, tmp_path: Path) -> None:
    code = f"""
        import sys
        from featurestore.networks.registry import BACKBONES, RECIPES
        assert "tiny-face" in RECIPES and list(BACKBONES["tiny_face"].layers)[-1] == "descriptor"
        assert "torch" not in sys.modules
        import numpy as np
        from featurestore.checkpoints.weights import open_weights
        spec = BACKBONES["tiny_face"]
        drawn = open_weights("random:0", spec)
        np.savez("tiny.npz", **{{key: value.numpy() for key, value in drawn.read(drawn.keys).items()}})
        from pipelines.cache_layers import main
        main(["--backbone", "tiny_face", "--layers", "relu1", "descriptor", "--weights", "tiny.npz", "--store", "tiny.zarr",
              "--images", {str(folder)!r} + "/store/demo_faces/faces.csv"])
    """
    assert "weights tiny.npz (NumPy, published keys)" in with_additions(additions, code, tmp_path)
    rows = FeatureStore.open(tmp_path / "tiny.zarr").rows("descriptor").gather(range(60))
    assert np.allclose(rows.norm(dim=1), 1)


def test_an_added_head_trains(additions: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "made.zarr")
    write_trials(tmp_path / "trials.csv", 300)
    code = """
        from heads.registry import HEADS
        assert HEADS["weighted-distance"].startswith("a weight for each feature")
        from pipelines.train_heads import main
        main(["--store", "made.zarr", "--trials", "trials.csv", "--layers", "fc7-relu", "--heads", "weighted-distance",
              "--epochs", "3", "--lr", "0.05", "--out", "runs", "--jobs", "1"])
    """
    with_additions(additions, code, tmp_path)
    runs = pd.read_csv(tmp_path / "runs" / "runs.csv").set_index("head")
    assert runs.loc["weighted-distance", "best_epoch"] > 0  # it learned: a later epoch was better than the start
