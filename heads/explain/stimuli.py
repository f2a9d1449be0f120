"""Stimuli for the next experiment: photographs with the most relevant parts hidden, and with equally large random ones."""

import io
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import pandas as pd
import xarray as xr
from PIL import Image

from featurestore.caching.provenance import photo_of, recipe_of
from featurestore.errors import FeatureStoreError
from featurestore.files import write_atomically
from featurestore.photos.decode import ImageError, decode
from featurestore.photos.geometry import inverse, moved, square_to_photograph
from featurestore.photos.loading import read_photo
from featurestore.store.reader import Source
from heads.explain.blocks import BLOCKS, block_edges, block_sums
from heads.explain.pictures import Picture, pictures

TABLE = "masked.csv"


def export_masked(
    maps: xr.Dataset,
    method: str,
    source: Source,
    folder: str | os.PathLike[str],
    share: float = 0.1,
    block: int | None = None,
    fill: Literal["mean", "blur"] = "mean",
    seed: int = 0,
    choice: str = "head",
) -> pd.DataFrame:
    """Write two PNGs for each trial and place, and ``masked.csv`` about them, into ``folder``; the CSV's table is returned.

    They are the photograph in its own size and frame (of a mirrored view too, as the file shows it). Hidden are ``share`` of
    the square's area, 0 … 1: in ``relevant`` the blocks whose relevance for the ``choice``, summed, is the most positive, in
    ``random`` as many others, drawn by ``seed``, trial and place, which overlap those only where the rest does not suffice.
    Blocks have a side of about ``block`` pixels of the square, a sixteenth of it by default; only those that lie within the
    photograph are hidden. They are filled with the mean colour of what the network sees of the photograph, or it is blurred
    there, by as much as a block. The table: file, trial, place (from 1), face_id, view, kind, share (of the area, as it came
    out), relevance (share of the picture's positive relevance that is hidden), blocks (JSON: of each its corners, x and y in
    the photograph's pixels, in which 0 is the middle of the first).

    FeatureStoreError for a photograph that is gone or changed, for other files of the same names in ``folder``, which are left
    as they are, and for a share, block or fill that cannot be.
    """
    size, folder = recipe_of(source).size, Path(folder)
    block = max(1, size // BLOCKS) if block is None else block
    _check(maps, size, share, block, fill)
    rows = []
    for picture in pictures(maps, [method], [choice]):
        rgb, affine = _photograph(source, picture)
        blocks = _Blocks(size, block, affine, rgb)
        chosen = blocks.chosen(picture.relevance, share, np.random.default_rng([seed, picture.trial, picture.place]))
        positive = blocks.sums(np.maximum(picture.relevance, 0))
        for kind, hidden in chosen.items():
            name = f"trial-{picture.trial:06d}_place-{picture.place + 1}_{kind}.png"
            _write(folder / name, blocks.hide(rgb, hidden, fill))
            row = {"file": name, "trial": picture.trial, "place": picture.place + 1, "face_id": picture.face}
            row |= {"view": picture.view, "kind": kind, "share": float(blocks.areas[hidden].sum())}
            row["relevance"] = float(positive[hidden].sum() / positive.sum()) if positive.any() else math.nan
            rows.append({**row, "blocks": json.dumps(blocks.corners[hidden].round(2).tolist())})
    if not rows:
        raise FeatureStoreError(f"no map of {method!r} for the {choice}'s choice was computed, so nothing is hidden.")
    table = pd.DataFrame(rows)
    _write_table(folder / TABLE, table)
    return table


def _check(maps: xr.Dataset, size: int, share: float, block: int, fill: str) -> None:
    shape = maps.sizes["y"], maps.sizes["x"]
    if shape != (size, size):
        raise FeatureStoreError(
            f"the maps are {shape[1]} × {shape[0]} pixels, the source's input {size} × {size}: they are of another source."
        )
    if not 0 < share < 1:
        raise FeatureStoreError(f"`share` {share!r} of the area cannot be hidden. Give more than 0 and less than 1.")
    if not 1 <= block <= size:
        raise FeatureStoreError(f"`block` {block!r} is no side of a block, 1 … {size} pixels of the network's input.")
    if fill not in ("mean", "blur"):
        raise FeatureStoreError(f"`fill` {fill!r} is not mean or blur.")


def _photograph(source: Source, picture: Picture) -> tuple[np.ndarray, np.ndarray]:
    """The photograph as its file shows it, and the map from the square to it."""
    photo = photo_of(source, int(source.find((picture.face, picture.view))[0]))
    try:
        rgb, _ = read_photo(photo)
        return rgb, square_to_photograph(recipe_of(source), rgb.shape[0], rgb.shape[1], photo.place, photo.flipped)
    except (ImageError, OSError) as error:
        raise FeatureStoreError(
            f"{photo}: {error}. What is hidden was found in the photograph that was cached."
        ) from None


class _Blocks:
    """A square in blocks, numbered row by row, and where they are in a photograph.

    ``areas`` (n,) are shares of the square, ``corners`` (n, 4, 2) pixels of the photograph.
    """

    def __init__(self, size: int, block: int, affine: np.ndarray, rgb: np.ndarray) -> None:
        self.side = round(size / block)
        self.edges = block_edges(size, self.side)
        y, x = np.mgrid[: self.side, : self.side].reshape(2, -1)
        left, top, right, bottom = self.edges[x], self.edges[y], self.edges[x + 1], self.edges[y + 1]
        self.areas = (right - left) * (bottom - top) / size**2
        around = np.stack([left, top, right, top, right, bottom, left, bottom], axis=1).reshape(-1, 4, 2)
        self.corners = moved(affine, around - 0.5)
        height, width = rgb.shape[:2]
        inside = (self.corners >= -1) & (self.corners <= [width, height])  # half a pixel beyond the edge is none
        self.within = np.flatnonzero(inside.all(axis=(1, 2)))
        self._of_pixel = self._blocks_of_pixels(height, width, affine, size)
        self._blur = math.sqrt(abs(np.linalg.det(affine[:, :2]))) * size / self.side

    def _blocks_of_pixels(self, height: int, width: int, affine: np.ndarray, size: int) -> np.ndarray:
        """(height, width): the block that each pixel of the photograph is in, -1 outside of the square."""
        across, down = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
        of_square = np.repeat(np.arange(self.side, dtype=np.int32), np.diff(self.edges))  # a pixel's column, or row
        blocks, inside = np.zeros((height, width), np.int32), np.ones((height, width), bool)
        for (along_x, along_y, start), times in zip(inverse(affine).astype(np.float32), (1, self.side), strict=True):
            there = np.rint(along_x * across + along_y * down + start).astype(np.int32)
            inside &= (there >= 0) & (there < size)
            blocks += times * of_square[np.clip(there, 0, size - 1)]
        blocks[~inside] = -1
        return blocks

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(n,) of (y, x)."""
        return block_sums(values, self.side).ravel()

    def chosen(self, relevance: np.ndarray, share: float, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The blocks of each kind, as many of both."""
        count = min(max(1, round(share * self.side**2)), len(self.within))
        order = self.within[np.argsort(-self.sums(relevance)[self.within], kind="stable")]
        relevant, others = order[:count], order[count:]
        drawn = rng.permutation(others)[:count]
        again = rng.permutation(relevant)[: count - len(drawn)]
        return {"relevant": np.sort(relevant), "random": np.sort(np.concatenate([drawn, again]))}

    def hide(self, rgb: np.ndarray, blocks: Sequence[int] | np.ndarray, fill: str) -> np.ndarray:
        """The photograph without these blocks."""
        hidden = np.isin(self._of_pixel, blocks)
        if fill == "blur":
            return np.where(hidden[:, :, None], cv2.GaussianBlur(rgb, (0, 0), self._blur), rgb)
        shown = rgb.copy()
        shown[hidden] = np.rint(rgb[self._of_pixel >= 0].mean(axis=0))
        return shown


def _write(path: Path, rgb: np.ndarray) -> None:
    """Without loss; FeatureStoreError if there is a file that shows anything else."""
    if path.exists():
        try:
            same = np.array_equal(decode(path.read_bytes()), rgb)
        except (ImageError, OSError):
            same = False
        if not same:
            raise _another(path)
        return
    content = io.BytesIO()
    Image.fromarray(rgb).save(content, "PNG")
    write_atomically(path, content.getvalue())


def _write_table(path: Path, table: pd.DataFrame) -> None:
    content = table.to_csv(index=False)
    if path.exists() and path.read_bytes() != content.encode():
        raise _another(path)
    write_atomically(path, content)


def _another(path: Path) -> FeatureStoreError:
    return FeatureStoreError(
        f"{path} is there already, and is another one than would be written: it is kept. Choose another `folder`."
    )
