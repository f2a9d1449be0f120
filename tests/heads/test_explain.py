"""The command that explains a run, from photographs to tables; a run that is killed; checks of maps that are known to be true."""

import multiprocessing
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zarr
from click.testing import CliRunner, Result
from PIL import Image
from torch import nn

from featurestore import FeatureStore, FeatureStoreError
from featurestore.cluster import in_order, local_cluster
from heads import load_head
from heads.explain.checks import FRACTIONS, KINDS, curves, most, similarity_to_shuffled
from heads.explain.job import ExplainRequest, plan_explanation
from heads.explain.methods import METHODS, Method, Trial
from heads.explain.names import METHODS as NAMES
from heads.explain.run import explain, shuffled_table
from heads.grid import GridRequest, plan_grid
from heads.legs import Legs
from heads.models.identity import IdentityHead
from heads.runs import train_run
from heads.train import Settings
from heads.trials.tables import FACES, ODD_POSITION, VIEWS
from pipelines.explain_heads import main
from tests.commands import FORKS
from tests.conftest import write_photographs
from tests.heads.conftest import cache
from tests.heads.tiny_network import NAME

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.xdist_group("explained runs"),
]  # one process makes what they share
FLAT = f"{__name__}:build_flat"
QUICK = Settings(batch_size=64, epochs=2, patience=9, threads=1)


def build_flat() -> nn.Module:
    """(n, 3, 32, 32) to (n, 8), without any maps on the way."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """photographs, s.zarr, and runs: a similarity head and an identity head. Read only."""
    folder = tmp_path_factory.mktemp("explained")
    cache(write_photographs(folder / "photographs", 6, 3), folder / "s.zarr", ["block1", "descriptor"])
    train(folder / "s.zarr", folder / "runs", "similarity", "descriptor")
    train(folder / "s.zarr", folder / "runs", "identity", "descriptor")
    return folder


def train(store: Path, out: Path, head: str, layer: str, **options) -> None:
    trials = {} if head == "identity" else {"trials": "same-person", "n_trials": 100}
    options = {"settings": QUICK, "lr": [1e-3], **trials, **options}
    grid = plan_grid(GridRequest(store, out, layers=[layer], heads=[head], **options))
    for task, runs in grid.parts:
        for run in runs:
            train_run(task, run, out)


def run_of(folder: Path, head: str = "similarity") -> Path:
    (found,) = (folder / "runs").glob(f"descriptor-{head}-*")
    return found


def command(folder: Path, out: Path, *arguments: object, run: str = "") -> Result:
    """The command, in this process; of two trials, without figures, where nothing else is said."""
    line = ["--run", run or run_of(folder).name, "--runs", folder / "runs", "--out", out, "--backbone", NAME]
    line += ["--device", "cpu", *([] if "--n" in arguments else ["--n", 2])]
    line += [] if "--figures" in arguments else ["--figures", 0]
    return CliRunner().invoke(main, [str(each) for each in (*line, *arguments)], prog_name="explain_heads.py")


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return str(result.output)


def files(path: Path) -> dict[str, tuple[int, bytes]]:
    """Of each file when it was written, and what it holds."""
    found = (each for each in path.rglob("*") if each.is_file() and not each.name.endswith(".partial"))
    return {str(each.relative_to(path)): (each.stat().st_mtime_ns, each.read_bytes()) for each in found}


def mask_of(folder: Path, side: int = 32) -> list[object]:
    """Options for a mask of the square: left and right."""
    Image.fromarray((np.arange(side) >= side // 2)[None].repeat(side, 0).astype(np.uint8)).save(folder / "mask.png")
    (folder / "mask.csv").write_text("label,name\n0,left\n1,right\n")
    return ["--mask", folder / "mask.png", "--mask-names", folder / "mask.csv"]


@pytest.fixture(scope="module")
def explained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The results of six trials by two methods, and what was printed."""
    out = tmp_path_factory.mktemp("out") / "maps"
    options = ["--method", "grad-cam", "lrp", "--n", 6, "--figures", 1, *mask_of(out.parent)]
    return out, done(command(folder, out, *options))


