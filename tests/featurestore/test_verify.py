"""Damage is found, named and repaired."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from featurestore import FeatureStore, FeatureStoreError
from featurestore.caching.provenance import weights_of
from featurestore.caching.verify import check_source, recompute_some
from featurestore.devices import choose_device
from featurestore.store.lock import store_lock
from featurestore.store.writer import SourceWriter
from pipelines.verify_store import main as verify_store
from tests.commands import command
from tests.conftest import LAYERS, forget_shard, run_pass, signed, write_photographs


@pytest.fixture
def store(tmp_path: Path) -> Path:
    run_pass(write_photographs(tmp_path / "photographs", 5, 2), tmp_path / "s.zarr", LAYERS)
    return tmp_path / "s.zarr"


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 0x40
    path.write_bytes(content)


def shard(store: Path, layer: str, number: int) -> Path:
    return FeatureStore.open(store).source().layers[layer].shard_path(number)


def test_a_sound_store_is_sound(store: Path) -> None:
    source = FeatureStore.open(store).source()
    report = check_source(source)
    recomputed = recompute_some(source, weights_of(source, None), choose_device("cpu"), report)
    assert report.sound
    assert report.records == 20
    assert set(recomputed.difference) == set(LAYERS)
    assert max(recomputed.difference.values()) <= 1e-5
    assert not recomputed.damage


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (
            lambda store: flip(shard(store, LAYERS[0], 1), 5000),
            r"layer maxp_1_2, shard 1, item \('f3', '1'\): .*checksum",
        ),
        (
            lambda store: flip(shard(store, LAYERS[1], 2), -3),
            r"layer maxp_2_2, shard 2: .*index does not match its checksum \(2 items\)",
        ),
        (
            lambda store: shard(store, LAYERS[1], 0).write_bytes(b"x" * 30),
            r"layer maxp_2_2, shard 0: .*30 bytes, fewer than its index",
        ),
        (
            lambda store: shard(store, LAYERS[0], 0).write_bytes(shard(store, LAYERS[0], 0).read_bytes()[100:]),
            r"layer maxp_1_2, shard 0: .*points outside",
        ),
    ],
)
def test_damage_is_named_and_repaired_and_nothing_else_touched(store: Path, damage, where: str) -> None:
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    damage(store)
    damaged = next(path for path, content in before.items() if path.read_bytes() != content)
    others = {path: path.stat().st_mtime_ns for path in before if path != damaged}
    found = command("verify_store", store, "--device", "cpu")
    assert found.returncode == 1
    import re

    assert re.search(where, found.stdout), found.stdout
    assert "NOT SOUND" in found.stdout
    repaired = command("verify_store", store, "--device", "cpu", "--repair")
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before


def test_rows_that_are_not_the_networks_are_found(store: Path) -> None:
    """A record with a right checksum and wrong content: only computing it again shows it."""
    source = FeatureStore.open(store).source()
    layer = source.layers[LAYERS[1]]
    with store_lock(store, "test"):
        writer = SourceWriter(store, source.name, {})
        shard_writer = writer.open_shard(LAYERS[1], 0, keep=[1, 2, 3], end=4)
        shard_writer.write([0], np.ones((1, layer.record.elements), np.float32))
        shard_writer.commit()
        writer.publish()
    assert check_source(source).sound
    found = command("verify_store", store, "--device", "cpu")
    assert found.returncode == 1
    assert "layer maxp_2_2, shard 0, item ('f1', '1'): differs from a new computation" in found.stdout


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_found(store: Path, value: float) -> None:
    source = FeatureStore.open(store).source()
    rows = np.zeros((1, source.layers[LAYERS[1]].record.elements), np.float32)
    rows[0, 7] = value
    writer = SourceWriter(store, source.name, {})
    shard_writer = writer.open_shard(LAYERS[1], 1, keep=[0, 1, 3], end=4)
    shard_writer.write([2], rows)
    shard_writer.commit()
    writer.publish()
    (damage,) = check_source(source).damage
    assert str(damage) == "layer maxp_2_2, shard 1, item ('f4', '1'): 1 values are NaN or infinite"


def test_a_layer_that_repeats_its_neighbour_is_reported(tmp_path: Path) -> None:
    """What the published extractors did: the ReLU's output kept under the convolution's name."""
    images = write_photographs(tmp_path / "p", 3, 1)
    run_pass(images, tmp_path / "s.zarr", ["conv_1_1", "relu_1_1"], items_per_shard=2)
    source = FeatureStore.open(tmp_path / "s.zarr").source()
    assert check_source(source).sound
    for number in range(2):
        shutil.copy(source.layers["relu_1_1"].shard_path(number), source.layers["conv_1_1"].shard_path(number))
    report = check_source(source)
    assert not report.sound
    assert "layers conv_1_1 and relu_1_1 are bit-identical in all 3 items" in report.suspicious[0]


def test_a_dropout_may_equal_the_relu_before_it(tmp_path: Path) -> None:
    run_pass(write_photographs(tmp_path / "p", 2, 1), tmp_path / "s.zarr", ["fc6-relu", "fc6-dropout"])
    source = FeatureStore.open(tmp_path / "s.zarr").source()
    assert np.array_equal(source.rows("fc6-relu").gather([0, 1]), source.rows("fc6-dropout").gather([0, 1]))
    assert check_source(source).sound


def test_copies_are_noted_and_are_no_damage(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "photographs", 4, 3)
    for face in images.iterdir():
        for view in (2, 3):
            shutil.copy(face / "1.png", face / f"{view}.png")
    run_pass(images, tmp_path / "s.zarr", ["relu_1_1"])
    done = command("verify_store", tmp_path / "s.zarr", "--recompute", 0)
    assert done.returncode == 0, done.stdout
    assert "note   8 items have the same photograph as another: f1/2 = f1/1, f1/3 = f1/1, f2/2 = f2/1" in done.stdout
    assert "and 3 more" in done.stdout
    assert done.stdout.endswith("sound\n")
    assert "NOT SOUND" not in done.stdout


def test_unfinished_is_not_damaged(store: Path) -> None:
    forget_shard(store, LAYERS[0], 1)
    found = command("verify_store", store, "--device", "cpu")
    assert "layer maxp_1_2: 4 rows not cached yet" in found.stdout
    assert found.returncode == 0


def test_the_wrong_weights_cannot_repair(store: Path) -> None:
    flip(shard(store, LAYERS[0], 1), 5000)
    done = command("verify_store", store, "--repair", "--weights", "random:1")
    assert done.returncode == 1
    assert "is not the weights of" in done.stderr


def test_a_repeated_key_is_reported(store: Path) -> None:
    source = FeatureStore.open(store).source()
    writer = SourceWriter(store, source.name, {})
    table = writer.table.copy()
    table.loc[1, "view"] = "1"
    writer.replace_table(table)
    writer.publish()
    assert json.loads((store / "zarr.json").read_text())["attributes"]["format_version"] == 2
    assert check_source(FeatureStore.open(store).source()).suspicious == ("key ('f1', '1') is there twice",)
    with pytest.raises(FeatureStoreError, match="twice, so its rows cannot be identified"):
        FeatureStore.open(store).find([("f1", "1")])


@pytest.mark.parametrize(
    "changed",
    [
        {"backbone": ["vggface"]},
        {"backbone": "torchvision:alexnet"},
        {"backbone": "inception_resnet_v1"},
        {"weights": 3},
        {"weights": "seed:" + "9" * 5000},
        {"precision": ["fp32"]},
        {"recipe": {"name": "x", "size": 4096, "resize": "pil", "channels": "RGB", "mean": [0, 0, 0]}},
        {"recipe": {"name": "x", "size": 224, "resize": {"a": 1}, "channels": "RGB", "mean": [10**400, 0, 0]}},
        {"recipe": {"name": "x", "box_margin": 0.15, "size": 224, "resize": "cv2", "channels": "BGR", "mean": [0, 0, 0]}},
    ],
)  # fmt: skip
def test_attributes_that_are_untrue(small_store: Path, tmp_path: Path, changed: dict) -> None:
    shutil.copytree(small_store, tmp_path / "s.zarr")
    (document,) = tmp_path.glob("s.zarr/*/zarr.json")
    content = json.loads(document.read_text())
    content["attributes"].update(changed)
    document.write_text(json.dumps(signed(content)))
    done = CliRunner().invoke(verify_store, [str(tmp_path / "s.zarr")])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "nothing recomputed: " in done.output or "is of another type" in done.output
