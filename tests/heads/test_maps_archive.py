"""The Zarr of maps: whose maps are taken for whose."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from featurestore.errors import FeatureStoreError
from heads.explain.archive import Archive, coordinates, open_maps

KEYS = [[("f1", "1"), ("f2", "1"), ("f3", "2")], [("f2", "1"), ("f4", "1"), ("f5", "2")]]


def make(path: Path, trials: list[int], keys: list[list[tuple[str, str]]], answers: list[int]) -> Archive:
    table = pd.DataFrame(index=trials)
    return Archive.make(path, coordinates(table, keys, np.array(answers)), {"layer": "fc7"})


def test_maps_of_other_trials_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "maps.zarr"
    make(path, [3, 7], KEYS, [0, 2])
    make(path, [3, 7], KEYS, [0, 2])  # the same trials go on
    others = ([3, 8], KEYS, [0, 2]), ([3, 7], KEYS[::-1], [0, 2]), ([3, 7], KEYS, [0, 1]), ([3], KEYS[:1], [0])
    for trials, keys, answers in others:
        with pytest.raises(FeatureStoreError, match=r"maps of other trials.*`seed`"):
            make(path, trials, keys, answers)


def test_maps_open_by_the_name_of_their_folder(tmp_path: Path) -> None:
    archive = make(tmp_path / "maps.zarr", [3, 7], KEYS, [0, 2])
    archive.add_method("lrp", 2, (3, 4, 4))
    values = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    archive.write("lrp", 1, values)
    maps = open_maps(str(tmp_path))
    assert np.array_equal(maps["lrp"].sel(trial=7).values, values)
    assert maps["lrp"].sel(trial=3).isnull().all()
    assert maps["face_id"].sel(trial=7).values.tolist() == ["f2", "f4", "f5"]
