"""Maps of relevance written by hand."""

from pathlib import Path

import numpy as np
import xarray as xr


def write_maps(
    path: Path, items: list[list[tuple[str, str]]], relevance: dict[str, np.ndarray], trials: list[int] | None = None
) -> xr.Dataset:
    """Opened lazily: of each trial its items (face, view), and by method float (trial, choice, place, y, x)."""
    keys = np.array(items, object)
    dims = ("trial", "choice", "place", "y", "x")
    dataset = xr.Dataset(
        {name: (dims, values.astype(np.float32)) for name, values in relevance.items()},
        coords={
            "trial": np.arange(len(items)) if trials is None else trials,
            "choice": np.array(["head", "person"], object),
            "face_id": (("trial", "place"), keys[:, :, 0]),
            "view": (("trial", "place"), keys[:, :, 1]),
        },
        attrs={"explained": "margin"},
    )
    chunks = {name: {"chunks": (1, *values.shape[1:])} for name, values in relevance.items()}
    dataset.to_zarr(path, zarr_format=3, consolidated=False, encoding=chunks)
    return xr.open_zarr(path, consolidated=False)
