"""Maps of relevance one picture at a time, and their means by face.

``maps`` is an ``xarray.Dataset`` with a variable for each method, float32 (trial, choice, place, y, x): what speaks for the
``choice`` ("head" or "person") at each pixel of each picture, negative against it; NaN where it was not computed. Coordinates:
``trial``, and ``face_id`` and ``view`` (trial, place). It is read a trial at a time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from featurestore.errors import FeatureStoreError
from featurestore.text import in_natural_order, listing, near_matches

DIMENSIONS = ("trial", "choice", "place", "y", "x")


@dataclass(frozen=True)
class Picture:
    """Relevance (y, x) float32 of one picture: of the trial in row ``row`` of the maps, whose number is ``trial``."""

    row: int
    trial: int
    method: str
    choice: str
    place: int
    face: str
    view: str
    relevance: np.ndarray


def methods_of(maps: xr.Dataset) -> list[str]:
    """The methods that there are maps of; FeatureStoreError for a dataset without any."""
    found = [str(name) for name, variable in maps.data_vars.items() if variable.dims == DIMENSIONS]
    if not found:
        raise FeatureStoreError(
            f"these are no maps of relevance: no variable has the dimensions {', '.join(DIMENSIONS)}; there are "
            f"{listing(maps.data_vars) or 'none'}."
        )
    return found


def pictures(
    maps: xr.Dataset, methods: Sequence[str] | None = None, choices: Sequence[str] | None = None
) -> Iterator[Picture]:
    """Every picture that was computed, trial by trial; of these methods and choices, or of all.

    FeatureStoreError for a method or choice that is not there, and for maps with some values that are no numbers.
    """
    methods = _known(methods, methods_of(maps), "method")
    every = [str(choice) for choice in maps["choice"].values]
    wanted = [every.index(choice) for choice in _known(choices, every, "choice")]
    trials, faces, views = (maps[name].values for name in ("trial", "face_id", "view"))
    for row in range(maps.sizes["trial"]):
        for method in methods:
            values = np.asarray(maps[method].isel(trial=row).values, np.float32)
            for i in wanted:
                unknown = ~np.isfinite(values[i])
                if unknown.all():
                    continue
                if unknown.any():
                    raise FeatureStoreError(
                        f"the map of {method!r} for the {every[i]}'s choice in trial {trials[row]} has {unknown.sum():,} pixels "
                        "that are no numbers. Compute it again."
                    )
                for place, relevance in enumerate(values[i]):
                    face, view = str(faces[row, place]), str(views[row, place])
                    yield Picture(row, int(trials[row]), method, every[i], place, face, view, relevance)


def _known(names: Sequence[str] | None, known: list[str], what: str) -> list[str]:
    for name in names or ():
        if name not in known:
            raise FeatureStoreError(f"there are no maps of the {what} {name!r}. {near_matches(name, known)}")
    return known if names is None else list(names)


def mean_maps(maps: xr.Dataset, method: str, choice: str = "head", faces: Sequence[str] | None = None) -> xr.DataArray:
    """(face, y, x) float32: the mean map of each face over its pictures, all views together; ``n`` (face) says how many.

    ``faces`` are those wanted, in their order; otherwise all that there are, in natural order. FeatureStoreError for one that
    no map shows.
    """
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for picture in pictures(maps, [method], [choice]):
        if faces is None or picture.face in faces:
            sums.setdefault(picture.face, np.zeros(picture.relevance.shape, np.float32))
            sums[picture.face] += picture.relevance
            counts[picture.face] = counts.get(picture.face, 0) + 1
    names = in_natural_order(sums) if faces is None else [str(face) for face in faces]
    missing = [face for face in names if face not in sums]
    if missing or not names:
        what = f"of {listing(missing)}" if missing else "at all"
        raise FeatureStoreError(f"there are no maps of {method!r} for the {choice}'s choice {what}.")
    means = np.stack([sums[face] / counts[face] for face in names])
    coordinates = {"face": names, "n": ("face", [counts[face] for face in names])}
    return xr.DataArray(means, coordinates, ("face", "y", "x"), name=method)
