"""What tests share: real photographs where they are, and small stores made by the real pass."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from featurestore import FeatureStore
from featurestore.caching.job import CachingRequest, prepare_job
from featurestore.caching.planning import make_plan
from featurestore.caching.run import Summary, cache_layers
from featurestore.photos.keys import find_faces
from featurestore.store.lock import store_lock
from featurestore.store.writer import SourceWriter
from featurestore.store.zarr_format import source_document
from tests.commands import ROOT

SHARED = Path(os.environ.get("FEATURESTORE_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session")
def parity() -> Path:
    folder = SHARED / "parity"
    if not folder.is_dir():
        pytest.skip("the numbers of the original implementations (shared/parity) are not on this machine")
    return folder


@pytest.fixture(scope="session")
def orl() -> Path:
    folder = SHARED / "data" / "orl_faces"
    if not folder.is_dir():
        pytest.skip("the photographs (shared/data/orl_faces) are not on this machine")
    return folder


def write_photographs(folder: Path, faces: int, views: int, seed: int = 0) -> Path:
    """Small PNGs of smoothed noise, ``f1/1.png`` …: enough for a network with random weights to tell apart."""
    rng = np.random.default_rng(seed)
    for face in range(1, faces + 1):
        (folder / f"f{face}").mkdir(parents=True, exist_ok=True)
        for view in range(1, views + 1):
            noise = rng.integers(0, 255, (8, 8, 3), np.uint8)
            cv2.imwrite(
                str(folder / f"f{face}" / f"{view}.png"), cv2.resize(noise, (64, 80), interpolation=cv2.INTER_CUBIC)
            )
    return folder


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """10 photographs: 5 faces × 2 views."""
    return write_photographs(tmp_path / "photographs", 5, 2)


def request_for(images: Path, store: Path, layers: list[str], **options) -> CachingRequest:
    defaults = {"weights": "random:0", "device": "cpu", "batch_size": 4, "items_per_shard": 4}
    return CachingRequest(store=store, faces=find_faces(images), layers=layers, **{**defaults, **options})


def run_pass(images: Path, store: Path, layers: list[str], **options) -> Summary:
    """The real pass, as the command runs it."""
    job = prepare_job(request_for(images, store, layers, **options))
    with store_lock(store, "test"):
        return cache_layers(job, make_plan(job))


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every file below."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def forget_shard(store: Path, layer: str, number: int) -> None:
    """As if one shard of a layer had never been computed."""
    writer = SourceWriter(store, FeatureStore.open(store).source(layers=[layer]).name, {})
    found = writer.layers[layer]
    rows = found.shard_rows(number)
    writer.note(layer, rows.start, np.full(len(rows), -1))
    writer.publish()
    found.shard_path(number).unlink()


def signed(document: dict) -> dict:
    """A source's document that was edited, with the checksum that it has now."""
    return source_document(document["attributes"], document["consolidated_metadata"]["metadata"])


# The cheapest layers of the real network: what a test of storing needs is real rows, not many of them.
LAYERS = ["maxp_1_2", "maxp_2_2"]


@pytest.fixture(scope="session")
def small_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of 10 items, 4 to a shard. Read only; tests that change a store make their own."""
    folder = tmp_path_factory.mktemp("small")
    run_pass(write_photographs(folder / "photographs", 5, 2), folder / "small.zarr", LAYERS)
    return folder / "small.zarr"


@pytest.fixture(scope="session")
def small_rows(small_store: Path) -> dict[str, np.ndarray]:
    """The small store's rows, computed anew by a plain loop over the network's modules: no capture, no store."""
    from featurestore.checkpoints.seeded import draw_weights
    from featurestore.networks.registry import RECIPES, get_backbone
    from featurestore.photos.decode import decode

    source = FeatureStore.open(small_store).source()
    network = get_backbone("vggface").build().eval()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    keys = [key for key in shapes if key.startswith(("features.conv_1", "features.conv_2"))]
    network.load_state_dict(draw_weights(0, keys, shapes), strict=False)
    recipe = RECIPES["vggface-published"]
    rows: dict[str, list] = {name: [] for name in LAYERS}
    with torch.no_grad():
        for path in source.items["path"]:
            x = recipe.normalise(torch.from_numpy(recipe.pixels(decode(Path(path).read_bytes()))[None]))
            for name, module in network.features.named_children():
                x = module(x)
                if name in rows:
                    rows[name].append(x[0].numpy().copy())
                if name == LAYERS[-1]:
                    break
    return {name: np.stack(values) for name, values in rows.items()}