def test_maps_are_keyed_by_trial_and_place(folder: Path, explained: tuple[Path, str]) -> None:
    """Opened by xarray and zarr alone; of the trials that the run was tested on, by the heads' own answers."""
    maps = xr.open_zarr(explained[0] / "maps.zarr", consolidated=False)
    assert maps["lrp"].dims == ("trial", "choice", "place", "y", "x")
    assert maps["lrp"].shape == maps["grad-cam"].shape == (6, 2, 3, 32, 32)
    assert zarr.open_group(explained[0] / "maps.zarr", mode="r")["lrp"].chunks == (1, 2, 3, 32, 32)
    tested = pd.read_csv(run_of(folder) / "predictions.csv", dtype={name: str for name in (*FACES, *VIEWS)})
    source = FeatureStore.open(folder / "s.zarr").source()
    head = load_head(run_of(folder) / "weights.safetensors", "descriptor")
    legs = Legs(source, head, backbone=NAME)
    differs = []
    for i, number in enumerate(maps["trial"].values):
        row, one = tested.loc[number], maps.isel(trial=i)
        faces, views = [[row[name] for name in names] for names in (FACES, VIEWS)]
        assert one["face_id"].values.tolist() == faces
        assert one["view"].values.tolist() == views
        items = source.find(list(zip(faces, views, strict=True)))
        with torch.no_grad():
            logits = head(*source.rows("descriptor").gather(items).split(1))[0]
        assert np.allclose(one["logits"], logits, rtol=1e-4, atol=1e-4)
        assert np.allclose(one["probability"], logits.softmax(0), atol=1e-4)
        chosen, answer = int(one["chosen"]), int(one["answer"])
        assert chosen == int(logits.argmax())
        assert answer == row[ODD_POSITION] - 1
        assert (chosen == answer) == row["correct"]
        differs.append(chosen != answer)
        for name in ("grad-cam", "lrp"):
            for choice, place in (("head", chosen), ("person", answer)):
                found = one[name].sel(choice=choice).values
                if choice == "person" and not differs[-1]:
                    assert np.isnan(found).all()
                    continue
                wanted = METHODS[name].function(Trial(legs, legs.pixels(items), place))
                assert np.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert 0 < sum(differs) < 6


def test_tables_and_figures_are_kept(explained: tuple[Path, str]) -> None:
    out, printed = explained
    maps = xr.open_zarr(out / "maps.zarr", consolidated=False)
    regions = pd.read_csv(out / "regions.csv").set_index(["method", "choice", "region"])
    relevance = np.abs(maps["lrp"].sel(choice="head").values.astype(np.float64))
    shares = relevance[..., :16].sum((2, 3)) / relevance.sum((2, 3))
    assert regions.loc[("lrp", "head", "left"), "share"] == pytest.approx(shares.mean(), rel=1e-4)
    assert regions.loc[("lrp", "head", "left"), "area"] == pytest.approx(0.5)
    table = pd.read_csv(out / "curves.csv")
    assert set(table["method"]) == {"grad-cam", "lrp", "random", "edges"}
    assert len(table) == 4 * len(KINDS) * len(FRACTIONS)
    deletion = pd.read_csv(out / "deletion.csv").set_index(["method", "kind", "against"])
    curve = maps["curve-lrp"].values - maps["curve-random"].values
    area = np.trapezoid(curve[:, 0], FRACTIONS, axis=1).mean() / FRACTIONS[-1]
    assert deletion.loc[("lrp", "deletion", "random"), "difference"] == pytest.approx(area, rel=1e-4)
    assert set(pd.read_csv(out / "shuffled.csv")["method"]) == {"grad-cam", "lrp"}
    complete = pd.read_csv(out / "completeness.csv").set_index("method")
    logits = np.sort(maps["logits"].values, axis=1)
    margin = logits[:, 2] - logits[:, 1]
    off = np.abs(maps["lrp"].sel(choice="head").values.sum((1, 2, 3)) - margin) / margin
    assert complete.loc["lrp", "off"] == pytest.approx(np.median(off), rel=1e-2)
    assert len(list((out / "figures").glob("trial-*.png"))) == 1
    assert "similarity on descriptor" in printed
    assert "6 of test" in printed


