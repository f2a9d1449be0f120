"""The time that a plan promises."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from featurestore import FeatureStore
from featurestore.caching.estimate import WORTH_MEASURING, Estimate, estimate
from featurestore.caching.extractor import Loaded
from featurestore.caching.job import prepare_job
from featurestore.caching.planning import make_plan
from featurestore.caching.run import cache_layers
from featurestore.caching.scale import planned_files
from featurestore.store.lock import store_lock
from featurestore.store.sizes import layer_bytes, stored_sizes
from featurestore.text import human_duration
from tests.commands import command
from tests.conftest import request_for, run_pass, write_photographs

LAYERS = ["maxp_1_2"]
MANY = 4 * WORTH_MEASURING  # photographs, at the tests' four to a batch


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("many") / "p", MANY // 4, 4)


def test_durations_read_well() -> None:
    seconds = [0.01, 8.4, 99, 100, 720, 5900, 12_600, 3600 * 30, 86_400 * 2.04]
    read = ["1 s", "8 s", "99 s", "2 min", "12 min", "98 min", "3.5 h", "30 h", "2.0 days"]
    assert [human_duration(each) for each in seconds] == read


def test_an_estimate_reads_as_a_line() -> None:
    loaded = Loaded(LAYERS, torch.nn.Identity(), 0.0)
    about = Estimate(2000, 2.8, "cpu, 2 threads", 1e6, loaded, {})
    assert str(about) == "about 12 min: 2,000 images at 2.8 images/s, measured on this machine (cpu, 2 threads)"
    assert str(replace(about, writing=2**30)).endswith("(cpu, 2 threads), if the disk takes 1.0 GiB/s")


def test_few_images_are_not_worth_it(many: Path, tmp_path: Path) -> None:
    job = prepare_job(request_for(many, tmp_path / "s.zarr", LAYERS, batch_size=5))
    assert estimate(job, make_plan(job)) is None


def test_the_run_goes_on_with_the_network_that_was_timed(many: Path, tmp_path: Path) -> None:
    job = prepare_job(request_for(many, tmp_path / "s.zarr", LAYERS))
    plan = make_plan(job)
    timed = estimate(job, plan)
    assert timed is not None
    assert timed.images == MANY and timed.rate > 0
    with store_lock(tmp_path / "s.zarr", "test"):
        summary = cache_layers(job, plan, loaded=timed.loaded)
    assert summary.loading == timed.loaded.seconds  # and nothing was loaded besides
    assert estimate(job, make_plan(job)) is None  # everything is cached
    run_pass(many, tmp_path / "untimed.zarr", LAYERS)
    a, b = (
        FeatureStore.open(tmp_path / name).rows("maxp_1_2").gather([0, MANY - 1]) for name in ("s.zarr", "untimed.zarr")
    )
    assert torch.equal(a, b)


def test_a_run_of_other_layers_loads_its_own(many: Path, tmp_path: Path) -> None:
    run_pass(many, tmp_path / "s.zarr", LAYERS)
    job = prepare_job(request_for(many, tmp_path / "s.zarr", [*LAYERS, "maxp_2_2"]))
    plan = make_plan(job)
    timed = estimate(job, plan)
    assert timed is not None
    assert timed.loaded.layers == ["maxp_2_2"]  # of registered items, what they lack
    other = Loaded(["maxp_3_3"], torch.nn.Identity(), 0.0)
    with store_lock(tmp_path / "s.zarr", "test"):
        assert cache_layers(job, plan, loaded=other).computed == MANY
    assert FeatureStore.open(tmp_path / "s.zarr").rows("maxp_2_2").gather([3]).shape == (1, 128, 56, 56)


def test_photographs_that_cannot_be_read_are_passed_over(many: Path, tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "p", MANY // 4, 4)
    for path in sorted(images.glob("f1/*")):
        path.write_bytes(b"not a picture")
    job = prepare_job(request_for(images, tmp_path / "s.zarr", LAYERS))
    assert estimate(job, make_plan(job)) is not None
    for path in images.glob("*/*"):
        path.write_bytes(b"not a picture")
    assert estimate(job, make_plan(job)) is None


def test_a_dry_run_says_how_long(many: Path, tmp_path: Path) -> None:
    options = ["--images", many, "--weights", "random:0", "--store", tmp_path / "s.zarr", "--batch-size", 4]
    done = command("cache_layers", "--layers", *LAYERS, *options, "--dry-run")
    assert done.returncode == 0, done.stderr
    pattern = (
        rf"  time      about \d+ s: {MANY} images at [\d.,]+ images/s, measured on this machine \((cpu|cuda|mps).*\)"
    )
    assert any(re.fullmatch(pattern, line.partition(", if the disk")[0]) for line in done.stdout.splitlines())
    assert not (tmp_path / "s.zarr").exists()


def test_a_dry_run_plans_for_photographs_that_are_only_listed(tmp_path: Path) -> None:
    """By rendered faces; a run for them is refused."""
    (tmp_path / "list.txt").write_text("".join(f"person-{i // 8}/{i % 8}.jpg\n" for i in range(20_000)))
    store = tmp_path / "s.zarr"
    options = ["--images", tmp_path / "list.txt", "--weights", "random:0", "--store", store, "--layers", *LAYERS]
    done = command("cache_layers", *options, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "20000 photographs of 2500 faces" in done.stdout and "with rendered faces)" in done.stdout
    assert "sizes are those of 4 of rendered faces" in done.stdout and "79 of them shards" in done.stdout
    assert not store.exists()
    refused = command("cache_layers", *options)
    assert refused.returncode != 0 and "20000 of 20000 images" in refused.stderr


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_the_plan_says_the_files_and_bytes_of_the_store_that_is_written(
    many: Path, tmp_path: Path, compress: str
) -> None:
    store = tmp_path / "s.zarr"
    job = prepare_job(request_for(many, store, ["maxp_1_2", "fc7-relu"], compress=compress, items_per_shard=5))
    plan = make_plan(job)
    timed = estimate(job, plan)
    assert timed is not None
    with store_lock(store, "test"):
        cache_layers(job, plan)
    assert planned_files(plan) == sum(path.is_file() for path in store.rglob("*"))
    for layer in FeatureStore.open(store).layers.values():
        written = sum(path.stat().st_size for path in (layer.folder / "c").rglob("*") if path.is_file())
        sizes = dict(stored_sizes(layer, timed.rows[layer.name]))
        name = "float32" if compress == "none" else "float32 zstd"
        due = layer_bytes(layer, MANY, sizes[name] or 0)
        assert due == pytest.approx(written, rel=0.2 if compress == "zstd" else 1e-9)
        assert {each for each, size in sizes.items() if size} == set(sizes)
        assert next(iter(dict(stored_sizes(layer, None)).values())) == sizes["float32"]
