"""A small store of made-up rows with something to learn, written by the real writer, and judgments of its faces."""

import hashlib
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from featurestore.store.lock import store_lock
from featurestore.store.writer import SourceWriter
from tests.conftest import run_pass
from tests.heads.tiny_network import NAME, RECIPE

N_FACES, VIEWS = 30, ("frontal", "left", "right", "up")
SHAPES = {"fc7-relu": (400,), "maxp_5_3": (16, 5, 5)}


def latent(seed: int = 0) -> np.ndarray:
    """Each face's six numbers, which judgments go by."""
    return np.random.default_rng(seed).standard_normal((N_FACES, 6))


def write_store(
    path: Path,
    name: str = "made",
    seed: int = 0,
    bad: tuple[str, int] | None = None,
    dtype: str = "float32",
    compress: str = "none",
    image: str = "one",
    faces: list[str] | None = None,
    times: float = 1.0,
) -> Path:
    """``N_FACES`` × ``VIEWS``; a row is a fixed random map of the face's numbers, plus noise for each view.

    Six further numbers of each face are in the rows, and larger, which nobody judges by.
    """
    rng = np.random.default_rng([seed, 1])
    numbers = np.concatenate([latent(), 1.5 * latent(seed=1)], axis=1)
    with store_lock(path, "test"):
        writer = SourceWriter(
            path, name, {"backbone": name, "weights": f"seed:{seed}", "recipe": {}, "precision": "fp32"}
        )
        for layer, shape in SHAPES.items():
            writer.add_layer(layer, shape, dtype, compress, 32)
            n = int(np.prod(shape))
            rows = 5 + np.repeat(numbers @ rng.standard_normal((12, n)), len(VIEWS), axis=0)
            rows += rng.standard_normal(rows.shape)
            rows = np.maximum(times * rows, 0).astype(dtype)
            if bad and bad[0] == layer:
                rows[bad[1]] = np.inf
            for shard, start in enumerate(range(0, len(rows), 32)):
                part = rows[start : start + 32]
                shard_writer = writer.open_shard(layer, shard, end=len(part))
                shard_writer.write(range(len(part)), part)
                shard_writer.commit()
        keys = pd.MultiIndex.from_product([faces or [f"face-{i + 1:03d}" for i in range(N_FACES)], VIEWS])
        table = keys.to_frame(index=False, name=["face_id", "view"])
        table["path"] = table["face_id"] + "/" + table["view"] + ".png"
        table["image_sha256"] = [hashlib.sha256(f"{image} {i}".encode()).hexdigest() for i in range(len(table))]
        table["gender"] = np.where(np.arange(len(table)) // len(VIEWS) % 2, "male", "female")
        table["yaw"] = table["view"].map({"frontal": 0.0, "left": -30.0, "right": 30.0, "up": 0.0})
        writer.append(table)
        writer.publish()
    return path


def write_trials(path: Path, n: int, seed: int = 0, raters: int = 1, error: float = 0.0) -> pd.DataFrame:
    """Judgments by the latent numbers; each triplet to ``raters`` participants, who err at the given rate."""
    rng = np.random.default_rng([seed, 2])
    faces, rows = latent(), []
    pairs = list(combinations(range(3), 2))
    while len(rows) < n:
        three, seen = rng.choice(N_FACES, 3, replace=False), rng.choice(len(VIEWS), 3)
        closest = int(np.argmin([np.linalg.norm(faces[three[a]] - faces[three[b]]) for a, b in pairs]))
        for rater in range(raters):
            odd = 3 - sum(pairs[closest])
            if rng.random() < error:
                odd = (odd + int(rng.integers(1, 3))) % 3
            names = [f"face-{face + 1:03d}" for face in three]
            rows.append([*names, *(VIEWS[view] for view in seen), names[odd], f"p{rater}"])
    columns = ["face_1", "face_2", "face_3", "view_1", "view_2", "view_3", "odd", "participant"]
    table = pd.DataFrame(rows[:n], columns=columns)
    table.to_csv(path, index=False)
    return table


def cache(images: Path, store: Path, layers: list[str], weights: str = "random:0", backbone: str = NAME) -> None:
    """Layers of the tiny network, or of another that takes the same pictures, by the real pass."""
    recipe = store.with_name("tiny.toml")
    recipe.write_text(RECIPE)
    run_pass(images, store, layers, backbone=backbone, recipe=str(recipe), weights=weights)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The made-up store; read only."""
    return write_store(tmp_path_factory.mktemp("made") / "made.zarr")


@pytest.fixture(scope="session")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """900 error-free trials of it."""
    path = tmp_path_factory.mktemp("judged") / "trials.csv"
    write_trials(path, 900)
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny networks in several threads spend their time waiting, where other processes have the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
