"""Photographs renamed, moved in circles, gone or copied: what the plan says, what is refused, what --rename and --forget do."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from featurestore import FeatureStore, FeatureStoreError
from featurestore.caching.renamed import rename_photographs, rows_to_forget
from featurestore.photos.keys import find_faces
from featurestore.store.lock import store_lock
from tests.commands import command
from tests.conftest import LAYERS, request_for, run_pass, write_photographs
from tests.featurestore.test_cache import contents, plan_of, values, write_table


def move(images: Path, *pairs: tuple[str, str]) -> None:
    """Rename photographs all at once, so that they may trade places."""
    for old, _ in pairs:
        (images / f"{old}.png").rename(images / f"{old}.moving")
    for old, new in pairs:
        (images / f"{new}.png").parent.mkdir(exist_ok=True)
        (images / f"{old}.moving").rename(images / f"{new}.png")


def rename(images: Path, store: Path, **options) -> dict[str, int]:
    with store_lock(store, "test"):
        plan = plan_of(images, store, LAYERS, **options)
        return rename_photographs(store, plan.source, plan.moves.renamed)


def rows_by_photograph(store: Path) -> dict[str, bytes]:
    hashes = FeatureStore.open(store).items["image_sha256"]
    return {digest: row.tobytes() for digest, row in zip(hashes, values(store), strict=True)}


def cache(images: Path, store: Path, *options: str) -> object:
    arguments = ["--layers", *LAYERS, "--images", images, "--store", store, "--weights", "random:0", "--batch-size", 4]
    return command("cache_layers", *arguments, *options)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        ([("f2/1", "f2/3")], ["f2/1 → f2/3"]),
        ([("f2/1", "f9/1"), ("f2/2", "f9/2")], ["f2/1 → f9/1", "f2/2 → f9/2"]),
        ([("f1/1", "f1/2"), ("f1/2", "f1/3")], ["f1/1 → f1/2", "f1/2 → f1/3"]),
        ([("f1/1", "f2/2"), ("f2/2", "f1/1")], ["f1/1 → f2/2", "f2/2 → f1/1"]),
        ([("f1/1", "f1/2"), ("f1/2", "f2/1"), ("f2/1", "f1/1")], ["f1/1 → f1/2", "f1/2 → f2/1", "f2/1 → f1/1"]),
    ],
)
def test_renamed_photographs_are_named_and_keep_their_rows(
    photographs: Path, tmp_path: Path, pairs: list[tuple[str, str]], said: list[str]
) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS)
    before = rows_by_photograph(store)
    move(photographs, *pairs)
    plan = plan_of(photographs, store, LAYERS)
    assert sorted(map(str, plan.moves.renamed)) == said
    assert (plan.changed, plan.moves.lost, plan.moves.copies) == ((), [], ())
    assert f"renamed?  {len(said)} photographs in the store now have another key" in str(plan)
    with pytest.raises(FeatureStoreError, match=r"seem to have been renamed: .*`rename` gives.* or put the files back"):
        plan.refuse_if_renamed()
    assert list(rename(photographs, store).values()) == [len(said)]
    assert rows_by_photograph(store) == before
    again = plan_of(photographs, store, LAYERS)
    assert (again.images, again.moves.renamed, again.changed) == (0, (), ())
    again.refuse_if_renamed()
    assert set(FeatureStore.open(store).items["path"]) == set(find_faces(photographs).table["path"])


def test_a_photograph_that_took_anothers_place_is_no_rename(photographs: Path, tmp_path: Path) -> None:
    """f1/2 is overwritten by f1/1: the key is taken by an item whose own photograph is lost, so nothing can move there."""
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS)
    move(photographs, ("f1/1", "f1/2"))
    plan = plan_of(photographs, store, LAYERS)
    assert plan.moves.renamed == ()
    assert (plan.changed, plan.moves.lost) == (("('f1', '2')",), [("f1", "1")])


def test_copies_and_other_folders_are_only_noted(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS)
    shutil.copy(photographs / "f1" / "1.png", photographs / "f1" / "7.png")
    write_photographs(tmp_path / "new", 1, 1, seed=5)
    for name in ("8", "9"):
        shutil.copy(tmp_path / "new" / "f1" / "1.png", photographs / "f1" / f"{name}.png")
    plan = plan_of(photographs, store, LAYERS)
    assert plan.moves.copies == ((("f1", "7"), ("f1", "1")), (("f1", "9"), ("f1", "8")))
    assert "copies    2 photographs have the same content as another: f1/7 = f1/1, f1/9 = f1/8" in str(plan)
    plan.refuse_if_renamed()
    run_pass(photographs, store, LAYERS)
    assert plan_of(photographs, store, LAYERS).moves.copies == plan.moves.copies
    elsewhere = write_photographs(tmp_path / "elsewhere", 1, 1, seed=6)
    (elsewhere / "f1").rename(elsewhere / "g1")
    shutil.copy(photographs / "f2" / "1.png", elsewhere / "g1" / "2.png")
    plan = plan_of(elsewhere, store, LAYERS)  # the other folder is still there
    assert (plan.moves.gone, plan.moves.renamed) == ((), ())
    assert plan.moves.copies == ((("g1", "2"), ("f2", "1")),)


def test_gone_photographs_are_named(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS)
    (photographs / "f2" / "1.png").unlink()
    plan = plan_of(photographs, store, LAYERS)
    assert "gone      1 photographs in the store are no longer there; `forget` gone removes them: f2/1" in str(plan)
    plan.refuse_if_renamed()


def test_other_sources_follow_where_they_hold_the_same_photograph(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS)
    run_pass(photographs, store, LAYERS[:1], weights="random:1")
    (photographs / "f3" / "1.png").write_bytes((photographs / "f3" / "1.png").read_bytes() + b"another file")
    run_pass(photographs, store, LAYERS[:1], weights="random:2")
    write_photographs(photographs, 5, 2)
    move(photographs, ("f3/1", "f3/3"), ("f4/1", "f4/3"))
    counts = rename(photographs, store)
    assert sorted(counts.values()) == [1, 2, 2]
    keys = {source.attributes["weights"]: source.keys for source in FeatureStore.open(store).sources.values()}
    assert ("f3", "3") in keys["seed:1"]
    assert ("f3", "1") in keys["seed:2"]
    assert all(("f4", "3") in found for found in keys.values())


def test_metadata_follows_the_new_table(tmp_path: Path) -> None:
    images, store = write_photographs(tmp_path / "p", 4, 1), tmp_path / "s.zarr"
    run_pass(write_table(images, age=[30, 31, 32, 33]), store, LAYERS)
    (images / "f2").rename(images / "f9")
    table = pd.read_csv(images / "faces.csv").replace({"f2": "f9", "f2/1.png": "f9/1.png", 31: 41})
    table.to_csv(images / "faces.csv", index=False)
    rename(images / "faces.csv", store)
    assert run_pass(images / "faces.csv", store, LAYERS).computed == 0
    items = FeatureStore.open(store).items
    assert items.loc[("f9", "1"), "age"] == 41
    assert items["age"].dtype == np.int64
    assert len(items) == 4


def test_boxes_belong_to_the_photograph(photographs: Path, tmp_path: Path) -> None:
    """One picture with two boxes is two photographs; renamed, each is found by its box."""
    store, table = tmp_path / "s.zarr", find_faces(photographs).table
    table = table.assign(path=table["path"].iloc[0], box_x=np.arange(10.0), box_y=0.0, box_w=20.0, box_h=20.0)

    def plan():
        from dataclasses import replace

        from featurestore.caching.job import prepare_job
        from featurestore.caching.planning import make_plan
        from featurestore.caching.run import cache_layers

        request = request_for(photographs, store, LAYERS)
        job = prepare_job(replace(request, faces=replace(request.faces, table=table, boxed=True)))
        return job, make_plan(job), cache_layers

    job, made, cache_layers = plan()
    cache_layers(job, made)
    assert plan()[1].moves.copies == ()
    shutil.copy(table["path"].iloc[0], tmp_path / "again.png")
    Path(table["path"].iloc[0]).unlink()
    table["path"] = str(tmp_path / "again.png")
    table.loc[[2, 5], "face_id"] = ["g1", "g2"]
    assert sorted(map(str, plan()[1].moves.renamed)) == ["f2/1 → g1/1", "f3/2 → g2/2"]


def test_what_is_forgotten(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    run_pass(photographs, store, LAYERS)
    shutil.rmtree(photographs / "f2")
    (photographs / "f5" / "1.png").unlink()
    source, found = FeatureStore.open(store).source(), find_faces(photographs).table
    for names, rows in (
        (["f2"], [2, 3]),
        (["f5/1", "f2/1"], [2, 8]),
        (["gone"], [2, 3, 8]),
        (["gone", "f2"], [2, 3, 8]),
    ):
        assert rows_to_forget(source, found, names).tolist() == rows
    for name, message in (
        ("f1/1", r"f1/1 is still among the photographs of `images` \(1 of those to forget are\)"),
        ("f5", "f5/2 is still among"),
        ("f22", "1 of 1 faces are not in .*Did you mean f2"),
        ("f2/3", r"1 of 1 keys are not in .*\('f2', '3'\)\. Face 'f2' has no view '3'; it has 1, 2"),
    ):
        with pytest.raises(FeatureStoreError, match=message):
            rows_to_forget(source, found, [name])


def test_the_command_asks_before_a_renamed_photograph_becomes_a_twin(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    assert cache(photographs, store).returncode == 0
    nothing = cache(photographs, store, "--rename")
    assert "Renamed: nothing." in nothing.stdout
    assert "Done: 0 of 0 images" in nothing.stdout
    move(photographs, ("f2/1", "f2/11"), ("f3/1", "f3/11"))
    before = contents(store)
    refused = cache(photographs, store)
    assert refused.returncode == 1
    assert "renamed?  2 photographs in the store now have another key: f2/1 → f2/11, f3/1 → f3/11" in refused.stdout
    assert "--rename gives the items their new keys" in refused.stderr
    assert "--forget f2/1 removes" in refused.stderr
    dry = cache(photographs, store, "--rename", "--dry-run")
    assert "Would be renamed: 2 items, in vggface-" in dry.stdout
    assert dry.returncode == 0
    dry = cache(photographs, store, "--forget", "gone", "--dry-run")
    assert "Would be removed: 2 items of vggface-" in dry.stdout
    assert "f2/1, f3/1" in dry.stdout
    assert contents(store) == before
    forgotten = cache(photographs, store, "--forget", "f3")
    assert forgotten.returncode == 1  # f3/2 is still there
    assert "f3/2 is still among the photographs of --images" in forgotten.stderr
    assert "Did you mean f3" in cache(photographs, store, "--forget", "f33/1").stderr


def test_the_command_renames_and_forgets(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "s.zarr"
    assert cache(photographs, store).returncode == 0
    move(photographs, ("f2/1", "f2/11"))
    renamed = cache(photographs, store, "--rename")
    assert "Renamed: 1 items, in vggface-" in renamed.stdout
    assert "f2/1 → f2/11" in renamed.stdout
    assert "Done: 0 of 0 images" in renamed.stdout
    move(photographs, ("f2/11", "f2/12"))
    (photographs / "f1" / "2.png").unlink()
    forgotten = cache(photographs, store, "--forget", "f2/11", "f1/2")
    assert "Removed: 2 items of vggface-" in forgotten.stdout
    assert "f1/2, f2/11" in forgotten.stdout
    assert "Done: 1 of 1 images" in forgotten.stdout
    items = FeatureStore.open(store).items
    assert ("f2", "12") in items.index
    assert len(items) == 9
    assert "Removed: nothing." in cache(photographs, store, "--forget", "gone").stdout


def test_nothing_to_forget_from(photographs: Path, tmp_path: Path) -> None:
    done = cache(photographs, tmp_path / "s.zarr", "--forget", "gone")
    assert done.returncode == 1
    assert "holds nothing yet of source vggface-" in done.stderr
