"""Results written to files: tables and matrices as CSV, Parquet, Zarr or NumPy, block by block where they are lazy."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import xarray as xr

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL, replacing, write_atomically
from featurestore.text import near_matches

ENDINGS = (".csv", ".parquet", ".zarr", ".npy")


def check_ending(path: Path, several: bool = False, also: tuple[str, ...] = ()) -> None:
    """FeatureStoreError for an ending that no result, or not ``several`` matrices, can be written with; for a Zarr folder that
    is there. ``also`` are endings beside ``ENDINGS``."""
    known = (*ENDINGS, *also)
    if path.suffix not in known:
        raise FeatureStoreError(
            f"`out` {path} ends in none of {', '.join(known)}, which say the format. {near_matches(path.suffix, known)}"
        )
    if path.suffix == ".zarr" and path.exists():
        raise FeatureStoreError(f"`out` {path} is there already. Choose another name, or remove it.")
    if several and path.suffix in (".csv", ".parquet"):
        raise FeatureStoreError(
            f"`out` {path} takes one matrix: name one layer, or write what has more dimensions to .zarr or .npy."
        )


def write_result(result: pd.DataFrame | xr.DataArray | xr.Dataset, path: Path) -> list[Path]:
    """Write a table or array, computing it if it is lazy, and put it in place when it is complete; returns what was written.

    Two-dimensional arrays become a square table in CSV and Parquet, names along both sides. NumPy has a CSV of the names along
    its axes, if there are any, or the table's columns, beside. Raises FeatureStoreError for another ending, and for more
    dimensions than a table has.
    """
    several = isinstance(result, xr.Dataset) or (isinstance(result, xr.DataArray) and result.ndim != 2)
    check_ending(path, several)
    if path.suffix == ".zarr":
        _write_zarr(result, path)
        return [path]
    if path.suffix == ".npy":
        return _write_numpy(result, path)
    if path.suffix == ".parquet":
        table = _square(result) if isinstance(result, xr.DataArray) else result
        with replacing(path) as partial:
            table.to_parquet(partial)
    elif isinstance(result, xr.DataArray):
        _write_square(result, path)
    else:
        write_atomically(path, result.to_csv(index=not isinstance(result.index, pd.RangeIndex)))
    return [path]


def _square(array: xr.DataArray) -> pd.DataFrame:
    one, other = array.dims
    return pd.DataFrame(
        array.values, pd.Index(array[one].values, name=one), [str(name) for name in array[other].values]
    )


def _write_square(array: xr.DataArray, path: Path) -> None:
    """Row by row from a matrix on disk, so that one that is larger than memory can be written."""
    one, other = array.dims
    with replacing(path) as partial:
        matrix = partial.with_name(partial.name + ".npy")
        try:
            stored = _stored(array, matrix)
            names = pd.Index([str(name) for name in array[other].values])
            with partial.open("w", encoding="utf-8", newline="") as file:
                for start in range(0, len(stored), 256):
                    part = np.asarray(stored[start : start + 256])
                    index = pd.Index(array[one].values[start : start + len(part)], name=one)
                    pd.DataFrame(part, index, names).to_csv(file, header=start == 0)
        finally:
            matrix.unlink(missing_ok=True)


def _stored(array: xr.DataArray, path: Path) -> np.ndarray:
    """The array's numbers, in a file at ``path`` if they are lazy."""
    if not isinstance(array.data, da.Array):
        return array.values
    stored = np.lib.format.open_memmap(path, "w+", array.dtype, array.shape)
    da.store(array.data, stored, lock=False)
    stored.flush()
    return stored


def _write_numpy(result: Any, path: Path) -> list[Path]:
    names = path.with_suffix(".names.csv")
    if isinstance(result, pd.DataFrame):
        numeric = result.select_dtypes("number")
        labels = result.drop(columns=numeric.columns)
        with replacing(path) as partial, partial.open("wb") as file:
            np.save(file, numeric.to_numpy(np.float64))
        write_atomically(names, labels.to_csv() + "# columns: " + ", ".join(map(str, numeric.columns)) + "\n")
        return [path, names]
    if isinstance(result, xr.Dataset):
        raise FeatureStoreError(f"`out` {path} takes one array. Write the dataset to .zarr.")
    with replacing(path) as partial:
        made = _stored(result, partial)
        if not isinstance(made, np.memmap):
            with partial.open("wb") as file:
                np.save(file, made)
    along = [dim for dim in result.dims if dim in result.coords]
    if not along:
        return [path]
    write_atomically(
        names, pd.concat([pd.Series(result[dim].values, name=dim) for dim in along], axis=1).to_csv(index=False)
    )
    return [path, names]


def _write_zarr(result: Any, path: Path) -> None:
    dataset = result.to_xarray() if isinstance(result, pd.DataFrame) else result
    dataset = dataset.to_dataset(name=dataset.name or "values") if isinstance(dataset, xr.DataArray) else dataset
    partial = path.with_name(path.name + PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():  # that metadata is consolidated, as xarray expects of what it opens
            warnings.filterwarnings("ignore", message="Consolidated metadata")
            # uncompressed: numbers of a network hardly get smaller, and it would take longer than to compute them
            plain: dict[Any, Any] = {
                name: {"compressors": None} for name, one in dataset.items() if one.dtype.kind == "f"
            }
            dataset.to_zarr(partial, zarr_format=3, encoding=plain)
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