def test_what_is_there_is_not_computed_again(folder: Path, explained: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(explained[0], tmp_path / "maps")
    before = files(tmp_path / "maps" / "maps.zarr")
    done(command(folder, tmp_path / "maps", "--method", "grad-cam", "lrp", "--n", 6))
    assert files(tmp_path / "maps" / "maps.zarr") == before
    done(command(folder, tmp_path / "maps", "--method", "input-x-gradient", "--n", 6))
    after = files(tmp_path / "maps" / "maps.zarr")
    assert {name: after[name] for name in before} == before
    added = {name.partition("/")[0] for name in after.keys() - before.keys()}
    assert added == {"input-x-gradient", "curve-input-x-gradient"}
    for other in (["--n", 5], ["--seed", 1], ["--explain", "logit"], ["--maps", "block1"], ["--head-only"]):
        given = other if "--n" in other else [*other, "--n", 6]
        result = command(folder, tmp_path / "maps", "--method", "lrp", *given)
        assert result.exit_code == 1, other
        assert "Choose another folder (--out)" in result.output
    result = command(folder, tmp_path / "maps", "--method", "lrp", "--n", 6, run=run_of(folder, "identity").name)
    assert "holds maps of another run" in result.output
    assert files(tmp_path / "maps" / "maps.zarr") == after


def _explain(request: ExplainRequest, out: Path, pipe: Connection) -> None:
    torch.set_num_threads(1)
    explain(plan_explanation(request), out, pipe.send)


def test_a_killed_explanation_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """A real process, killed with SIGKILL after its second trial."""
    request = ExplainRequest(run_of(folder), ["lrp", "occlusion"], n=5, backbone=NAME, device="cpu")
    plan = plan_explanation(request)
    explain(plan, tmp_path / "alone")
    here, there = multiprocessing.Pipe(duplex=False)
    process = FORKS.Process(target=_explain, args=(request, tmp_path / "killed", there))
    process.start()
    there.close()
    explained = 0
    while explained < 2:
        explained += here.recv()
    process.kill()
    process.join()
    chunks = tmp_path / "killed" / "maps.zarr" / "occlusion" / "c"
    assert 2 <= len(list(chunks.iterdir())) < 5
    explain(plan, tmp_path / "killed")
    alone, killed = (
        {name: content for name, (_, content) in files(tmp_path / each).items()} for each in ("alone", "killed")
    )
    assert alone == killed


def test_a_cluster_explains_the_same(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By paths relative to the command's folder, which the worker does not know."""
    monkeypatch.chdir(folder)
    run = run_of(folder)
    request = ExplainRequest(run.relative_to(folder), ["lrp", "occlusion"], n=3, backbone=NAME, device="cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    explain(plan_explanation(request), tmp_path / "alone")
    torch.set_num_threads(before)
    counted: list[int] = []
    with local_cluster(1) as client:
        for method in (["lrp"], request.methods):
            plan = plan_explanation(replace(request, methods=method))
            explain(plan, tmp_path / "many", counted.append, partial(in_order, client))
    assert sum(counted) == 2 * 3
    alone, many = (
        {name: content for name, (_, content) in files(tmp_path / each).items()} for each in ("alone", "many")
    )
    assert alone == many


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path) -> None:
    before = files(folder)
    printed = done(command(folder, tmp_path / "out", "--dry-run", "--method", "integrated-gradients", "grad-cam"))
    assert "nothing is run" in printed
    assert "maps of block2" in printed
    assert "takes      about" in printed
    assert not list(tmp_path.iterdir())
    assert files(folder) == before


def test_an_identity_head_is_explained(folder: Path, tmp_path: Path) -> None:
    run = run_of(folder, "identity").name
    options = ["--method", "lrp", "--no-checks", "--n", 5, "--figures", 1]
    printed = done(command(folder, tmp_path / "out", *options, run=run))
    assert "No regions" in printed
    maps = xr.open_zarr(tmp_path / "out" / "maps.zarr", consolidated=False)
    assert maps["lrp"].shape == (5, 2, 1, 32, 32)
    tested = pd.read_csv(run_of(folder, "identity") / "predictions.csv", dtype={"face_id": str, "view": str})
    for i, number in enumerate(maps["trial"].values):
        one, row = maps.isel(trial=i), tested.loc[number]
        assert (str(one["face_id"].values[0]), str(one["view"].values[0])) == (row["face_id"], row["view"])
        faces = maps.attrs["classes"]
        assert faces[int(one["answer"])] == row["face_id"]
        assert faces[int(one["chosen"])] == row["predicted"]
        assert np.isnan(one["lrp"].sel(choice="person").values).all() == row["correct"]
    result = command(folder, tmp_path / "out", "--trials", "t.csv", run=run)
    assert "no trials but its own test views: --trials test" in result.output


def test_every_method_runs(folder: Path, tmp_path: Path) -> None:
    """Together, with all figures."""
    options = ["--n", 1, "--figures", 1, "--steps", 8, *mask_of(tmp_path)]
    done(command(folder, tmp_path, "--method", *METHODS, *options))
    maps = xr.open_zarr(tmp_path / "maps.zarr", consolidated=False).sel(choice="head")
    assert all(np.isfinite(maps[name].values).all() and np.ptp(maps[name].values) > 0 for name in METHODS)


def test_a_fine_tuned_run_is_explained(folder: Path, tmp_path: Path) -> None:
    """By the network that it tuned: choices are those of its own test, logits not those of the head on rows as they were."""
    options = {"finetune_from": "block1", "backbone_lr": 0.02, "backbone": NAME}
    train(folder / "s.zarr", tmp_path / "runs", "similarity", "descriptor", **options)
    (run,) = (tmp_path / "runs").glob("*-from-block1-*")
    printed = done(command(folder, tmp_path / "out", "--method", "hires-cam", "--no-checks", "--n", 9, run=str(run)))
    assert "similarity on descriptor" in printed
    maps = xr.open_zarr(tmp_path / "out" / "maps.zarr", consolidated=False)
    tested = pd.read_csv(run / "predictions.csv").loc[maps["trial"].values]
    assert ((maps["chosen"].values == maps["answer"].values) == tested["correct"]).all()
    head = load_head(run / "weights.safetensors", "block1", backbone=NAME)
    source = FeatureStore.open(folder / "s.zarr").source()
    for i in range(9):
        keys = [*zip(maps["face_id"].values[i].tolist(), maps["view"].values[i].tolist(), strict=True)]
        with torch.no_grad():
            tuned = head(*source.rows("block1").gather(source.find(keys)).split(1))[0]
            frozen = head.head(*source.rows("descriptor").gather(source.find(keys)).split(1))[0]
        assert np.allclose(maps["logits"][i], tuned, rtol=1e-3, atol=1e-3)
        assert not np.allclose(frozen, tuned, rtol=1e-3, atol=1e-3)


def test_regions_are_compared_and_photographs_masked(folder: Path, explained: tuple[Path, str], tmp_path: Path) -> None:
    """The same run twice: no difference. Of the second, photographs with a tenth hidden."""
    options = ["--method", "lrp", "--no-checks", "--n", 6, "--export-masked", tmp_path / "masked"]
    done(command(folder, tmp_path / "again", *options))
    listed = pd.read_csv(tmp_path / "masked" / "masked.csv")
    assert len(listed) == len([path for path in (tmp_path / "masked").rglob("*.png") if path.is_file()]) > 0
    line = ["--compare", explained[0], tmp_path / "again", *mask_of(tmp_path)]
    done(CliRunner().invoke(main, [str(each) for each in line]))
    differences = pd.read_csv(explained[0] / "compared_differences.csv")
    assert set(differences["region"]) == {"left", "right"}
    assert np.allclose(differences["difference"], 0)
    result = CliRunner().invoke(main, [str(each) for each in line[:3]])
    assert result.exit_code == 2
    assert "maps is of a source without landmarks: give --landmarks or --mask" in result.output
    result = CliRunner().invoke(main, ["--compare", str(explained[0]), str(folder)])
    assert result.exit_code == 1
    assert f"{folder} holds no maps" in result.output


def test_the_command_knows_all_methods() -> None:
    """It lists them without importing torch."""
    assert list(NAMES) == list(METHODS)


def test_trials_of_a_file(folder: Path, tmp_path: Path) -> None:
    """That the head was not tested on; one with a face that is not in the store is said, with its line."""
    text = "face_1,view_1,face_2,view_2,face_3,view_3,odd\nf1,1,f2,2,f3,3,f2\nf4,1,f5,2,f6,3,f4\n"
    (tmp_path / "t.csv").write_text(text)
    done(command(folder, tmp_path / "out", "--method", "lrp", "--no-checks", "--trials", tmp_path / "t.csv"))
    maps = xr.open_zarr(tmp_path / "out" / "maps.zarr", consolidated=False)
    assert maps["face_id"].values.tolist() == [["f1", "f2", "f3"], ["f4", "f5", "f6"]]
    assert maps["answer"].values.tolist() == [1, 0]
    (tmp_path / "u.csv").write_text(text + "f1,1,nobody,1,f3,3,f1\n")
    result = command(folder, tmp_path / "other", "--trials", tmp_path / "u.csv")
    assert result.exit_code == 1
    assert "face that is not in" in result.output
    assert "nobody" in result.output
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "lpr"], "there is no method 'lpr'. Did you mean lrp"),
        (["--where", "correct == 'maybe'"], "meets --where"),
        (["--maps", "descriptor"], "not maps (channel, y, x). The last that does: block2"),
        (["--weights", "random:1"], "random:1 is not the weights of"),
        (
            ["--backbone", "other:network"],
            "code outside of this program. If you trust it, name it: --backbone tests.heads",
        ),
        (["--store", "nowhere.zarr"], "nowhere.zarr"),
    ],
)
def test_bad_options_are_said_before_anything_is_written(
    folder: Path, tmp_path: Path, options: list, message: str
) -> None:
    result = command(folder, tmp_path / "out", *options)
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_not_there_or_not_finished(folder: Path, tmp_path: Path) -> None:
    name = run_of(folder).name
    result = command(folder, tmp_path / "out", run=name.replace("similarity", "similarty"))
    assert result.exit_code == 1
    assert f"Did you mean {name}" in result.output
    shutil.copytree(run_of(folder), tmp_path / "unfinished")
    (tmp_path / "unfinished" / "result.json").unlink()
    result = command(folder, tmp_path / "out", run=str(tmp_path / "unfinished"))
    assert result.exit_code == 1
    assert "unfinished is not finished" in result.output
    result = CliRunner().invoke(main, [])
    assert result.exit_code == 2
    assert "--run NAME" in result.output
    assert not (tmp_path / "out").exists()


