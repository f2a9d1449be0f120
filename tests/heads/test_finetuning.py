"""Fine-tuning: plain autograd's gradient, rows from the cache or the photographs, resuming, and the tuned network as a source."""

import json
import multiprocessing
import shutil
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from featurestore import FeatureStore, FeatureStoreError
from featurestore.caching.extractor import load_extractor, load_part
from featurestore.caching.provenance import recipe_of
from featurestore.checkpoints.seeded import draw_weights
from featurestore.checkpoints.weights import open_weights
from featurestore.keys import FLIPPED
from featurestore.networks.registry import get_backbone
from featurestore.networks.shapes import layer_shapes, with_input_size
from featurestore.photos.decode import decode
from heads import compare, export, load_head, summary
from heads.finetuned_runs import finetuning_features
from heads.finetuning import FinetunedHead, NetworkPart
from heads.grid import Grid, GridRequest, plan_grid
from heads.registry import draw_head
from heads.runs import Run, train_run
from heads.runs_table import finished_runs, runs_table
from heads.schedule import run_grid
from heads.tasks import Task
from heads.train import Epoch, Preparation, Settings
from tests.commands import FORKS, command
from tests.conftest import write_photographs
from tests.heads.conftest import cache, write_store
from tests.heads.tiny_network import NAME

