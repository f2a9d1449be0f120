"""The layers of a handful of pictures, without a store: what the caching run would compute, as labelled arrays."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from PIL import Image

from featurestore.caching.compute import compute
from featurestore.caching.extractor import load_extractor
from featurestore.caching.job import CachingRequest, prepare_job
from featurestore.devices import PRECISIONS, reproducible
from featurestore.errors import FeatureStoreError
from featurestore.keys import BOX, LANDMARKS
from featurestore.photos.decode import ImageError, decode, to_rgb
from featurestore.photos.detection import Detector
from featurestore.photos.keys import FoundFaces
from featurestore.store.zarr_format import Layer

Picture = str | os.PathLike[str] | Image.Image | np.ndarray
_FLOAT32 = np.dtype(np.float32)


def activations(
    images: Picture | Iterable[Picture] | Mapping[str, Picture],
    layers: str | Iterable[str],
    *,
    backbone: str = "vggface",
    weights: str,
    recipe: str | None = None,
    find_faces: bool = False,
    device: str = "auto",
) -> xr.Dataset:
    """The named layers of some pictures: a float32 variable (item, *shape) for each, dimensions named as in a store.

    ``images`` are paths, PIL images or arrays (uint8 RGB of shape (height, width, 3), or grey (height, width)), one or
    several, or a mapping that names them. The coordinate ``item`` is the name, else the path as given, else the place in
    ``images``. ``layers``, ``backbone``, ``weights``, ``recipe`` and ``device`` are those of pipelines/cache_layers.py, and
    the numbers are those that it stores; NaN and infinity are given as they are. With ``find_faces`` the largest face of each
    picture is cut out, or turned upright, as its recipe has it. Everything is held in memory.

    FeatureStoreError for a picture that cannot be read, or that shows no face (it is named), and for names and weights as in a
    caching run.
    """
    pictures = _named(images)
    asked = [layers] if isinstance(layers, str) else list(layers)
    decoded = {name: _rgb(name, picture) for name, picture in pictures.items()}
    table = pd.DataFrame({"face_id": list(pictures), "view": "", "path": ""})
    if find_faces:
        detector = Detector()
        table[[*BOX, *LANDMARKS]] = [_face_in(name, rgb, detector) for name, rgb in decoded.items()]
    faces = FoundFaces(table, "activations", boxed=find_faces)
    job = prepare_job(CachingRequest(Path(), faces, asked, weights, backbone=backbone, recipe=recipe, device=device))
    places = job.request.faces.table[list(job.recipe.place)].to_numpy(np.float64).tolist()
    pixels = [job.recipe.pixels(rgb, tuple(place) or None) for rgb, place in zip(decoded.values(), places, strict=True)]
    dtypes = dict.fromkeys(job.layers, _FLOAT32)
    precision = PRECISIONS[job.request.precision]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in job.layers}
    with reproducible():
        network = load_extractor(job.spec, job.layers, job.weights, job.device, precision)
        for first in range(0, len(pixels), job.batch_size):
            batch = torch.from_numpy(np.stack(pixels[first : first + job.batch_size]))
            outputs = compute(network, job.recipe, batch, job.device, precision, dtypes)
            outputs.wait()
            for name, rows in outputs.rows.items():
                parts[name].append(rows.numpy())
    variables = {}
    for name in job.layers:
        shape = job.shapes[name]
        layer = Layer(name, shape, _FLOAT32, "none", 1, len(pictures), Path())
        variables[name] = layer.metadata()["dimension_names"], np.concatenate(parts[name]).reshape(-1, *shape)
    return xr.Dataset(variables, coords={"item": np.array(list(pictures), object)}, attrs=job.attributes)


def _named(images: Picture | Iterable[Picture] | Mapping[str, Picture]) -> dict[str, Picture]:
    if isinstance(images, Mapping):
        named = {str(name): picture for name, picture in images.items()}
    else:
        single = isinstance(images, str | os.PathLike | Image.Image | np.ndarray)
        several: list[Any] = [images] if single else list(images)  # type: ignore[arg-type]
        names = [str(each) if isinstance(each, str | os.PathLike) else str(i) for i, each in enumerate(several)]
        named = dict(zip(names, several, strict=True))
        if len(named) < len(several):
            twice = next(name for name in names if names.count(name) > 1)
            raise FeatureStoreError(
                f"two of `images` have the name {twice!r}. Name them: `images` {{name: picture, …}}."
            )
    if not named:
        raise FeatureStoreError("`images` holds no picture.")
    return named


def _face_in(name: str, rgb: np.ndarray, detector: Detector) -> tuple[float, ...]:
    """``BOX`` and ``LANDMARKS`` of the largest face; FeatureStoreError if there is none."""
    faces = detector.faces(rgb)
    if not faces:
        raise FeatureStoreError(f"{name}: no face found. Leave the picture out, or cut it to the face.")
    return (*faces[0].box, *faces[0].landmarks)


def _rgb(name: str, picture: Picture) -> np.ndarray:
    """uint8 (height, width, 3) RGB; FeatureStoreError names a picture that gives none."""
    try:
        if isinstance(picture, Image.Image):
            return to_rgb(picture)
        if isinstance(picture, str | os.PathLike):
            if not Path(picture).is_file():  # a pipe would hang, a device never end
                raise ImageError("there is no such file")
            return decode(Path(picture).read_bytes())
    except OSError as error:
        raise FeatureStoreError(f"{name}: {error.strerror or error}.") from None
    except ImageError as error:
        raise FeatureStoreError(f"{name}: {error}.") from None
    if not isinstance(picture, np.ndarray):
        raise FeatureStoreError(
            f"picture {name!r} of `images` is of type {type(picture).__name__}. Give a path, a PIL image or a NumPy array."
        )
    if (
        picture.dtype != np.uint8
        or not picture.size
        or picture.ndim not in (2, 3)
        or picture.shape[2:] not in ((), (3,))
    ):
        raise FeatureStoreError(
            f"picture {name!r} of `images` is an array {picture.shape} of {picture.dtype}. Give uint8 from 0 to 255: "
            "(height, width, 3) in R, G, B order, or (height, width) for grey."
        )
    return picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, axis=2)