def test_masks_that_do_not_fit_are_said_before_computing(folder: Path, tmp_path: Path) -> None:
    result = command(folder, tmp_path / "out", *mask_of(tmp_path, side=20))
    assert result.exit_code == 1
    assert "20 × 20 pixels" in result.output
    assert not (tmp_path / "out" / "maps.zarr").exists()
    result = command(folder, tmp_path / "out", *mask_of(tmp_path)[:2])
    assert result.exit_code == 2
    assert "--mask needs --mask-names" in result.output


def test_photographs_that_were_moved(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "photographs", 4, 3)
    cache(images, tmp_path / "s.zarr", ["descriptor"])
    train(tmp_path / "s.zarr", tmp_path / "runs", "similarity", "descriptor")
    images.rename(tmp_path / "elsewhere")
    result = command(tmp_path, tmp_path / "out")
    assert result.exit_code == 1
    assert "No such file" in result.output
    assert "put it back, or leave its items out (--where)" in result.output


def test_a_network_without_maps(tmp_path: Path) -> None:
    """Grad-CAM says which methods apply, and these do."""
    cache(write_photographs(tmp_path / "photographs", 4, 3), tmp_path / "s.zarr", ["1"], backbone=FLAT)
    train(tmp_path / "s.zarr", tmp_path / "runs", "similarity", "1")
    (run,) = (tmp_path / "runs").glob("1-similarity-*")
    result = command(tmp_path, tmp_path / "out", "--method", "grad-cam", "--backbone", FLAT, run=run.name)
    assert result.exit_code == 1
    assert "has none up to layer '1'. Methods that need none: lrp, lrp-epsilon" in result.output
    result = command(tmp_path, tmp_path / "out", "--method", "guided-backprop", "--backbone", FLAT, run=run.name)
    assert "this network has none" in result.output
    options = ["--method", "input-x-gradient", "--no-checks", "--backbone", FLAT]
    done(command(tmp_path, tmp_path / "fine", *options, run=run.name))