SPEC = with_input_size(get_backbone(NAME), 32)
SHAPES = layer_shapes(SPEC)
QUICK = Settings(batch_size=64, epochs=2, patience=9, threads=1)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny network with random weights on 24 photographs, in folder/photographs; block1 is cached, relu1 is not."""
    folder = tmp_path_factory.mktemp("cached")
    cache(write_photographs(folder / "photographs", 8, 3), folder / "s.zarr", ["block1", "flatten", "descriptor"])
    return folder / "s.zarr"


def grid_of(store: Path, out: Path, **options) -> Grid:
    defaults = {"layers": ["descriptor"], "heads": ["similarity"], "lr": [1e-3], "trials": "same-person"}
    defaults["backbone"] = NAME if "finetune_from" in options else None
    return plan_grid(GridRequest(store, out, n_trials=120, **{**defaults, "settings": QUICK, **options}))


def tuned_of(store: Path, out: Path, **options) -> tuple[Task, Run]:
    """The fine-tuned run of a grid of one."""
    grid = grid_of(store, out, **options)
    return next((task, run) for task, runs in grid.parts for run in runs if run.settings.finetune_from)


def weights_in(out: Path, task: Task, run: Run) -> dict[str, torch.Tensor]:
    return load_file(out / run.name(task) / "weights.safetensors")


@pytest.mark.parametrize("chunk", [2, 99])
@pytest.mark.parametrize("head", ["similarity", "conv", "fc", "identity"])
def test_the_gradient_is_that_of_plain_autograd(head: str, chunk: int) -> None:
    """In double precision; all rows in one pass, or recomputed two at a time."""
    weights = open_weights("random:3", SPEC)
    part = NetworkPart.of(SPEC, "block1", "descriptor", 32)
    options = {"faces": ["a", "b", "c", "d"]} if head == "identity" else {}
    inner = draw_head(head, (24,), 0, **options)
    if head == "similarity":
        torch.nn.init.normal_(inner.up, std=0.1)
    tuned = FinetunedHead(part, SPEC, load_part(SPEC, "block1", "descriptor", weights), inner).double().train()
    tuned.__dict__["chunk"] = chunk
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(7, *SHAPES["block1"], generator=generator, dtype=torch.float64)
    examples = torch.randint(0, 7, (9, tuned.n_places), generator=generator)
    labels = torch.randint(0, 3, (9,), generator=generator)
    inner.eval()  # no dropout in forward, none in accumulate without a generator
    loss = F.cross_entropy(tuned(*(rows[places] for places in examples.unbind(1))), labels)
    penalty = inner.penalty()
    (loss if penalty is None else loss + penalty).backward()
    wanted = {name: weight.grad.clone() for name, weight in tuned.named_parameters()}
    tuned.zero_grad()
    value, logits = tuned.accumulate(rows, examples, labels, None)
    assert value.item() == pytest.approx(float(loss.detach() + (0 if penalty is None else penalty.detach())))
    assert logits.shape == (9, 4 if head == "identity" else 3)
    for name, weight in tuned.named_parameters():
        assert torch.allclose(weight.grad, wanted[name], rtol=1e-8, atol=1e-12), name
    assert max(float(wanted[name].abs().max()) for name in wanted if name.startswith("backbone.")) > 0


def test_batch_norm_keeps_its_statistics_and_a_branch_is_named() -> None:
    spec = get_backbone("resnet50_ft")
    part = load_part(spec, "layer4.1", "layer4", open_weights("random:0", spec))
    before = {name: value.clone() for name, value in part.named_buffers()}
    part(torch.rand(2, *layer_shapes(spec, ["layer4.1"])["layer4.1"])).sum().backward()
    assert before
    assert all(torch.equal(before[name], value) for name, value in part.named_buffers())
    assert all(weight.grad is not None for weight in part.parameters())
    with pytest.raises(FeatureStoreError, match=r"'layer4.2.bn3': a branch .* it can be: layer4.1, layer4.0, layer3"):
        load_part(spec, "layer4.2.bn3", "layer4", open_weights("random:0", spec))


def test_the_part_computes_what_the_whole_network_does() -> None:
    weights = open_weights("random:1", SPEC)
    names = ["relu1", "block1", "block2", "descriptor"]
    whole = load_extractor(SPEC, names, weights, torch.device("cpu"), torch.float32)
    images = torch.rand(2, 3, 32, 32)
    made = whole(images)
    for start, end in (("relu1", "block2"), ("block1", "descriptor"), (None, "descriptor")):
        part = load_part(SPEC, start, end, weights)
        reached = part(images if start is None else made[start])
        assert torch.allclose(reached, made[end], rtol=1e-4, atol=1e-5 * float(made[end].abs().max()))


@pytest.mark.parametrize("augment", ["", "flip"])
def test_rows_from_the_cache_and_from_photographs_give_the_same_weights(
    cached: Path, tmp_path: Path, augment: str
) -> None:
    cache(cached.parent / "photographs", tmp_path / "less.zarr", ["descriptor"])
    both = []
    for store in (cached, tmp_path / "less.zarr"):
        grid = grid_of(store, tmp_path / store.stem, finetune_from="block1", augment=augment)
        (plan,) = grid.finetuning.values()
        assert plan.cached == (store == cached)
        assert (plan.photographs > 0) == (bool(augment) or store != cached)
        task, run = grid.parts[0][0], grid.parts[0][1][-1]
        train_run(task, run, grid.out)
        assert not [path for path in (grid.out / run.name(task)).iterdir() if path.suffix in (".tmp", ".npy")]
        both.append(weights_in(grid.out, task, run))
    assert all(torch.allclose(both[0][key], both[1][key], rtol=1e-3, atol=1e-5) for key in both[0])
    drawn = open_weights("random:0", SPEC)
    before = drawn.read(drawn.keys)
    assert any(not torch.equal(both[0][f"backbone.{key}"], before[key]) for key in before if key.startswith("block2"))


def test_mirrored_rows_are_those_of_mirrored_photographs_and_of_training_alone(cached: Path, tmp_path: Path) -> None:
    """Rows of ``input``: every pixel of each photograph, mirrored by NumPy, for the items that the epoch chooses."""
    task, run = tuned_of(cached, tmp_path, finetune_from="input", augment="flip")
    weights = open_weights("random:0", SPEC)
    part = NetworkPart.of(SPEC, "input", "descriptor", 32)
    head = FinetunedHead(part, SPEC, load_part(SPEC, None, "descriptor", weights), draw_head("similarity", (24,), 0))
    told = []
    features = finetuning_features(task, run, head, weights, tmp_path, told.append)
    assert told[-1].done == told[-1].total == len(np.unique(task.items[task.split.part == 0])) + 24
    source = FeatureStore.open(cached).source()
    recipe = recipe_of(source)
    items = torch.arange(24)
    assert set(items.tolist()) == set(np.unique(task.items[task.split.part == 0]))

    def pixels(item: int, flip: bool) -> torch.Tensor:
        rgb = decode(Path(source.items["path"].iloc[item]).read_bytes())
        return recipe.normalise(torch.from_numpy(recipe.pixels(rgb[:, ::-1].copy() if flip else rgb)[None]))[0]

    chosen = []
    for epoch in (1, 2, 1):
        rows = features.augmented(0, epoch)(items).clone()
        flipped = [torch.equal(rows[item], pixels(item, True)) for item in range(24)]
        assert all(flip or torch.equal(rows[item], pixels(item, False)) for item, flip in enumerate(flipped))
        chosen.append(flipped)
    assert 3 < sum(chosen[0]) < 21
    assert chosen[0] == chosen[2] != chosen[1]
    plain = features.gather(items)
    assert all(torch.equal(plain[item], pixels(item, False)) for item in range(24))
    assert source.keys[0][1] + FLIPPED not in source.keys.get_level_values(1)


def _train(task: Task, run: Run, folder: Path, pipe: Connection) -> None:
    train_run(task, run, folder, lambda label, line: pipe.send((label, isinstance(line, Epoch))), every=0.0)


def test_a_killed_run_goes_on_to_the_same_weights(cached: Path, tmp_path: Path) -> None:
    """A real process, killed with SIGKILL after its second epoch of fine-tuning, from photographs that it mirrors."""
    task, run = tuned_of(
        cached, tmp_path, finetune_from="relu1", augment="flip", settings=replace(QUICK, epochs=4), heads=["conv"]
    )
    train_run(task, run, tmp_path / "alone")
    here, there = multiprocessing.Pipe(duplex=False)
    process = FORKS.Process(target=_train, args=(task, run, tmp_path / "killed", there))
    process.start()
    there.close()
    epochs = 0
    while epochs < 2:
        label, is_epoch = here.recv()
        epochs += is_epoch and label == run.label
    process.kill()
    process.join()
    folder = tmp_path / "killed" / run.name(task)
    assert (folder / "state.safetensors").exists()
    assert not (folder / "result.json").exists()
    lines = []
    train_run(task, run, tmp_path / "killed", lambda label, line: lines.append(line))
    assert next(line.epoch for line in lines if isinstance(line, Epoch)) > 1
    first, second = (weights_in(tmp_path / which, task, run) for which in ("alone", "killed"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    columns = ["epoch", "train_loss", "validation_loss", "best"]
    tables = [pd.read_csv(tmp_path / which / run.name(task) / "metrics.csv")[columns] for which in ("alone", "killed")]
    assert tables[0].equals(tables[1])


def test_the_tuned_network_is_a_source_of_its_own(cached: Path, tmp_path: Path) -> None:
    """Its rows are those of the fine-tuned head's own part; frozen layers are as they were; random is called random."""
    out = tmp_path / "runs"
    every_epoch = (0.7, 0.0, 0.3)  # without validation the last one's weights are kept
    task, run = tuned_of(
        cached, out, finetune_from="block1", backbone_lr=1e-2, heads=["identity"], trials=None, fractions=every_epoch
    )
    result = train_run(task, run, out)
    folder = out / run.name(task)
    head = load_head(folder / "weights.safetensors", "block1", backbone=NAME)
    store = FeatureStore.open(cached)
    images = cached.parent / "photographs"
    cache(images, tmp_path / "t.zarr", ["block1", "block2", "descriptor"], weights=str(folder))
    tuned = FeatureStore.open(tmp_path / "t.zarr").source()
    with torch.no_grad():
        wanted = head.layer_rows(store.rows("block1").gather(range(24)))
    found = tuned.rows("descriptor").gather(range(24))
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    was = store.rows("descriptor").gather(range(24))
    assert not torch.allclose(found, was, rtol=1e-2, atol=1e-2 * float(was.abs().max()))
    assert torch.equal(tuned.rows("block1").gather(range(24)), store.rows("block1").gather(range(24)))
    assert tuned.name != store.source().name
    assert tuned.weights == f"{run.name(task)}, fine-tuned from random:0 (random numbers, not a trained network)"
    assert tuned.attributes["licence"] == "none: fine-tuned from seeded random weights"
    alone = load_head(folder / "weights.safetensors", "descriptor", ignore_backbone=True)
    logits = alone(found)
    assert torch.allclose(logits, head(store.rows("block1").gather(range(24))), rtol=1e-3, atol=1e-3)
    test = task.split.indices("test")
    right = (logits[task.items[test, 0]].argmax(1).numpy() == task.labels[test]).mean()
    assert result["accuracy"] == pytest.approx(right)
    with pytest.raises(FeatureStoreError, match=r"Cache these with `weights` .*ignore_backbone"):
        load_head(folder / "weights.safetensors", "descriptor")
    with pytest.raises(FeatureStoreError, match=r"from 'block1' on layer 'descriptor'; it takes no rows of 'pool'"):
        load_head(folder / "weights.safetensors", "pool")
    with pytest.raises(FeatureStoreError, match=r"which is code outside of this program.*`backbone` "):
        load_head(folder / "weights.safetensors", "block1")
    with pytest.raises(FeatureStoreError, match="a folder of a run that did not fine-tune the network"):
        open_weights(str(out / run.frozen.name(task)), SPEC)


