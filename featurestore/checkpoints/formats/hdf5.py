"""HDF5: datasets by their paths. Links and external storage are not followed, so that a file cannot read another."""

from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch

from featurestore.checkpoints.formats.base import MOST_TENSORS, Stored, TensorFile, damaged
from featurestore.errors import FeatureStoreError


def recognises(head: bytes, path: Path) -> bool:
    """HDF5's signature."""
    return head.startswith(b"\x89HDF\r\n\x1a\n")


def open_file(path: Path) -> TensorFile:
    """All numeric datasets, named by their path: ``data/conv1_1_w``."""
    datasets: dict[str, h5py.Dataset] = {}

    def note(name: str, found: object) -> bool | None:
        if not isinstance(found, h5py.Dataset) or not isinstance(name, str) or found.shape is None:
            return None
        if found.dtype.kind in "fiu" and found.dtype.itemsize <= 8:
            datasets[name] = found
        return len(datasets) > MOST_TENSORS or None  # True ends the visit

    try:
        file = h5py.File(path, "r")
        file.visititems(note)  # hard links only
    except (OSError, RuntimeError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise damaged(path, error) from None
    for name, found in datasets.items():
        if found.external or found.is_virtual:
            raise FeatureStoreError(
                f"{path}: the data of {name} are in another file (external storage), which is not read."
            )
    return TensorFile(
        path,
        "HDF5",
        {name: Stored(tuple(found.shape), partial(_read, path, found)) for name, found in datasets.items()},
    )


def _read(path: Path, found: h5py.Dataset) -> torch.Tensor:
    try:
        values = found[()]
    except (OSError, RuntimeError, MemoryError) as error:
        raise damaged(path, error) from None
    return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C", copy=None))  # of a scalar, too
