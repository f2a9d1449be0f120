"""Training: it learns, it is the same twice and after a kill, it keeps the best weights, it stops where it must."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from featurestore import FeatureStore, FeatureStoreError
from heads.checkpoints import load_head
from heads.evaluation import evaluate
from heads.features import Features
from heads.grid import GridRequest, plan_grid
from heads.models.identity import IdentityHead
from heads.models.low_precision import low_product
from heads.published import export
from heads.registry import draw_head
from heads.runs import Run, train_run
from heads.runs_table import finished_runs, runs_table, write_runs_table
from heads.schedule import run_grid
from heads.scores import paired_test
from heads.tasks import Task
from heads.train import STOP, Checkpoint, Examples, Pace, Settings, TrainingState, epoch_order, train
from heads.trials.matching import Sessions
from tests.commands import ROOT
from tests.heads.conftest import N_FACES, VIEWS, write_store, write_trials
from tests.heads.published import Published

QUICK = Settings(lr=3e-3, batch_size=64, epochs=4, patience=3, threads=1)


def request(made: Path, judged: Path | str | None, out: Path, **options) -> GridRequest:
    defaults = {"layers": ["fc7-relu"], "heads": ["similarity"], "settings": QUICK, "lr": [QUICK.lr]}
    return GridRequest(store=made, out=out, trials=judged, **{**defaults, **options})


def task_of(made: Path, judged: Path, out: Path, **options) -> Task:
    return plan_grid(request(made, judged, out, **options)).parts[0][0]


def weights(folder: Path, task: Task, each: Run) -> dict[str, torch.Tensor]:
    return load_file(folder / each.name(task) / "weights.safetensors")


@pytest.mark.parametrize(("head", "layer"), [("conv", "fc7-relu"), ("similarity", "maxp_5_3"), ("fc", "fc7-relu")])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(
    made: Path, judged: Path, tmp_path: Path, head: str, layer: str
) -> None:
    task = task_of(made, judged, tmp_path)
    each = Run(layer, head, replace(QUICK, epochs=2))
    train_run(task, each, tmp_path / "a")
    torch.manual_seed(99)
    train_run(task, each, tmp_path / "b")
    other = replace(each, settings=replace(each.settings, seed=1))
    train_run(task, other, tmp_path / "a")
    first, second = weights(tmp_path / "a", task, each), weights(tmp_path / "b", task, each)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], value) for key, value in weights(tmp_path / "a", task, other).items())


def test_heads_learn_what_is_there_and_the_accuracy_is_that_of_the_weights_saved(
    made: Path, judged: Path, tmp_path: Path
) -> None:
    grid = plan_grid(request(made, judged, tmp_path, settings=replace(QUICK, epochs=30)))
    ((task, runs),) = grid.parts
    run_grid([(task, runs)], tmp_path)
    table, _ = write_runs_table(tmp_path)
    score = table.set_index("head")["accuracy"]
    assert score["similarity"] > 0.7
    assert score["similarity"] > score["zero-shot"] > 0.35
    assert float(table.set_index("head").loc["similarity", "p_zero_shot"]) < 0.05
    folder = tmp_path / table.set_index("head").loc["similarity", "name"]
    head = load_head(folder / "weights.safetensors", "fc7-relu")
    test = np.flatnonzero(task.split.part == 2)
    logits = evaluate(head, Features([FeatureStore.open(made).source().rows("fc7-relu")]), task.items[test])
    assert (logits.argmax(1) == task.labels[test]).mean() == score["similarity"]
    metrics, predicted = pd.read_csv(folder / "metrics.csv"), pd.read_csv(folder / "predictions.csv")
    assert predicted["correct"].mean() == pytest.approx(score["similarity"])
    assert (predicted["predicted"] == predicted["odd"]).equals(predicted["correct"])
    best = json.loads((folder / "result.json").read_text())["best_epoch"]
    assert best == metrics["validation_loss"].idxmin() + 1
    assert len(metrics) <= best + QUICK.patience
    assert list(folder.glob("events.out.tfevents.*"))
    assert not (folder / "state.safetensors").exists()
    assert json.loads((folder / "config.json").read_text())["split"] == task.split.hash
    assert (tmp_path / "runs.csv").exists()
    assert {"accuracy_by_face.csv", "accuracy_by_view.csv", "accuracy_by_position.csv"} <= {
        p.name for p in folder.iterdir()
    }


def test_similarity_generalises_to_faces_never_seen(made: Path, tmp_path: Path) -> None:
    write_trials(tmp_path / "many.csv", 6000)
    settings = replace(QUICK, epochs=15)
    grid = plan_grid(
        request(made, tmp_path / "many.csv", tmp_path, split="face", fractions=(0.5, 0.2, 0.3), settings=settings)
    )
    ((task, runs),) = grid.parts
    results = []
    run_grid([(task, runs)], tmp_path, done=lambda each, result: results.append(result))
    similarity = next(result for result in results if result["epochs"])
    assert similarity["low"] > 1 / 3


def test_permuted_training_still_learns_the_same_question(made: Path, judged: Path, tmp_path: Path) -> None:
    task = task_of(made, judged, tmp_path)
    each = Run("fc7-relu", "similarity", replace(QUICK, permute=True, epochs=20))
    assert train_run(task, each, tmp_path)["accuracy"] > 0.7


def test_an_epoch_by_blocks_shows_every_example_once_and_stays_in_few_stretches() -> None:
    """Eight blocks of 256 items at a time, mixed; another order every time; random order is as it was in earlier versions."""
    items = np.random.default_rng(1).permutation(10_000)[:, None]
    none = np.empty(0, np.int64)
    examples = Examples(items, items[:, 0], np.arange(10_000), none, none)
    shown = epoch_order(examples, "blocks", np.random.default_rng(0))
    assert np.array_equal(np.sort(shown), examples.train)
    blocks = items[shown, 0] // 256
    first = set(blocks[: 7 * 256].tolist())
    assert len(first) <= 8 and not first & set(blocks[8 * 256 :].tolist())
    assert np.abs(np.diff(blocks[:2000])).mean() > 1  # mixed, not one block after the other
    assert not np.array_equal(shown, epoch_order(examples, "blocks", np.random.default_rng(1)))
    plain = np.random.default_rng([0, 1]).permutation(examples.train)
    assert np.array_equal(epoch_order(examples, "random", np.random.default_rng([0, 1])), plain)


def test_the_order_of_examples_is_in_the_config_where_it_is_not_random(
    made: Path, judged: Path, tmp_path: Path
) -> None:
    task = task_of(made, judged, tmp_path)
    run = Run("fc7-relu", "similarity", replace(QUICK, epochs=2))
    blocks = replace(run, settings=replace(run.settings, order="blocks"))
    assert "order" not in run.config(task)["settings"] and blocks.config(task)["settings"]["order"] == "blocks"
    assert run.identity(task) != blocks.identity(task)
    assert train_run(task, blocks, tmp_path)["epochs"] == 2
    with pytest.raises(FeatureStoreError, match="'sorted' is not possible; it is one of random, blocks"):
        Settings(order="sorted")


def test_a_resumed_run_ends_with_the_same_weights(made: Path, judged: Path, tmp_path: Path) -> None:
    """Stopped after every epoch and restored from disk, against never stopped."""
    task = task_of(made, judged, tmp_path)
    features = Features([FeatureStore.open(made).source().rows("fc7-relu")])
    settings = replace(QUICK, epochs=5, patience=5)
    whole = draw_head("conv", (400,), 0)
    expected = train(whole, features, task.examples, settings)
    for stop in range(1, 6):
        head = draw_head("conv", (400,), 0)
        checkpoint = Checkpoint(tmp_path / "state.safetensors", "this run", every=0)
        progress = train(head, features, task.examples, replace(settings, epochs=stop), checkpoint)
        assert progress.epoch == stop
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), head.state_dict().values(), strict=True))
    for a, b in zip(expected.history, progress.history, strict=True):
        assert (a.train_loss, a.validation_loss, a.best) == (b.train_loss, b.validation_loss, b.best)


def test_a_killed_run_goes_on_to_the_same_result(made: Path, judged: Path, tmp_path: Path) -> None:
    """A real process, killed with SIGKILL at epochs of its own; finished by another; against one left alone."""
    arguments = ["--store", made, "--trials", judged, "--layers", "fc7-relu", "--heads", "conv", "--lr", "1e-3"]
    code = (
        "import sys; import heads.train as t; t.Checkpoint.__init__.__defaults__ = (0.0,)\n"
        "import heads.schedule as g; g.run_grid.__defaults__ = (*g.run_grid.__defaults__[:-1], 0.0)\n"
        "from pipelines.train_heads import main; main()"
    )
    line = [sys.executable, "-c", code, *map(str, arguments), "--epochs", "6", "--jobs", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = subprocess.run(
        [*line, "--out", str(tmp_path / "alone")], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert alone.returncode == 0, alone.stderr
    kills = 0
    for _ in range(2):
        process = subprocess.Popen(
            [*line, "--out", str(tmp_path / "killed")],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        assert process.stdout is not None
        seen = 0
        for text in process.stdout:
            seen += "| epoch" in text
            if seen == 2:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.wait()
        process.stdout.close()
    assert kills == 2
    again = subprocess.run(
        [*line, "--out", str(tmp_path / "killed")], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert again.returncode == 0, again.stderr
    folders = [next((tmp_path / folder).glob("fc7-relu-conv-*")) for folder in ("alone", "killed")]
    first, second = (load_file(folder / "weights.safetensors") for folder in folders)
    assert folders[0].name == folders[1].name
    assert all(torch.equal(first[key], second[key]) for key in first)
    columns = ["epoch", "train_loss", "validation_loss", "best"]
    assert pd.read_csv(folders[0] / "metrics.csv")[columns].equals(pd.read_csv(folders[1] / "metrics.csv")[columns])
    assert (folders[0] / "predictions.csv").read_bytes() == (folders[1] / "predictions.csv").read_bytes()


def test_a_finished_run_is_read_and_an_unfinished_lock_is_refused(made: Path, judged: Path, tmp_path: Path) -> None:
    from filelock import FileLock

    task = task_of(made, judged, tmp_path)
    each = Run("fc7-relu", "zero-shot", QUICK)
    first = train_run(task, each, tmp_path)
    written = (tmp_path / each.name(task) / "predictions.csv").stat().st_mtime_ns
    assert train_run(task, each, tmp_path) == first
    assert (tmp_path / each.name(task) / "predictions.csv").stat().st_mtime_ns == written
    folder = tmp_path / Run("fc7-relu", "conv", QUICK).name(task)
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(FeatureStoreError, match="another process"):
        train_run(task, Run("fc7-relu", "conv", QUICK), tmp_path)


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
def test_a_grid_through_dask_gives_what_one_process_gives(
    made: Path, judged: Path, tmp_path: Path, scheduler: str
) -> None:
    grid = plan_grid(request(made, judged, tmp_path, seeds=[0, 1], settings=replace(QUICK, epochs=2)))
    ((task, runs),) = grid.parts
    done, epochs = {}, []
    run_grid(
        [(task, runs)],
        tmp_path / "dask",
        2,
        scheduler,
        lambda label, epoch: epochs.append((label, epoch.epoch)),
        done=lambda each, result: done.update({each.label: result}),
    )
    assert len(done) == 3 and all(isinstance(result, dict) for result in done.values())
    assert len(epochs) == 4
    for each in runs:
        train_run(task, each, tmp_path / "alone")
        first, second = weights(tmp_path / "dask", task, each), weights(tmp_path / "alone", task, each)
        assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_long_first_epoch_tells_its_pace_once(
    made: Path, judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    """In this process, and through Dask."""
    monkeypatch.setattr("heads.train.PACE_AFTER", 0.0)
    grid = plan_grid(request(made, judged, tmp_path, seeds=[0, 1], settings=replace(QUICK, epochs=2)))
    ((task, runs),) = grid.parts
    seen: dict[str, list] = {}
    run_grid([(task, runs)], tmp_path, jobs, "threads", lambda label, line: seen.setdefault(label, []).append(line))
    assert len(seen) == 2
    for pace, *epochs in seen.values():
        assert isinstance(pace, Pace)
        assert pace.epoch_seconds == pytest.approx(len(task.split.indices("train")) / pace.examples_per_second)
        assert [line.epoch for line in epochs] == [1, 2]


def test_a_worker_that_dies_is_said_in_our_words_and_dask_says_nothing(
    made: Path, judged: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Two real worker processes; one is killed, and the grid is stopped by Ctrl-C later. Dask's usual port is taken."""
    taken = socket.socket()
    request.addfinalizer(taken.close)
    with suppress(OSError):  # somebody else has it
        taken.bind(("127.0.0.1", 8787))
        taken.listen()
    options = ["--store", made, "--trials", judged, "--layers", "fc7-relu", "--heads", "conv", "--seeds", "0,1"]
    options += ["--epochs", "9999", "--patience", "9999", "--jobs", "2", "--out", tmp_path / "runs"]
    line = [sys.executable, "-u", str(ROOT / "pipelines" / "train_heads.py"), *map(str, options)]
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, preexec_fn=heed
    )
    assert process.stdout is not None
    lines: list[str] = []

    def read_until(*wanted: str) -> None:
        missing = set(wanted)
        for text in process.stdout:
            lines.append(text)
            missing -= {each for each in missing if each in text}
            if not missing:
                return
        pytest.fail("".join(lines))

    read_until("seed 0 | epoch", "seed 1 | epoch")
    workers = [
        each for each in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in str(each.cmdline())
    ]
    workers[0].kill()
    read_until("| its worker process died")
    read_until("seed 0 | epoch", "seed 1 | epoch")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    lines.append(process.communicate(timeout=100)[0])
    assert process.returncode == 130
    output = "".join(lines)
    assert output.endswith("\nStopped.\n")
    assert not re.search("distributed|tornado|WARNING|ERROR|Warning|Traceback", output), output