def test_the_frozen_run_is_continued_and_both_stand_in_the_table(cached: Path, tmp_path: Path) -> None:
    """With a learning rate of next to nothing and no epoch that is better, the fine-tuned head is the frozen one."""
    task, run = tuned_of(cached, tmp_path, finetune_from="block1", lr=[1e-12], backbone_lr=1e-12)
    train_run(task, run, tmp_path)
    frozen, tuned = weights_in(tmp_path, task, run.frozen), weights_in(tmp_path, task, run)
    assert all(torch.allclose(frozen[key], tuned[f"head.{key}"], atol=1e-9) for key in frozen)
    drawn = open_weights("random:0", SPEC)
    kept = load_file(tmp_path / run.name(task) / "backbone.safetensors")
    assert kept.keys() == drawn.keys
    assert all(torch.allclose(value, kept[key], rtol=0, atol=1e-9) for key, value in drawn.read(drawn.keys).items())
    table = runs_table(finished_runs(tmp_path)).set_index("name")
    assert table.loc[run.name(task), "finetune_from"] == "block1"
    assert pd.isna(table.loc[run.frozen.name(task), "finetune_from"])
    accuracies = table["accuracy"]
    assert accuracies[run.name(task)] == accuracies[run.frozen.name(task)]
    written = json.loads((tmp_path / run.frozen.name(task) / "config.json").read_text())
    assert not {"finetune_from", "backbone_lr", "augment"} & written["settings"].keys()
    again = train_run(task, run, tmp_path)
    assert again["accuracy"] == accuracies[run.name(task)]


