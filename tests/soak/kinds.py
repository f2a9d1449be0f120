"""What of each kind is read: the functions that users' files reach, called as users call them."""

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from featurestore import FeatureStore, Source
from featurestore.caching.verify import check_source
from featurestore.checkpoints.reader import open_tensors
from featurestore.checkpoints.weights import open_weights
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import RECIPES
from featurestore.photos.boxes import with_boxes
from featurestore.photos.decode import decode
from featurestore.photos.detection import _read_table
from featurestore.photos.identities import class_names, with_identities
from featurestore.photos.keys import FoundFaces, find_faces
from featurestore.photos.recipes import read_recipe
from featurestore.queries import similarity_analysis
from featurestore.queries.pairs import given_pairs
from featurestore.store.activation_files import open_activations, read_table
from featurestore.store.integrity import check_files
from heads.checkpoints import load_head
from heads.explain import job, regions
from heads.registry import draw_head
from heads.run_files import read_predictions
from heads.runs_table import finished_runs, runs_table
from heads.splits import Split
from heads.train import Checkpoint
from heads.trials.matching import load_trials
from tests.featurestore.checkpoints import MINI
from tests.soak.seeds import IDENTITY, N_FEATURES, STORE, VERSION_01


def _read_image(folder: Path, seed: str) -> None:
    path = folder / "image"
    if seed == "mask":
        regions._read_mask(path, tuple("ab"), {i: i % 2 for i in range(256)}, "label")
        return
    picture = decode(path.read_bytes())
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    for name in ("facenet", "vggface2", "vggface-published"):
        pixels = RECIPES[name].pixels(picture)
        assert pixels.shape == (RECIPES[name].size,) * 2 + (3,)


def _read_checkpoint(folder: Path, seed: str) -> None:
    path = folder / "file.weights"
    if seed.startswith(("small", "dlib")):
        for stored in open_tensors(path).tensors.values():
            values = stored.read()
            assert tuple(values.shape) == stored.shape
            assert np.prod(values.shape) < 1e6 or values.sum() is not None  # views of a few bytes are no memory
    else:
        weights = open_weights(str(path), MINI)
        weights.read(weights.keys)


@cache
def _keys() -> pd.DataFrame:
    return pd.DataFrame([(face, view) for face in ("anna", "ben", "7") for view in "12"], columns=["face_id", "view"])


@cache
def _judged() -> FeatureStore:
    return FeatureStore.open(VERSION_01 / "store.zarr")


def _found() -> FoundFaces:
    return FoundFaces(_keys().assign(path="x.png"), "folders")


_INDEX = pd.MultiIndex.from_frame(_keys())
_FACES = np.array(["anna", "ben", "7"], object)


def _read_similarity(path: Path) -> None:
    similarity_analysis._read_pairs(similarity_analysis._read_table(path), None, None, _FACES)


def _read_found(path: Path) -> None:
    with_boxes(_found(), path)
    _read_table(path, whole=True)


def _read_identities(path: Path) -> None:
    with_identities(_found(), path)
    class_names(path, 3)


def _read_trials(path: Path, view: str | None = "left") -> None:
    load_trials(path, _judged(), view=view, on_error="skip", where=["face_1 != 'a'"])
    load_trials(path, _judged(), view=view)


_TABLES: dict[str, Callable[[Path], object]] = {
    "photographs": find_faces,
    "list": find_faces,
    "boxes": lambda path: with_boxes(_found(), path),
    "found": _read_found,
    "identities": _read_identities,
    "labels": lambda path: class_names(path, 3),
    "landmarks": lambda path: regions._landmarks(None, path),  # type: ignore[arg-type]
    "mask-names": regions._mask_table,
    "mask-colours": regions._mask_table,
    "masks": regions._mask_files,
    "pairs": lambda path: given_pairs(path, _INDEX),
    "pairs-lfw": lambda path: given_pairs(path, _INDEX),
    "similarity": _read_similarity,
    "similarity-pairs": _read_similarity,
    "similarity-square": _read_similarity,
    "items": read_table,
    "trials": _read_trials,
    "trials-views": lambda path: _read_trials(path, None),
    "trials-published": _read_trials,
    "recipe-toml": read_recipe,
    "recipe-json": read_recipe,
}


def _read_csv(folder: Path, seed: str) -> None:
    (path,) = folder.glob("table.*")  # tables are not replaced
    _TABLES[seed](path)


_EXAMPLES = "4ec1579c7cec1e5e3cf84eba1aa1b9f087ee3f55d31b301f42575abb59d8532a"  # the hash of those of version 0.1


def _read_head(folder: Path, seed: str) -> None:
    if seed == "runs":
        for run in ("fc7-relu-similarity-lr0.0005-seed0-f3d3a8f7", "fc7-relu-zero-shot-b928d70b"):
            read_predictions(folder / run)
            with suppress(FeatureStoreError):  # so that what follows is read as well
                job._config(folder / run)
            with suppress(FeatureStoreError):
                load_head(folder / run / "weights.safetensors", "fc7-relu")
        for split in (folder / "splits").glob("*.json"):
            with suppress(FeatureStoreError):
                Split.load(split, _EXAMPLES, 120)
        runs_table(finished_runs(folder))
    elif seed == "unfinished":
        head = draw_head("similarity", (N_FEATURES,), 0)
        Checkpoint(folder / "state.safetensors", IDENTITY).restore(head, torch.optim.Adam(head.parameters()))
    else:
        name = "weights.safetensors" if seed.startswith("ours") else "head.pth"
        load_head(folder / name, "fc7-relu", (N_FEATURES,))


def _read_store(folder: Path, seed: str) -> None:
    check_files(folder / STORE)
    store = FeatureStore.open(folder / STORE)
    for source in store.sources.values():
        source.items, source.originals, repr(source), source.weights
        if source.keys.is_unique and len(source.keys):
            source.find(source.keys[:1])
        for name in source.layers:
            with suppress(FeatureStoreError):  # so that what follows is read as well
                _gather(source, name)
            with suppress(FeatureStoreError):
                if source.n_items:
                    source.dask(name).blocks[0].compute(scheduler="synchronous")
        check_source(source)


def _gather(source: Source, name: str) -> None:
    rows = source.rows(name)
    for start in range(0, min(len(rows), 32), 8):
        assert rows.gather(range(start, min(start + 8, len(rows)))).shape[1:] == rows.shape[1:]


def _read_activations(folder: Path, seed: str) -> None:
    kinds = {"exported": "hdf5", "files": "files"}
    kind = "pickle" if seed.startswith("pickle") else kinds.get(seed, "numpy")
    path = folder if kind == "files" else next(path for path in folder.glob("rows.*"))
    layer = None if kind == "hdf5" else "fc7" if kind == "pickle" else "features"
    with open_activations(path, kind, layer) as found:
        for rows in found.layers.values():
            for start in range(0, min(found.n, 32), 8):
                rows.read(start, min(start + 8, found.n))


READERS: dict[str, Callable[[Path, str], None]] = {  # of a case's folder and the seed that it was made of
    "images": _read_image,
    "checkpoints": _read_checkpoint,
    "csvs": _read_csv,
    "heads": _read_head,
    "stores": _read_store,
    "activations": _read_activations,
}
