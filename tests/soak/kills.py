"""Passes that are killed again and again at random moments: what they leave is whole, and ends as if nothing had happened."""

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

from click.testing import CliRunner

from featurestore import FeatureStore
from featurestore.caching.verify import check_source
from featurestore.store.integrity import check_files
from pipelines.cache_layers import main as cache_layers
from tests import commands
from tests.conftest import files_of, write_photographs
from tests.heads.tiny_network import NAME, RECIPE

_LAYERS = ("relu1", "block1", "pool", "descriptor")


def kill_passes(folder: Path, kills: int, seed: int, done: Callable[[int], object]) -> list[str]:
    """Kill passes over 30 photographs ``kills`` times; ``done`` counts them. Returns what was wrong, in words.

    After every kill all that is in the store is checked. A store that is finished has to be, byte for byte, the one of a pass
    that nobody killed; then the next begins, every other time with one layer at first and the others added.
    """
    chance = random.Random(seed)
    images = write_photographs(folder / "photographs", 15, 2)
    (folder / "tiny.toml").write_text(RECIPE)
    whole = {}
    for added in (False, True):
        whole[added] = folder / f"whole-{added}.zarr"
        for layers in _steps(added):
            assert CliRunner().invoke(cache_layers, _options(folder, images, whole[added], layers)).exit_code == 0
    wrong: list[str] = []
    killed, stores = 0, 0
    while killed < kills:
        stores += 1
        added, store = stores % 2 == 0, folder / "killed.zarr"
        shutil.rmtree(store, ignore_errors=True)
        for layers in _steps(added):
            finished = False
            while not finished:
                process = commands.start("cache_layers", *_options(folder, images, store, layers))
                if killed < kills:
                    _wait_for_a_file(store, process.is_alive)
                    time.sleep(chance.uniform(0.0, 0.15))
                    process.kill()
                process.join()
                finished = process.exitcode == 0
                if not finished:
                    if process.exitcode != -signal.SIGKILL:
                        wrong.append(f"store {stores}: the pass ended with {process.exitcode}")
                        finished = True
                    killed += 1
                    done(1)
                    wrong += [f"store {stores}, after kill {killed}: {problem}" for problem in _problems(store)]
        if files_of(store) != files_of(whole[added]):
            wrong.append(f"store {stores}: other bytes than those of a pass that was not killed")
    return wrong


def _steps(added: bool) -> list[tuple[str, ...]]:
    return [_LAYERS[:1], _LAYERS] if added else [_LAYERS]


def _options(folder: Path, images: Path, store: Path, layers: tuple[str, ...]) -> list[str]:
    options = ["--images", images, "--store", store, "--backbone", NAME, "--recipe", folder / "tiny.toml"]
    options += ["--weights", "random:0", "--batch-size", 2, "--items-per-shard", 4, "--layers", *layers]
    return [str(each) for each in options]


def _wait_for_a_file(store: Path, alive: Callable[[], bool]) -> None:
    """Until the process writes something, or has ended."""
    while alive() and not any(store.rglob("*.partial")):
        time.sleep(0.001)


def _problems(store: Path) -> list[str]:
    if not (store / "zarr.json").exists():
        return []
    found = [str(each) for each in check_files(store)]
    for source in FeatureStore.open(store).sources.values():
        found += [str(each) for each in check_source(source).damage]
    return found