def test_an_address_without_a_cluster_is_said_so(made: Path, judged: Path, tmp_path: Path) -> None:
    ((task, runs),) = plan_grid(request(made, judged, tmp_path)).parts
    with pytest.raises(FeatureStoreError, match=r"no Dask scheduler answers at tcp://127.0.0.1:1: .*refused"):
        run_grid([(task, runs)], tmp_path, 1, "tcp://127.0.0.1:1")


def test_a_failing_run_does_not_take_the_others_with_it(made: Path, judged: Path, tmp_path: Path) -> None:
    grid = plan_grid(
        request(made, judged, tmp_path, heads=["conv"], lr=[1e30, 1e-3], settings=replace(QUICK, epochs=2))
    )
    ((task, runs),) = grid.parts
    done: dict = {}
    run_grid([(task, runs)], tmp_path, done=lambda each, result: done.update({(each.head, each.settings.lr): result}))
    assert isinstance(done["conv", 1e30], FeatureStoreError)
    assert "epoch 1, step 2" in str(done["conv", 1e30]) or "epoch 1" in str(done["conv", 1e30])
    assert isinstance(done["conv", 1e-3], dict)
    assert len(runs_table(finished_runs(tmp_path))) == 2


def test_rows_that_are_not_finite_are_named(judged: Path, tmp_path: Path) -> None:
    path = write_store(tmp_path / "bad.zarr", bad=("fc7-relu", 7))
    task = task_of(path, judged, tmp_path)
    with pytest.raises(FeatureStoreError, match=r"'fc7-relu' hold NaN or infinite .*verify_store"):
        train_run(task, Run("fc7-relu", "conv", QUICK), tmp_path)