def test_identities_of_runs_tell_what_was_fine_tuned(cached: Path, tmp_path: Path) -> None:
    task, run = tuned_of(cached, tmp_path, finetune_from="block1")
    assert run.settings.backbone_lr == pytest.approx(1e-4)
    plain = grid_of(cached, tmp_path).parts[0][1][-1]
    assert run.frozen.identity(task) == plain.identity(task)
    settings = [replace(run.settings, augment="flip"), replace(run.settings, backbone_lr=1e-3)]
    others = [replace(run, settings=each) for each in settings]
    assert len({each.identity(task) for each in (plain, run, *others)}) == 4
    assert run.name(task).startswith("descriptor-similarity-from-block1-lr0.001-seed0-")


def test_a_grid_in_several_workers_waits_for_the_frozen_run(cached: Path, tmp_path: Path) -> None:
    grid = grid_of(
        cached, tmp_path, finetune_from="relu1", heads=["fc"], seeds=[0, 1], settings=replace(QUICK, epochs=1)
    )
    done, said = {}, []
    with pytest.raises(FeatureStoreError, match=r"cannot be trained in threads side by side.*`scheduler` processes"):
        run_grid(grid.parts, tmp_path, 2, "threads")
    run_grid(
        grid.parts,
        tmp_path,
        2,
        "processes",
        lambda label, line: said.append(line),
        lambda run, result: done.update({run.label: result}),
    )
    assert len(done) == grid.runs == 5
    assert not [str(result) for result in done.values() if not isinstance(result, dict)]
    assert sum(isinstance(line, Preparation) and line.done == line.total == 24 for line in said) == 2
    compared = compare(tmp_path, ["descriptor:fc", "descriptor:fc:relu1"])
    assert compared["seeds"].tolist() == ["2, 2"]