# Are maps true? A head that looks at one quarter of the square.

QUARTER = np.s_[:4, 4:]  # of block1's 8 × 8 positions: the upper right


@pytest.fixture(scope="module")
def planted(folder: Path) -> Legs:
    """An identity head on block1 whose weights are zero outside of that quarter."""
    head = IdentityHead((8, 8, 8), ["a", "b", "c"])
    head.reset(torch.Generator().manual_seed(0))
    weights = torch.zeros(3, 8, 8, 8)
    weights[:, :, *QUARTER] = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    head.linear.weight.data = weights.flatten(1)
    return Legs(FeatureStore.open(folder / "s.zarr").source(), head, "block1", maps="block1", backbone=NAME)


def trials_of(legs: Legs, n: int = 4) -> list[Trial]:
    """The head's own choices for the first photographs."""
    found = [Trial(legs, legs.pixels(np.array([item])), 0) for item in range(n)]
    return [replace(trial, choice=int(trial.logits().argmax())) for trial in found]


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("grad-cam", "grad-cam++")])
def test_maps_show_where_a_head_looks(planted: Legs, name: str) -> None:
    """Most of the relevance is there. The two others weight maps wherever they are."""
    for trial in trials_of(planted):
        relevance = METHODS[name].function(trial).abs()[0].numpy()
        quarters = relevance.reshape(2, 16, 2, 16).mean((1, 3))
        assert quarters.argmax() == 1  # upper right
        assert quarters.flat[1] > 0.6 * quarters.sum()
        far = relevance.copy()
        far[:24, 8:] = 0  # convolutions and windows reach some pixels beyond
        assert far.sum() < 1e-3 * relevance.sum()