def test_a_full_disk_is_said_and_the_checkpoint_stays(made: Path, judged: Path, tmp_path: Path) -> None:
    """The system refuses to write the second state; the one before it is still there, and training goes on from it."""
    task = task_of(made, judged, tmp_path)
    each = Run("fc7-relu", "conv", replace(QUICK, epochs=3))
    folder = tmp_path / each.name(task)
    wanted = train_run(task, each, tmp_path / "elsewhere")
    folder.mkdir()

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(label: str, epoch) -> None:
        if epoch.epoch == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    try:
        with pytest.raises(FeatureStoreError, match=r"could not be written.*space"):
            train_run(task, each, tmp_path, fill, every=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (folder / "state.safetensors").exists()
    epochs: list[int] = []
    again = train_run(task, each, tmp_path, lambda label, epoch: epochs.append(epoch.epoch))
    assert epochs == [2, 3]
    assert again["accuracy"] == wanted["accuracy"]


def test_identities_from_views_never_trained_on(made: Path, tmp_path: Path) -> None:
    grid = plan_grid(
        request(
            made,
            None,
            tmp_path,
            heads=["identity"],
            layers=[],
            fractions=(0.5, 0.25, 0.25),
            hold_out=["up"],
            settings=replace(QUICK, epochs=30),
        )
    )
    ((task, runs),) = grid.parts
    assert [each.layer for each in runs] == ["fc7-relu", "maxp_5_3"]
    assert set(task.table["view"][task.split.part == 2]) == {"up"}
    for each in runs:
        assert train_run(task, each, tmp_path)["accuracy"] > 0.9
    folder = tmp_path / runs[0].name(task)
    head = load_head(folder / "weights.safetensors", "fc7-relu")
    assert isinstance(head, IdentityHead)
    assert head.faces == tuple(f"face-{i + 1:03d}" for i in range(N_FACES))
    assert task.chance == 1 / N_FACES
    assert len(task.items) == N_FACES * len(VIEWS)


@pytest.mark.parametrize("head", ["conv", "fc", "identity"])
def test_a_trained_head_runs_in_the_published_modules(made: Path, judged: Path, tmp_path: Path, head: str) -> None:
    """Standardisation is folded in, so raw rows give the same logits there; and it loads back here."""
    identity = head == "identity"
    grid = plan_grid(
        request(
            made,
            None if identity else judged,
            tmp_path,
            heads=[head],
            fractions=(0.5, 0.25, 0.25),
            settings=replace(QUICK, epochs=2),
        )
    )
    task, runs = grid.parts[-1]
    each = runs[-1]
    train_run(task, each, tmp_path)
    ours = load_head(tmp_path / each.name(task) / "weights.safetensors", "fc7-relu")
    assert ours.scale != 1
    export(ours, tmp_path / "there.pth", "fc7-relu")
    state = torch.load(tmp_path / "there.pth")
    rows = FeatureStore.open(made).source().rows("fc7-relu").gather(range(12))
    if identity:
        theirs = torch.nn.Linear(400, N_FACES)
        theirs.load_state_dict({key.removeprefix("decision_layer.fc_d."): value for key, value in state.items()})
        three, logits = (rows,), theirs(rows)
    else:
        there = Published(7, 400, head == "conv", parallel=False).eval()
        there.load_state_dict(state, strict=True)
        three = rows.view(4, 3, 400).unbind(1)
        logits = there(*three)
    assert torch.allclose(ours(*three), logits, rtol=1e-4, atol=1e-4)
    back = load_head(tmp_path / "there.pth", "fc7-relu", shape=(400,))
    assert torch.allclose(back(*three), logits, rtol=1e-4, atol=1e-4)


def test_checkpoints_that_do_not_fit_are_refused_by_key(made: Path, judged: Path, tmp_path: Path) -> None:
    task = task_of(made, judged, tmp_path)
    each = Run("fc7-relu", "conv", replace(QUICK, epochs=1))
    train_run(task, each, tmp_path)
    ours = tmp_path / each.name(task) / "weights.safetensors"
    with pytest.raises(FeatureStoreError, match="trained on layer 'fc7-relu', not on 'maxp_5_3'"):
        load_head(ours, "maxp_5_3")
    with pytest.raises(FeatureStoreError, match=r"takes rows of \(400,\)"):
        load_head(ours, "fc7-relu", shape=(4096,))
    export(load_head(ours, "fc7-relu"), tmp_path / "a.pth", "fc7-relu")
    state = torch.load(tmp_path / "a.pth")
    with pytest.raises(FeatureStoreError, match=r"vgg_core_bridge.fc8.weight \(300, 400\) \(needed: \(300, 4096\)\)"):
        load_head(tmp_path / "a.pth", "fc7-relu")
    torch.save(
        {key: value for key, value in state.items() if key != "decision_block.conv_d_9_2.bias"}, tmp_path / "b.pth"
    )
    with pytest.raises(FeatureStoreError, match=r"1 missing: decision_block\.conv_d_9_2\.bias"):
        load_head(tmp_path / "b.pth", "fc7-relu", shape=(400,))
    with pytest.raises(FeatureStoreError, match=r"unexpected: .*conv_d_9_"):
        load_head(tmp_path / "a.pth", "fc6-relu", shape=(400,))
    torch.save({**state, "vgg_core.vgg_core.features.conv_1_1.weight": torch.zeros(3)}, tmp_path / "c.pth")
    with pytest.raises(FeatureStoreError, match="ignore_backbone"):
        load_head(tmp_path / "c.pth", "fc7-relu", shape=(400,))
    assert load_head(tmp_path / "c.pth", "fc7-relu", shape=(400,), ignore_backbone=True)
    torch.save({"weight": torch.zeros(3)}, tmp_path / "d.pth")
    with pytest.raises(FeatureStoreError, match="no checkpoint of a head"):
        load_head(tmp_path / "d.pth", "fc7-relu")
    with pytest.raises(FeatureStoreError, match="no similarity head"):
        export(draw_head("similarity", (400,), 0), tmp_path / "e.pth", "fc7-relu")


def test_a_hostile_checkpoint_runs_no_code(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"vgg_core_bridge.fc8.weight": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(FeatureStoreError, match="can run code"):
        load_head(tmp_path / "hostile.pth", "fc7-relu")
    assert not (tmp_path / "ran").exists()


def test_other_photographs_are_another_run(made: Path, judged: Path, tmp_path: Path) -> None:
    """A store of the same keys, network and trials, but other images: nothing of the first one's runs may be taken."""
    other = write_store(tmp_path / "other.zarr", image="another")
    each = Run("fc7-relu", "zero-shot", QUICK)
    names = [each.name(task_of(path, judged, tmp_path)) for path in (made, other)]
    assert names[0] != names[1]


def test_training_in_bfloat16_stays_close(made: Path, judged: Path, tmp_path: Path) -> None:
    task = task_of(made, judged, tmp_path)
    features = Features([FeatureStore.open(made).source().rows("fc7-relu")])
    losses = {}
    for precision in ("fp32", "bf16"):
        head = draw_head("conv", (400,), 0)
        progress = train(head, features, task.examples, replace(QUICK, epochs=1, precision=precision))
        losses[precision] = progress.history[0].train_loss
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


@pytest.mark.parametrize("rows_learn", [False, True])
def test_products_in_bfloat16_have_the_gradients_of_products_in_float32(rows_learn: bool) -> None:
    torch.manual_seed(0)
    weight, rows = torch.randn(30, 50, requires_grad=True), torch.randn(9, 50, requires_grad=rows_learn)
    upstream = torch.randn(9, 30)
    product = low_product(rows, weight)
    torch.testing.assert_close(product, rows @ weight.t(), rtol=0.02, atol=0.1)
    (product * upstream).sum().backward()
    torch.testing.assert_close(weight.grad, upstream.t() @ rows.detach(), rtol=0.02, atol=0.1)
    if rows_learn:
        torch.testing.assert_close(rows.grad, upstream @ weight.detach(), rtol=0.02, atol=0.1)


def _processor_with(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """A processor that says it can do ``names``."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True), raising=False)


def test_auto_precision_is_what_the_processor_is_fast_at(
    made: Path, judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And recorded as such: nothing says auto, and a run is the same whether its precision was chosen or asked for."""
    options = {"heads": ["conv", "similarity"], "precision": "auto"}

    def chosen() -> dict[str, Run]:
        ((_, runs),) = plan_grid(request(made, judged, tmp_path, **options)).parts
        return {run.head: run for run in runs}

    _processor_with(monkeypatch, "avx512_f", "avx512_vnni")
    slow, task = chosen(), task_of(made, judged, tmp_path)
    assert {run.settings.precision for run in slow.values()} == {"fp32"}
    for feature in ("amx_bf16", "avx512_bf16"):
        _processor_with(monkeypatch, feature)
        assert {head: run.settings.precision for head, run in chosen().items()} == {
            "zero-shot": "fp32",
            "conv": "bf16",
            "similarity": "fp32",  # has no bridge, so an earlier run of it is read
        }
    fast = chosen()
    asked = {**options, "precision": None, "settings": replace(QUICK, precision="bf16")}
    ((_, runs),) = plan_grid(request(made, judged, tmp_path, **asked)).parts
    (conv,) = (run for run in runs if run.head == "conv")
    assert conv.identity(task) == fast["conv"].identity(task) != slow["conv"].identity(task)
    assert fast["similarity"].identity(task) == slow["similarity"].identity(task)
    assert fast["conv"].config(task)["settings"]["precision"] == "bf16"


def test_auto_precision_goes_on_with_what_was_begun(
    made: Path, judged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, and with another seed: a mean over seeds is of one precision."""
    options = {"heads": ["conv"], "precision": "auto", "settings": replace(QUICK, epochs=1)}
    _processor_with(monkeypatch, "amx_bf16")
    grid = plan_grid(request(made, judged, tmp_path, **options))
    run_grid(grid.parts, tmp_path)
    table, _ = write_runs_table(tmp_path)
    assert table.set_index("head")["precision"]["conv"] == "bf16"
    _processor_with(monkeypatch)
    again = plan_grid(request(made, judged, tmp_path, seeds=(0, 1), **options))
    assert again.finished == 2
    assert [run.settings.precision for _, runs in again.parts for run in runs if run.head == "conv"] == ["bf16"] * 2
    elsewhere = plan_grid(request(made, judged, tmp_path / "elsewhere", **options))
    assert [run.settings.precision for _, runs in elsewhere.parts for run in runs] == ["fp32"] * 2


def test_a_precision_that_there_is_not_is_refused() -> None:
    with pytest.raises(FeatureStoreError, match="'auto' is not possible; it is one of fp32, tf32, bf16"):
        Settings(precision="auto")


def test_conditions_choose_the_items_of_identities(made: Path, tmp_path: Path) -> None:
    options = {"heads": ["identity"], "fractions": (0.5, 0.25, 0.25), "where": ["gender == 'female'"]}
    ((task, _),) = plan_grid(request(made, None, tmp_path, **options)).parts
    assert task.classes == tuple(f"face-{i:03d}" for i in range(1, N_FACES + 1, 2))
    assert len(task.items) == N_FACES // 2 * len(VIEWS)


@pytest.mark.parametrize(("dtype", "compress"), [("float16", "none"), ("float32", "zstd"), ("float16", "blosc")])
def test_heads_train_from_every_kind_of_store(judged: Path, tmp_path: Path, dtype: str, compress: str) -> None:
    path = write_store(tmp_path / "kind.zarr", dtype=dtype, compress=compress)
    task = task_of(path, judged, tmp_path)
    assert train_run(task, Run("fc7-relu", "similarity", replace(QUICK, epochs=1)), tmp_path)["n_test"] > 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_a_gpu_reaches_what_the_cpu_reaches(made: Path, judged: Path, tmp_path: Path) -> None:
    task = task_of(made, judged, tmp_path)
    scores = {}
    for device in ("cpu", "cuda"):
        settings = replace(QUICK, epochs=20, device=device)
        scores[device] = train_run(task, Run("fc7-relu", "similarity", settings), tmp_path)["accuracy"]
    assert scores["cuda"] == pytest.approx(scores["cpu"], abs=0.1)


def test_answers_that_are_not_numbers_are_never_scored(judged: Path, tmp_path: Path) -> None:
    path = write_store(tmp_path / "bad.zarr", bad=("fc7-relu", 7))
    with pytest.raises(FeatureStoreError, match=r"not finite numbers.*'fc7-relu'.*verify_store"):
        train_run(task_of(path, judged, tmp_path), Run("fc7-relu", "zero-shot", QUICK), tmp_path)


def test_same_person_trials_obey_conditions_and_refuse_what_has_no_effect(made: Path, tmp_path: Path) -> None:
    options = {"n_trials": 200, "where": ["gender == 'female'"]}
    ((task, _),) = plan_grid(request(made, "same-person", tmp_path, **options)).parts
    assert {int(face[-3:]) % 2 for face in task.table["face_1"]} == {1}
    with pytest.raises(FeatureStoreError, match=r"names no column|cannot be evaluated"):
        plan_grid(request(made, "same-person", tmp_path, where=["nonsense > 3"]))
    with pytest.raises(FeatureStoreError, match="have no sessions"):
        plan_grid(request(made, "same-person", tmp_path, view="frontal"))


def test_each_measure_is_compared_with_its_own_zero_shot(made: Path, judged: Path, tmp_path: Path) -> None:
    for measure in ("cosine", "dot"):
        grid = plan_grid(request(made, judged, tmp_path, measure=measure, settings=replace(QUICK, epochs=1)))
        run_grid(grid.parts, tmp_path)
    table = runs_table(finished_runs(tmp_path))
    assert table[table["head"] == "zero-shot"]["p_zero_shot"].isna().all()
    for measure in ("cosine", "dot"):
        own = table[table["measure"] == measure].set_index("head")
        right = {
            head: pd.read_csv(tmp_path / own.loc[head, "name"] / "predictions.csv")["correct"].to_numpy()
            for head in ("similarity", "zero-shot")
        }
        assert own.loc["similarity", "p_zero_shot"] == paired_test(right["similarity"], right["zero-shot"]).p


def test_the_ceiling_follows_the_participants(made: Path, tmp_path: Path) -> None:
    table = write_trials(tmp_path / "t.csv", 300, raters=3, error=0.1)
    each = Run("fc7-relu", "zero-shot", QUICK)
    assert train_run(task_of(made, tmp_path / "t.csv", tmp_path), each, tmp_path)["ceiling"] > 0.5
    table.assign(participant="one").to_csv(tmp_path / "t.csv", index=False)
    assert train_run(task_of(made, tmp_path / "t.csv", tmp_path), each, tmp_path)["ceiling"] is None


def test_sources_stored_in_different_precisions_train_together(tmp_path: Path) -> None:
    path = write_store(tmp_path / "two.zarr", "a", dtype="float16")
    write_store(path, "b")
    table = write_trials(tmp_path / "t.csv", 300)
    table.assign(session=["A", "B"] * 150).to_csv(tmp_path / "t.csv", index=False)
    sessions = Sessions({}, {"A": "a", "B": "b"})
    ((task, runs),) = plan_grid(request(path, tmp_path / "t.csv", tmp_path, sessions=sessions)).parts
    assert train_run(task, runs[0], tmp_path)["accuracy"] > 0.35


def test_the_same_head_twice_is_one_run(made: Path, judged: Path, tmp_path: Path) -> None:
    grid = plan_grid(request(made, judged, tmp_path, heads=["similarity", "similarity"], lr=[1e-3, 1e-3], seeds=[0, 0]))
    assert grid.runs == 2


def test_identities_keep_their_names_through_the_published_file(tmp_path: Path) -> None:
    names = ["1", "10", "2", "3"]
    head = draw_head("identity", (6,), 0, faces=names)
    export(head, tmp_path / "multi.pth", "fc7-relu")
    assert load_head(tmp_path / "multi.pth", "fc7-relu", (6,), faces=names).faces == tuple(names)
    assert load_head(tmp_path / "multi.pth", "fc7-relu", (6,)).faces == ("class-1", "class-2", "class-3", "class-4")
    with pytest.raises(FeatureStoreError, match="4 classes; 2 faces"):
        load_head(tmp_path / "multi.pth", "fc7-relu", (6,), faces=["a", "b"])


def test_a_few_bytes_do_not_pass_for_gigabytes(tmp_path: Path) -> None:
    state = {
        "decision_layer.fc_d.weight": torch.zeros(1).expand(20_000_000, 4096),
        "decision_layer.fc_d.bias": torch.zeros(1).expand(20_000_000),
    }
    torch.save(state, tmp_path / "bomb.pth")
    assert (tmp_path / "bomb.pth").stat().st_size < 10_000
    with pytest.raises(FeatureStoreError, match="does not hold as many numbers"):
        load_head(tmp_path / "bomb.pth", "fc7-relu")


def test_stopping_ends_runs_in_threads(made: Path, judged: Path, tmp_path: Path) -> None:
    """What Ctrl-C sets is seen before the next step; the run goes on later."""
    task = task_of(made, judged, tmp_path)
    each = Run("fc7-relu", "similarity", replace(QUICK, epochs=5))
    try:
        with pytest.raises(FeatureStoreError, match="stopped"):
            train_run(task, each, tmp_path, lambda label, epoch: STOP.set(), every=0)
    finally:
        STOP.clear()
    seen: list[int] = []
    train_run(task, each, tmp_path, lambda label, epoch: seen.append(epoch.epoch))
    assert seen[0] == 2


@pytest.mark.parametrize("left_out", ["best_epoch", "best_loss", "history"])
def test_a_state_that_lacks_a_part_is_refused(tmp_path: Path, left_out: str) -> None:
    head = draw_head("similarity", (4,), 0)
    adam = torch.optim.Adam(head.parameters())
    path = tmp_path / "state.safetensors"
    Checkpoint(path, "a run").save(head, adam, TrainingState([], {}, 0, 1.5))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    about = json.loads(metadata["progress"])
    del about[left_out]
    save_file(load_file(path), path, {**metadata, "progress": json.dumps(about)})
    with pytest.raises(FeatureStoreError, match=f"is damaged: '{left_out}'. Delete it"):
        Checkpoint(path, "a run").restore(head, adam)


def test_rows_of_batches_are_those_of_gather_and_the_next_are_asked_for(small_store: Path) -> None:
    rows = FeatureStore.open(small_store).rows("maxp_2_2")
    features, parts = Features([rows]), torch.arange(10).split(4)
    for number, (given, (items,)) in enumerate(features.gathered(zip(parts, strict=True))):
        assert torch.equal(items, parts[number])
        assert torch.equal(given, FeatureStore.open(small_store).rows("maxp_2_2").gather(items))
        if number < 2:
            assert rows._ahead.announced is not None
            assert torch.equal(rows._ahead.announced, parts[number + 1])
    assert rows._ahead.announced is None