def test_the_plan_says_what_is_unfrozen_and_where_rows_come_from(cached: Path, tmp_path: Path) -> None:
    line = [
        "--store",
        cached,
        "--layers",
        "descriptor",
        "--heads",
        "similarity",
        "--trials",
        "same-person",
        "--dry-run",
    ]
    line += ["--out", tmp_path, "--backbone", NAME, "--augment", "flip"]
    done = command("train_heads", *line, "--finetune-from", "block1")
    assert done.returncode == 0, done.stderr
    assert "unfrozen block2.conv, block2.norm, descriptor (3 of 6 blocks), 1,384 parameters; 984 frozen" in done.stdout
    assert "rows of block1 from the cache; rows of block1 of 24 photographs, read once for each run" in done.stdout
    assert "begins with the trained head and random:0 (random numbers, not a trained network)" in done.stdout
    done = command("train_heads", *line, "--finetune-from", "input")
    assert "(6 of 6 blocks), 2,368 parameters; 0 frozen" in done.stdout
    assert "pixels of 48 photographs" in done.stdout
    done = command("train_heads", *line, "--finetune-from", "block9")
    assert done.returncode == 1
    assert "has no layer 'block9'" in done.stderr


def test_the_summary_says_which_blocks_are_trained(cached: Path, tmp_path: Path) -> None:
    weights = open_weights("random:0", SPEC)
    part = NetworkPart.of(SPEC, "block1", "descriptor", 32)
    head = FinetunedHead(part, SPEC, load_part(SPEC, "block1", "descriptor", weights), draw_head("fc", (24,), 0))
    text = summary(head)
    told = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.endswith(("True", "False"))}
    assert told["block1.norm"] == told["conv1"] == "False"
    assert told["block2.norm"] == told["descriptor"] == "True"
    assert "Trainable" in text
    done = command(
        "train_heads", "--store", cached, "--layers", "descriptor", "--heads", "fc", "--trials", "same-person", "--out", tmp_path,
        "--finetune-from", "block1", "--backbone", NAME, "--draw", tmp_path / "head.svg",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "backbone.descriptor" in (tmp_path / "head.svg").read_text()


@pytest.mark.parametrize("head", ["identity", "conv"])
def test_the_published_end_to_end_file_loads_and_is_written(tmp_path: Path, head: str) -> None:
    """``vgg_core.features.*`` with ``decision_layer.*``, or ``vgg_core.vgg_core.features.*`` and a bridge; and without."""
    spec = get_backbone("vggface")
    shapes = {key: shape for key, shape in spec.weight_shapes().items() if key.startswith("features.")}
    drawn = draw_weights(0, shapes, shapes)
    torch.save({key.removeprefix("features."): value for key, value in drawn.items()}, tmp_path / "core.pth")
    weights = open_weights(str(tmp_path / "core.pth"), spec)
    part = NetworkPart.of(spec, "relu_5_2", "maxp_5_3", 224)
    options = {"faces": ["a", "b"]} if head == "identity" else {}
    inner = draw_head(head, (512, 7, 7), 0, **options).eval()
    tuned = FinetunedHead(part, spec, load_part(spec, "relu_5_2", "maxp_5_3", weights), inner).eval()
    with torch.no_grad():
        tuned.backbone.get_parameter("features.conv_5_3.bias").add_(1)
    export(tuned, tmp_path / "whole.pth", "maxp_5_3", core=tmp_path / "core.pth")
    prefix = "vgg_core." if head == "identity" else "vgg_core.vgg_core."
    state = torch.load(tmp_path / "whole.pth")
    assert {key for key in state if "features" in key} == {prefix + key for key in drawn}
    assert torch.equal(state[f"{prefix}features.conv_5_3.bias"], drawn["features.conv_5_3.bias"] + 1)
    assert torch.equal(state[f"{prefix}features.conv_1_1.weight"], drawn["features.conv_1_1.weight"])
    with pytest.raises(FeatureStoreError, match="holds its own backbone"):
        load_head(tmp_path / "whole.pth", "maxp_5_3")
    back = load_head(tmp_path / "whole.pth", "maxp_5_3", ignore_backbone=True)
    core = open_weights(str(tmp_path / "whole.pth"), spec)
    rows = torch.rand(3, 512, 14, 14)
    with torch.no_grad():
        maps = load_part(spec, "relu_5_2", "maxp_5_3", core)(rows)
        given = (maps,) if head == "identity" else maps.unsqueeze(1).unbind(0)
        wanted = tuned(*((rows,) if head == "identity" else rows.unsqueeze(1).unbind(0)))
        assert torch.allclose(back(*given), wanted, rtol=1e-4, atol=1e-4)
    if head == "identity":
        export(tuned, tmp_path / "head.pth", "maxp_5_3")
        assert set(torch.load(tmp_path / "head.pth")) == {"decision_layer.fc_d.weight", "decision_layer.fc_d.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finetune_from": "block9"}, "no layer 'block9'"),
        ({"finetune_from": "descriptor"}, "it is not before 'descriptor'"),
        ({"finetune_from": "block1", "backbone": None}, "computed by .* code outside of this program"),
        (
            {"finetune_from": "block2.conv"},
            "a branch of it leads to 'descriptor' beside this layer.*flatten, pool, block2, block2.relu, block1",
        ),
        ({"finetune_from": "pool", "layers": ["flatten"]}, "nothing to fine-tune"),
        ({"finetune_from": "block1", "heads": ["zero-shot"]}, "zero-shot has nothing to train"),
        ({"finetune_from": "block1", "augment": "turn"}, "`augment` 'turn' is not possible"),
        ({"finetune_from": "block1", "backbone_lr": 0.0}, "`backbone_lr` 0.0 is not a number above zero"),
        ({"backbone_lr": 1e-3}, "`backbone_lr` 0.001 is for fine-tuning"),
        ({"augment": "flip"}, "`augment` flip is for fine-tuning"),
        ({"weights": "random:0"}, "`weights` random:0 is needed only for fine-tuning"),
        ({"finetune_from": "block1", "weights": "random:1"}, "random:1 is not the weights of"),
        ({"finetune_from": "pool", "layers": ["block1"]}, "it is not before 'block1'"),
    ],
)
def test_what_cannot_be_fine_tuned_is_said_before_training(
    cached: Path, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        grid_of(cached, tmp_path, **options)


def test_photographs_that_are_gone_or_changed_are_said(cached: Path, tmp_path: Path) -> None:
    images = tmp_path / "photographs"
    shutil.copytree(cached.parent / "photographs", images)
    cache(images, tmp_path / "s.zarr", ["descriptor"])
    task, run = tuned_of(tmp_path / "s.zarr", tmp_path / "runs", finetune_from="pool")
    picture = cv2.imread(str(images / "f1" / "1.png"))
    cv2.imwrite(str(images / "f1" / "1.png"), 255 - picture)
    with pytest.raises(FeatureStoreError, match=r"f1/1.png: the photograph changed .*descriptor"):
        train_run(task, run, tmp_path / "runs")
    (images / "f1" / "1.png").unlink()
    with pytest.raises(FeatureStoreError, match=r"pool is not cached in .* 1 of 24 photographs .*f1/1.png"):
        grid_of(tmp_path / "s.zarr", tmp_path / "runs", finetune_from="pool")


def test_sources_whose_network_is_not_known_are_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "made.zarr")
    with pytest.raises(FeatureStoreError, match="computed by 'made', which is code outside of this program"):
        grid_of(store, tmp_path, layers=["fc7-relu"], finetune_from="input", backbone=None)