def test_what_a_head_does_not_look_at_can_be_hidden(planted: Legs) -> None:
    """Deletion of blocks that are far changes nothing; what a method finds makes the margin fall faster than random blocks."""
    falls = []
    for seed, trial in enumerate(trials_of(planted, 8)):
        far = np.zeros((1, 16, 16))
        far[:, 10:] = far[:, :, :6] = 1
        orders = {"far": far, "random": np.random.default_rng(seed).random((1, 16, 16))}
        orders["found"] = METHODS["occlusion"].function(trial).numpy().reshape(1, 16, 2, 16, 2).sum((2, 4))
        found = curves(trial, orders)
        value = float(trial.value(trial.logits()[None]))
        assert np.allclose(found["far"][0], value, rtol=1e-4)
        assert np.allclose([found[name][0, 0] for name in orders], value, rtol=1e-4)
        assert len({float(found[name][1, 0]) for name in orders}) == 1  # all of it is blurred
        falls.append(found["found"].mean(1) - found["random"].mean(1))
    deletion, insertion = np.mean(falls, axis=0)
    assert deletion < 0 < insertion


def test_the_largest_blocks_are_hidden_first() -> None:
    scores = np.array([[[3.0, -1.0], [0.5, 2.0]], [[9.0, 2.0], [-4.0, 0.0]]])
    assert most(scores, 0.25).tolist() == [[[True, False], [False, False]], [[True, False], [False, False]]]
    assert most(scores, 0.0).sum() == 0
    assert most(scores, 1.0).all()


