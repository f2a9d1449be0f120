"""The Zarr in which the maps of a run's explanation are kept: a dataset keyed by trial and place that any reader opens.

A variable for each method, float32 (trial, choice, place, y, x), in one chunk for each trial, which is written in one step: a
chunk that is there is finished. ``curve-METHOD`` (trial, kind, fraction) beside them; see ``heads.explain.checks``.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
import zarr

from featurestore.errors import FeatureStoreError
from featurestore.text import listing
from heads.explain.checks import FRACTIONS, KINDS
from heads.explain.methods import METHODS
from heads.explain.pictures import DIMENSIONS

CHOICES = ("head", "person")
CURVE = "curve-"  # begins the names of curves
_TOLD = ("store", "library_versions")  # attributes that make no other maps
_OF_TRIALS = ("trial", "face_id", "view", "answer")  # what tells trials from others
FORMAT = "face-featurestore-maps 1"


class Archive:
    """Maps on disk, to be written a trial at a time and read lazily."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._group = zarr.open_group(path, mode="r+", zarr_format=3)

    @classmethod
    def make(cls, path: Path, coordinates: xr.Dataset, attributes: Mapping[str, Any]) -> "Archive":
        """The archive at ``path``, made if it is not there. FeatureStoreError if there is one of other maps or trials."""
        attributes = json.loads(json.dumps({"format": FORMAT, **attributes}))
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            coordinates.assign_attrs(attributes).to_zarr(partial, mode="w", zarr_format=3, consolidated=False)
            partial.rename(path)
            return cls(path)
        try:
            archive = cls(path)
        except (OSError, ValueError, KeyError) as error:
            raise FeatureStoreError(
                f"{path} is no Zarr of maps: {error}. Delete it, or choose another folder (`out`)."
            ) from None
        found = dict(archive._group.attrs)
        other = [name for name in attributes if name not in _TOLD and found.get(name) != attributes[name]]
        if other:
            raise FeatureStoreError(
                f"{path} holds maps of another {listing(other)}: {found.get(other[0])!r}, not {attributes[other[0]]!r}. Choose "
                "another folder (`out`), or delete that one."
            )
        with xr.open_zarr(path, consolidated=False, chunks=None) as there:
            same = all(np.array_equal(there[name].values, coordinates[name].values) for name in _OF_TRIALS)
        if not same:
            raise FeatureStoreError(
                f"{path} holds maps of other trials: it was made with another number of them (`n`), `seed`, `where` or file. "
                "Choose another folder (`out`), or delete that one."
            )
        return archive

    def add(self, name: str, shape: tuple[int, ...], dimensions: tuple[str, ...], dtype: str = "float32") -> None:
        """A variable (trial, …) of NaN, or of -1 for whole numbers, unless it is there."""
        if name in self._group:
            if self._array(name).shape != shape:
                raise FeatureStoreError(f"{self.path} holds {name!r} of another shape. Choose another folder (`out`).")
            return
        self._group.create_array(
            name,
            shape=shape,
            chunks=(1, *shape[1:]),
            dtype=dtype,
            fill_value=np.nan if dtype == "float32" else -1,
            dimension_names=dimensions,
        )

    def add_method(self, name: str, n: int, square: tuple[int, int, int]) -> None:
        """Room for a method's maps of ``n`` trials of (places, y, x), and for its curves."""
        self.add(name, (n, len(CHOICES), *square), DIMENSIONS)

    def add_curve(self, name: str, n: int) -> None:
        """Room for the curves of a method, or another order."""
        self.add(CURVE + name, (n, len(KINDS), len(FRACTIONS)), ("trial", "kind", "fraction"))

    def done(self, name: str, trial: int) -> bool:
        """Whether a trial's part of a variable is there."""
        zeros = ["0"] * (self._array(name).ndim - 1)
        return (self.path / name / "c" / str(trial)).joinpath(*zeros).is_file()

    def write(self, name: str, trial: int, values: np.ndarray) -> None:
        """A trial's part, whole or not at all; FeatureStoreError if the disk is full."""
        try:
            self._array(name)[trial] = values
        except OSError as error:
            raise FeatureStoreError(
                f"{self.path} could not be written: {error}. Free some space and run the same command again: what is there is "
                "not computed again."
            ) from None

    def read(self, name: str, trial: int | None = None) -> np.ndarray:
        """A trial's part of a variable, or all of it."""
        return np.asarray(self._array(name)[... if trial is None else trial])

    def _array(self, name: str) -> Any:
        return self._group[name]


def open_maps(path: str | os.PathLike[str]) -> xr.Dataset:
    """The maps of an explanation, lazily, chunk by chunk; FeatureStoreError for a folder that holds none."""
    path = Path(path).expanduser()
    if (path / "maps.zarr").is_dir():
        path = path / "maps.zarr"
    try:
        found: xr.Dataset = xr.open_zarr(path, consolidated=False, chunks=None)
    except (OSError, ValueError, KeyError) as error:
        raise FeatureStoreError(f"{path} holds no maps: {error}. Make them: pipelines/explain_heads.py") from None
    if found.attrs.get("format") != FORMAT:
        raise FeatureStoreError(f"{path} is no Zarr of maps that pipelines/explain_heads.py wrote.")
    return found[
        sorted(found.data_vars, key=lambda name: (list(METHODS).index(name) if name in METHODS else len(METHODS), name))
    ]


def coordinates(trials: pd.DataFrame, keys: list[list[tuple[str, str]]], answers: np.ndarray) -> xr.Dataset:
    """What the maps are keyed by: ``face_id`` and ``view`` (trial, place), the trial's number, and the ``answer`` given."""
    faces, views = (np.array([[key[i] for key in each] for each in keys], object) for i in range(2))
    return xr.Dataset(
        {"answer": ("trial", answers.astype(np.int64))},
        coords={
            "trial": trials.index.to_numpy(np.int64),
            "choice": np.array(CHOICES, object),
            "kind": np.array(KINDS, object),
            "fraction": np.array(FRACTIONS),
            "face_id": (("trial", "place"), faces),
            "view": (("trial", "place"), views),
        },
    )
