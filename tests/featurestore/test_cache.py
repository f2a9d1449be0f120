"""The pass: what it computes, what it leaves alone, what it refuses, and what is left after each kind of end."""

import hashlib
import shutil
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from featurestore import FeatureStore, FeatureStoreError
from featurestore.caching.compute import NonFiniteError
from featurestore.caching.job import prepare_job
from featurestore.caching.planning import make_plan
from featurestore.caching.run import cache_layers
from featurestore.checkpoints.seeded import draw_weights
from featurestore.networks.registry import get_backbone
from featurestore.store.lock import store_lock
from tests.conftest import LAYERS, request_for, run_pass, write_photographs


def contents(store: Path) -> dict[str, str]:
    """sha256 of every file of a store."""
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


def values(store: Path, layer: str = LAYERS[0]) -> np.ndarray:
    rows = FeatureStore.open(store).rows(layer)
    return rows.gather(range(len(rows))).numpy()


def plan_of(images: Path, store: Path, layers: list[str], **options):
    return make_plan(prepare_job(request_for(images, store, layers, **options)))


def test_a_second_run_computes_nothing_and_writes_nothing(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    assert run_pass(photographs, store, LAYERS).computed == 10
    before = contents(store)
    stamps = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert run_pass(photographs, store, LAYERS).computed == 0
    assert contents(store) == before
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == stamps


def test_two_stores_of_the_same_photographs_are_equal_byte_for_byte(photographs: Path, tmp_path: Path) -> None:
    run_pass(photographs, tmp_path / "a.zarr", LAYERS)
    run_pass(photographs, tmp_path / "b.zarr", LAYERS, workers=1)
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")


def test_another_layer_is_added_beside_the_old_ones(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS[1:])
    shards = {name: digest for name, digest in contents(store).items() if LAYERS[1] in name and "/c/" in name}
    plan = plan_of(photographs, store, LAYERS)
    assert [(part.layer.name, int(part.needed.sum())) for part in plan.layers] == [(LAYERS[0], 10), (LAYERS[1], 0)]
    run_pass(photographs, store, LAYERS)
    run_pass(photographs, tmp_path / "whole.zarr", LAYERS)
    assert np.array_equal(values(store), values(tmp_path / "whole.zarr"))
    assert {name: digest for name, digest in contents(store).items() if LAYERS[1] in name and "/c/" in name} == shards


@pytest.mark.parametrize("first", [3, 4, 5])
@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_new_photographs_are_appended(tmp_path: Path, first: int, compress: str) -> None:
    """Before, at and after a shard's end: old rows stay byte for byte, new ones follow."""
    images, store = tmp_path / "p", tmp_path / "s.zarr"
    write_photographs(images, first, 1)
    run_pass(images, store, LAYERS, compress=compress)
    before = values(store)
    write_photographs(images, 10, 1)
    assert run_pass(images, store, LAYERS, compress=compress).computed == 10 - first
    assert np.array_equal(values(store)[:first], before)
    run_pass(images, tmp_path / "whole.zarr", LAYERS)
    whole = FeatureStore.open(tmp_path / "whole.zarr")
    order = whole.find(FeatureStore.open(store).items.index)
    np.testing.assert_allclose(
        values(store), values(tmp_path / "whole.zarr")[order], rtol=0, atol=1e-5 * np.abs(before).max()
    )


def test_metadata_is_added_and_updated_without_computing(tmp_path: Path) -> None:
    images, store = write_photographs(tmp_path / "p", 4, 1), tmp_path / "s.zarr"
    run_pass(images, store, LAYERS[:1])
    table = pd.DataFrame(
        {"face_id": ["f1", "f2", "f3"], "view": "1", "path": [f"f{i}/1.png" for i in (1, 2, 3)], "age": [30, 40, 50]}
    )
    table.to_csv(images / "faces.csv", index=False)
    assert run_pass(images / "faces.csv", store, LAYERS[:1]).computed == 0
    assert FeatureStore.open(store).items["age"].fillna(-1).tolist() == [30, 40, 50, -1]
    table["age"] = [31, 40, 50]
    table.to_csv(images / "faces.csv", index=False)
    run_pass(images / "faces.csv", store, LAYERS[:1])
    assert FeatureStore.open(store).items["age"].tolist()[:3] == [31, 40, 50]


def change(images: Path, face: str = "f2") -> Path:
    path = images / face / "1.png"
    shutil.copy(images / "f1" / "2.png", path)
    return path


def test_a_changed_photograph_is_named_and_kept_until_asked_for(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS)
    before = values(store)
    change(photographs)
    plan = plan_of(photographs, store, LAYERS)
    assert plan.changed == ("('f2', '1')",)
    assert "`recompute_changed`" in str(plan)
    assert run_pass(photographs, store, LAYERS).computed == 0
    assert np.array_equal(values(store), before)
    assert plan_of(photographs, store, LAYERS).changed == ("('f2', '1')",)  # not forgotten by the run in between


def test_another_layer_of_a_changed_photograph_would_mix_two(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS[:1])
    change(photographs)
    before = contents(store)
    with pytest.raises(FeatureStoreError, match=r"1 photographs changed since .*\('f2', '1'\).*`recompute_changed`"):
        run_pass(photographs, store, LAYERS)
    assert contents(store) == before


def test_recompute_changed_touches_every_layer_and_nothing_else(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS)
    before = {layer: values(store, layer) for layer in LAYERS}
    path = change(photographs)
    assert run_pass(photographs, store, LAYERS[:1], recompute_changed=True).computed == 1
    opened = FeatureStore.open(store)
    row = int(opened.find([("f2", "1")])[0])
    twin = int(opened.find([("f1", "2")])[0])
    for layer in LAYERS:
        now = values(store, layer)
        np.testing.assert_allclose(now[row], now[twin], atol=1e-5 * np.abs(now).max())
        assert np.array_equal(np.delete(now, row, 0), np.delete(before[layer], row, 0))
    assert opened.items["image_sha256"].iloc[row] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert plan_of(photographs, store, LAYERS).images == 0


def test_an_unreadable_photograph_stops_or_is_left_out(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    bad = photographs / "f3" / "2.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(FeatureStoreError, match=r"\('f3', '2'\).*cannot be decoded.*`on_error` skip"):
        run_pass(photographs, store, LAYERS)
    assert FeatureStore.open(store).items.index.tolist()[-1] == ("f3", "1")  # what came before it is kept
    summary = run_pass(photographs, store, LAYERS, on_error="skip")
    assert [str(failure.photo.path) for failure in summary.failures] == [str(bad)]
    items = FeatureStore.open(store).items
    assert len(items) == 9
    assert ("f3", "2") not in items.index
    run_pass(photographs, tmp_path / "skipped.zarr", LAYERS, on_error="skip")
    assert np.array_equal(values(store), values(tmp_path / "skipped.zarr"))
    for row, (face, view) in enumerate(items.index):  # no row slid into another's place
        alone = write_one(tmp_path / f"{face}-{view}", photographs / face / f"{view}.png")
        run_pass(alone, tmp_path / f"{face}-{view}.zarr", LAYERS[:1])
        np.testing.assert_allclose(values(store)[row], values(tmp_path / f"{face}-{view}.zarr")[0], atol=1e-4)


def test_a_photograph_of_more_pixels_than_allowed_is_left_out(tmp_path: Path) -> None:
    photographs = write_photographs(tmp_path / "p", 2, 1)
    store, large = tmp_path / "s.zarr", next(photographs.glob("*/*.png"))
    cv2.imwrite(str(large), np.zeros((100, 100, 3), np.uint8))
    summary = run_pass(photographs, store, LAYERS[:1], on_error="skip", max_pixels=9_999)
    assert [str(failure.photo.path) for failure in summary.failures] == [str(large)]
    assert "too many pixels: 100 × 100" in str(summary.failures[0])
    assert run_pass(photographs, store, LAYERS[:1]).computed == 1
    assert run_pass(photographs, store, LAYERS, max_pixels=9_999).computed == 2  # cached before: it was allowed then


def write_one(folder: Path, image: Path) -> Path:
    (folder / "x").mkdir(parents=True)
    shutil.copy(image, folder / "x" / image.name)
    return folder


def test_a_photograph_that_went_away_leaves_a_hole_not_a_shift(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS[:1])
    (photographs / "f2" / "1.png").unlink()
    with pytest.raises(FeatureStoreError, match="No such file"):
        run_pass(photographs, store, LAYERS)
    summary = run_pass(photographs, store, LAYERS, on_error="skip")
    assert len(summary.failures) == 1
    rows = FeatureStore.open(store).rows(LAYERS[1])
    assert np.flatnonzero(~rows.present).tolist() == [2]
    run_pass(write_photographs(tmp_path / "again", 5, 2), tmp_path / "whole.zarr", LAYERS)
    kept = [row for row in range(10) if row != 2]
    np.testing.assert_allclose(rows.gather(kept).numpy(), values(tmp_path / "whole.zarr", LAYERS[1])[kept], atol=1e-4)


def test_nan_activations_stop_the_pass_and_name_the_photograph(photographs: Path, tmp_path: Path) -> None:
    shapes = get_backbone("vggface").weight_shapes()
    state = {key: torch.zeros(shape) for key, shape in shapes.items() if key.startswith("features.")}
    state.update(draw_weights(0, [key for key in state if "conv_1" in key], shapes))
    state["features.conv_2_1.bias"][0] = torch.nan
    save_file({key.removeprefix("features."): value for key, value in state.items()}, tmp_path / "nan.safetensors")
    with pytest.raises(NonFiniteError, match=r"layer 'maxp_2_2' of \('f1', '1'\).*NaN or infinite"):
        run_pass(photographs, tmp_path / "s.zarr", LAYERS, weights=str(tmp_path / "nan.safetensors"))
    assert FeatureStore.open(tmp_path / "s.zarr").source().n_items == 0


def test_infinity_from_half_precision_storage_is_not_stored(photographs: Path, tmp_path: Path) -> None:
    shapes = get_backbone("vggface").weight_shapes()
    state = draw_weights(0, [key for key in shapes if key.startswith("features.")], shapes)
    state["features.conv_1_2.weight"] *= 1e4
    save_file(state, tmp_path / "large.safetensors")
    run_pass(photographs, tmp_path / "s.zarr", LAYERS[:1], weights=str(tmp_path / "large.safetensors"))
    with pytest.raises(NonFiniteError, match="overflows at 65504"):
        run_pass(
            photographs, tmp_path / "h.zarr", LAYERS[:1], weights=str(tmp_path / "large.safetensors"), dtype="float16"
        )


def test_convolutions_alone_give_no_fc_layer(photographs: Path, tmp_path: Path) -> None:
    shapes = get_backbone("vggface").weight_shapes()
    state = {key: torch.zeros(shape) for key, shape in shapes.items() if key.startswith("features.")}
    save_file(state, tmp_path / "conv.safetensors")
    with pytest.raises(FeatureStoreError, match=r"does not hold all of vggface .*cannot give fc7-relu"):
        prepare_job(
            request_for(photographs, tmp_path / "s.zarr", ["fc7-relu"], weights=str(tmp_path / "conv.safetensors"))
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "vgface"}, "no backbone 'vgface'. Did you mean vggface"),
        ({"recipe": "facenet"}, "makes 160-pixel inputs, vggface takes 224"),
        ({"recipe": "vgface-rgb"}, "no recipe 'vgface-rgb'. Did you mean vggface-rgb"),
        ({"weights": "nothing.pth"}, "no weights file nothing.pth"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(
    photographs: Path, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        run_pass(photographs, tmp_path / "s.zarr", LAYERS, **options)
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_that_is_not_there(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatureStoreError, match=r"`device` cuda: .*`device` cpu"):
        run_pass(photographs, tmp_path / "s.zarr", LAYERS, device="cuda")


def test_rows_are_not_stored_in_two_ways(photographs: Path, tmp_path: Path) -> None:
    run_pass(photographs, tmp_path / "s.zarr", LAYERS[:1])
    with pytest.raises(FeatureStoreError, match="stored with `dtype` float32, not float16"):
        run_pass(photographs, tmp_path / "s.zarr", LAYERS[:1], dtype="float16")
    with pytest.raises(FeatureStoreError, match="stored with `compress` none, not zstd"):
        run_pass(photographs, tmp_path / "s.zarr", LAYERS[:1], compress="zstd")


def test_a_store_that_is_being_written_names_the_writer(photographs: Path, tmp_path: Path) -> None:
    import os

    store = tmp_path / "s.zarr"
    with (
        store_lock(store, "the first pass"),
        pytest.raises(FeatureStoreError, match=rf"process {os.getpid()} on .*the first pass"),
    ):
        run_pass(photographs, store, LAYERS)
    run_pass(photographs, store, LAYERS)


def test_a_folder_with_other_things_is_not_made_a_store(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatureStoreError, match="other things in it"):
        run_pass(photographs, photographs, LAYERS)
    assert sorted(path.name for path in photographs.iterdir()) == ["f1", "f2", "f3", "f4", "f5"]


def test_the_plan_counts_every_byte(photographs: Path, tmp_path: Path) -> None:
    plan = plan_of(photographs, tmp_path / "s.zarr", LAYERS)
    assert not (tmp_path / "s.zarr").exists()  # planning writes nothing
    run_pass(photographs, tmp_path / "s.zarr", LAYERS)
    shards = [path.stat().st_size for path in (tmp_path / "s.zarr").rglob("c/*/*/*/*")]
    assert len(shards) == 6
    assert plan.bytes_to_write == sum(shards)


def test_too_little_disk_is_refused_up_front(photographs: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    plan = plan_of(photographs, tmp_path / "s.zarr", LAYERS)
    plan.refuse_if_full()
    with pytest.raises(FeatureStoreError, match=r"not enough disk .*writes up to 45\.9 MiB, 1\.0 MiB are free"):
        replace(plan, free=1 << 20).refuse_if_full()


def test_the_batch_does_not_change_what_is_stored(photographs: Path, tmp_path: Path) -> None:
    run_pass(photographs, tmp_path / "a.zarr", LAYERS, batch_size=1)
    run_pass(photographs, tmp_path / "b.zarr", LAYERS, batch_size=4)
    for layer in LAYERS:
        a, b = values(tmp_path / "a.zarr", layer), values(tmp_path / "b.zarr", layer)
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def test_bf16_is_near_fp32_and_another_source(photographs: Path, tmp_path: Path) -> None:
    run_pass(photographs, tmp_path / "a.zarr", LAYERS)
    run_pass(photographs, tmp_path / "b.zarr", LAYERS, precision="bf16")
    a, b = values(tmp_path / "a.zarr"), values(tmp_path / "b.zarr")
    assert 0 < np.abs(a - b).max() < 0.03 * np.abs(a).max()
    assert set(FeatureStore.open(tmp_path / "a.zarr").sources).isdisjoint(
        FeatureStore.open(tmp_path / "b.zarr").sources
    )


def test_unregistered_rows_of_a_killed_pass_are_never_taken_for_others(tmp_path: Path) -> None:
    """Killed between renaming shards and publishing items; then other photographs take the same row numbers."""
    images, store = write_photographs(tmp_path / "p", 2, 1), tmp_path / "s.zarr"
    run_pass(images, store, LAYERS)
    name = next(iter(FeatureStore.open(store).sources))
    documents = {path: path.read_bytes() for path in store.rglob("zarr.json")}
    chunks = {path: path.read_bytes() for path in (store / name).glob("*/c/0") if path.is_file()}
    run_pass(write_photographs(tmp_path / "p", 6, 1), store, LAYERS)
    for path, content in {**documents, **chunks}.items():  # as if nothing had been published
        path.write_bytes(content)
    shutil.rmtree(tmp_path / "p" / "f3")
    run_pass(images, store, LAYERS[:1])  # f4 … f6 now get the rows that f3 … f5 had
    opened = FeatureStore.open(store)
    assert [face for face, _ in opened.items.index] == ["f1", "f2", "f4", "f5", "f6"]
    assert opened.rows(LAYERS[1]).present.tolist() == [True, True, False, False, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_what_the_cpu_does(photographs: Path, tmp_path: Path) -> None:
    run_pass(photographs, tmp_path / "cpu.zarr", LAYERS)
    run_pass(photographs, tmp_path / "gpu.zarr", LAYERS, device="cuda")
    for layer in LAYERS:
        a, b = values(tmp_path / "cpu.zarr", layer), values(tmp_path / "gpu.zarr", layer)
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def write_table(images: Path, **columns) -> Path:
    table = pd.DataFrame({"face_id": ["f1", "f2", "f3", "f4"], "view": "1", **columns})
    table["path"] = table["face_id"] + "/1.png"
    table.to_csv(images / "faces.csv", index=False)
    return images / "faces.csv"


class Killed(BaseException):
    """Stands for SIGKILL at one exact line: nothing after it runs, not even what catches errors."""


def test_a_column_that_changes_its_type_is_never_read_as_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the chunks of the new type are written and before the document that describes them."""
    images, store = write_photographs(tmp_path / "p", 4, 1), tmp_path / "s.zarr"
    run_pass(write_table(images, age=[30, 31, 32, 33]), store, LAYERS[:1])
    early = FeatureStore.open(store)  # has not read its ages yet

    def kill(*_: object) -> None:
        raise Killed

    table = write_table(images, age=[30.5, 31, 32, 33])
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("featurestore.store.writer.source_document", kill)
        run_pass(table, store, LAYERS[:1])
    assert early.items["age"].tolist() == [30, 31, 32, 33]
    assert FeatureStore.open(store).items["age"].tolist() == [30, 31, 32, 33]
    run_pass(table, store, LAYERS[:1])
    assert FeatureStore.open(store).items["age"].tolist() == [30.5, 31, 32, 33]
    assert sorted(path.name for path in (store.glob("*/age/*"))) == ["c", "zarr.json"]
    run_pass(write_table(images, age=["30", "31", "x", "33"]), store, LAYERS[:1])
    assert FeatureStore.open(store).items["age"].tolist() == ["30", "31", "x", "33"]


def test_a_kill_just_before_the_roots_document_is_made_good(tmp_path: Path) -> None:
    images, store = write_photographs(tmp_path / "p", 4, 1), tmp_path / "s.zarr"
    run_pass(images, store, LAYERS)
    finished = contents(store)
    (store / "zarr.json").write_bytes((store / "zarr.json").read_bytes().replace(b"maxp_1_2", b"maxp_9_9"))
    (store / "zarr.json.partial").write_bytes(b"{")
    run_pass(images, store, LAYERS)
    assert contents(store) == finished


def test_a_kill_at_the_very_first_write_is_made_good(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "s.zarr" / "zarr.json.partial").write_bytes(b"{")
    run_pass(photographs, tmp_path / "s.zarr", LAYERS[:1])
    assert [path.name for path in (tmp_path / "s.zarr").glob("*.partial")] == []


def test_a_recompute_that_ends_early_keeps_the_rows_it_did_not_reach(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS, batch_size=1)
    before = {layer: values(store, layer) for layer in LAYERS}
    change(photographs, "f1")
    change(photographs, "f2")
    (photographs / "f1" / "1.png").write_bytes((photographs / "f1" / "1.png").read_bytes() + b"changed")
    job = prepare_job(request_for(photographs, store, LAYERS, recompute_changed=True, batch_size=1))
    plan = make_plan(job)
    assert len(plan.changed) == 2
    (photographs / "f2" / "1.png").write_bytes(b"gone bad between planning and reading")
    with store_lock(store, "test"), pytest.raises(FeatureStoreError, match="cannot be decoded"):
        cache_layers(job, plan)
    opened = FeatureStore.open(store)
    for layer in LAYERS:
        assert opened.rows(layer).present.all()
        assert np.array_equal(values(store, layer)[1:], before[layer][1:])
        assert not np.array_equal(values(store, layer)[0], before[layer][0])
    assert opened.items["image_sha256"].tolist()[:3:2] == ["", ""]  # nobody may take these for finished
    with pytest.raises(FeatureStoreError, match=r"recomputing them was interrupted.*`recompute_changed`"):
        run_pass(photographs, store, [*LAYERS, "conv_1_1"], on_error="skip")


def test_a_changed_photograph_keeps_what_was_said_of_the_earlier_one(tmp_path: Path) -> None:
    images, store = write_photographs(tmp_path / "p", 4, 2), tmp_path / "s.zarr"
    run_pass(write_table(images, who=["anna", "berta", "carla", "dora"]), store, LAYERS[:1])
    shutil.copy(images / "f3" / "2.png", images / "f1" / "1.png")
    run_pass(write_table(images, who=["emma", "berta", "carla", "dorothea"]), store, LAYERS[:1])
    assert FeatureStore.open(store).items["who"].tolist() == ["anna", "berta", "carla", "dorothea"]


def test_a_link_to_a_store_is_the_same_store(tmp_path: Path) -> None:
    (tmp_path / "s.zarr").mkdir()
    (tmp_path / "link.zarr").symlink_to(tmp_path / "s.zarr")
    with (
        store_lock(tmp_path / "s.zarr", "first"),
        pytest.raises(FeatureStoreError, match="first"),
        store_lock(tmp_path / "link.zarr", "second"),
    ):
        pass


def test_a_column_with_a_layers_name_is_refused(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", 4, 1)
    with pytest.raises(FeatureStoreError, match=r"'maxp_1_2' is the name of a column .* and of a layer"):
        run_pass(write_table(images, maxp_1_2=1), tmp_path / "s.zarr", LAYERS)
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize("removed", ["*", "*/maxp_1_2/c/0"])
@pytest.mark.parametrize("again", [False, True])
def test_what_is_removed_from_a_store_during_the_run_is_noticed(tmp_path: Path, removed: str, again: bool) -> None:
    """By another program, at the fourth of six photographs; with ``again`` an empty folder is put in the place of the store."""
    store = tmp_path / "s.zarr"
    job = prepare_job(
        request_for(write_photographs(tmp_path / "p", 6, 1), store, LAYERS[:1], batch_size=1, items_per_shard=2)
    )
    plan, seen = make_plan(job), 0

    def count(n: int) -> None:
        nonlocal seen
        seen += n
        if seen == 4:
            for path in [store] if removed == "*" else list(store.glob(removed)):
                shutil.rmtree(path.rename(tmp_path / "removed"))  # in one step: the run writes in another thread
            if again and removed == "*":
                store.mkdir()

    with store_lock(store, "test"), pytest.raises(FeatureStoreError, match=r"removed|rewritten|are gone|No such file"):
        cache_layers(job, plan, count)