@pytest.fixture
def seen(planted: Legs) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Copies of all weights of the planted head and network, for a test to add to; the first as they are before it."""
    states = [{name: weight.clone() for name, weight in planted.state_dict().items()}]
    yield states
    planted.load_state_dict(states[0])


def test_shuffled_weights_are_put_back(planted: Legs, seen: list[dict[str, torch.Tensor]]) -> None:
    """Each tensor keeps its numbers in another order, from the head down; in the end all are as they were, after errors too."""

    def look(trial: Trial) -> torch.Tensor:
        seen.append({name: weight.clone() for name, weight in trial.legs.state_dict().items()})
        if len(seen) == 20:
            raise RuntimeError("a method fails")
        return trial.pixels.float().mean(-1)

    trials = trials_of(planted, 1)
    table = similarity_to_shuffled(trials, [Method("look", look)])
    shuffled = [{name for name in state if not torch.equal(state[name], seen[0][name])} for state in seen]
    assert shuffled[:2] == [set(), set()]
    assert shuffled[2] and all(name.startswith("head.") for name in shuffled[2])
    assert all(one < other for one, other in pairwise(shuffled[2:]))
    assert any(name.endswith("conv1.weight") for name in shuffled[-1])
    assert not any(name.endswith("conv1.weight") for name in shuffled[-2])
    for state in seen:
        assert all(torch.equal(state[name].flatten().sort()[0], seen[0][name].flatten().sort()[0]) for name in state)
    assert table["share"].tolist()[-1] == 1
    with pytest.raises(RuntimeError, match="a method fails"):
        while True:
            similarity_to_shuffled(trials, [Method("look", look)])
    assert all(torch.equal(weight, seen[0][name]) for name, weight in planted.state_dict().items())


def test_a_method_that_ignores_the_network_does_not_explain_it(folder: Path) -> None:
    plan = plan_explanation(ExplainRequest(run_of(folder), ["lrp"], n=1, backbone=NAME, device="cpu"))
    brightness = Method("brightness", lambda trial: trial.pixels.float().mean(-1))
    table = shuffled_table(replace(plan, methods=[brightness, METHODS["occlusion"]])).set_index("method")
    assert np.allclose(table.loc["brightness", "correlation"], 1)
    assert not table.loc["brightness", "explains"].any()
    assert table.loc["occlusion", "explains"].all()


def test_a_folder_of_something_else_is_not_written_into(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "maps.zarr").mkdir()
    (tmp_path / "maps.zarr" / "notes.txt").write_text("mine")
    plan = plan_explanation(ExplainRequest(run_of(folder), ["lrp"], n=1, backbone=NAME, device="cpu"))
    with pytest.raises(FeatureStoreError, match=r"is no Zarr of maps.*another folder"):
        explain(plan, tmp_path)
    assert [path.name for path in (tmp_path / "maps.zarr").iterdir()] == ["notes.txt"]
