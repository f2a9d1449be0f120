"""Photographs in, batches of pixels out: read, hash, decode and resize in threads, ahead of the network."""

import hashlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from featurestore.keys import FLIPPED, Place
from featurestore.photos.decode import MOST_PIXELS, PILLOWS_MOST, ImageError, decode
from featurestore.photos.files import read_photograph
from featurestore.photos.geometry import mirrored_place
from featurestore.photos.recipes import Recipe


@dataclass(frozen=True)
class Photo:
    """A photograph to compute, mirrored if its view's name says so. ``row`` is where its rows go, or None for one to be appended.

    ``sha256`` is what the file must still hash to, or None if that is not known yet. ``place`` is where the face
    is, for recipes that cut it out: the numbers of ``Recipe.place``.
    """

    face: str
    view: str
    path: str
    row: int | None = None
    sha256: str | None = None
    place: Place | None = None

    @property
    def flipped(self) -> bool:
        """Whether it is mirrored, with its place, before the recipe."""
        return self.view.endswith(FLIPPED)

    def __str__(self) -> str:
        return f"({self.face!r}, {self.view!r}) {self.path}"


@dataclass(frozen=True)
class Failure:
    """A photograph that gave no pixels, and why."""

    photo: Photo
    reason: str

    def __str__(self) -> str:
        return f"{self.photo}: {self.reason}"


@dataclass
class Batch:
    """Pixels (n, size, size, 3) uint8 of ``photos``, whose rows are ``rows``, all in one shard."""

    pixels: torch.Tensor
    rows: list[int] = field(default_factory=list)
    photos: list[Photo] = field(default_factory=list)
    hashes: list[str] = field(default_factory=list)

    def add(self, photo: Photo, pixels: np.ndarray, sha256: str, row: int) -> None:
        """Put one photograph's pixels after those that are there."""
        self.pixels[len(self.rows)] = torch.from_numpy(pixels)
        self.rows.append(row)
        self.photos.append(photo)
        self.hashes.append(sha256)

    def trimmed(self) -> "Batch":
        """Without the places that were not filled."""
        return Batch(self.pixels[: len(self.rows)], self.rows, self.photos, self.hashes)


@dataclass(frozen=True)
class _Decoded:
    photo: Photo
    pixels: np.ndarray
    sha256: str


def _load(photo: Photo, recipe: Recipe, max_pixels: int) -> _Decoded | Failure:
    try:
        rgb, digest = read_photo(photo, max_pixels)
        place = photo.place
        if photo.flipped:
            rgb, place = np.ascontiguousarray(rgb[:, ::-1]), mirrored_place(place, rgb.shape[1])
        return _Decoded(photo, recipe.pixels(rgb, place), digest)
    except ImageError as error:
        return Failure(photo, str(error))
    except MemoryError:
        return Failure(photo, "there is not enough memory for it")
    except OSError as error:
        return Failure(photo, error.strerror or str(error))


def read_photo(photo: Photo, max_pixels: int = MOST_PIXELS) -> tuple[np.ndarray, str]:
    """The picture as its file shows it (not mirrored), uint8 (height, width, 3) RGB, and the file's sha256.

    Raises ImageError for what is no file or image, for other content than ``photo.sha256``, and for more than ``max_pixels``
    where that is not known: what is cached already may have any number; OSError as reading does.
    """
    content = read_photograph(photo.path)
    digest = hashlib.sha256(content).hexdigest()
    if photo.sha256 is not None and digest != photo.sha256:
        raise ImageError("the photograph changed since its other layers were cached")
    return decode(content, max_pixels if photo.sha256 is None else PILLOWS_MOST), digest


def _load_in_order(
    photos: Iterable[Photo], recipe: Recipe, workers: int, ahead: int, max_pixels: int
) -> Iterator[_Decoded | Failure]:
    """Loaded photographs in the order given, at most ``ahead`` of them waiting in memory."""
    waiting: deque[Future[_Decoded | Failure]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for photo in photos:
                waiting.append(pool.submit(_load, photo, recipe, max_pixels))
                if len(waiting) >= ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def failures(photos: Iterable[Photo], recipe: Recipe, workers: int, max_pixels: int | None = None) -> list[Failure]:
    """Those photographs that give no pixels, and why."""
    loaded = _load_in_order(photos, recipe, workers, 2 * workers, max_pixels or MOST_PIXELS)
    return [each for each in loaded if isinstance(each, Failure)]


def batches(
    photos: Iterable[Photo],
    recipe: Recipe,
    *,
    slots: int,
    next_row: int,
    batch_size: int,
    workers: int,
    skip: bool,
    pin: bool = False,
    max_pixels: int | None = None,
) -> Generator[Batch | Failure, None, None]:
    """Full batches of decoded photographs, and each photograph that gave no pixels.

    A batch ends at a shard's end, so that an interrupted run resumes on the same ones. Photographs without a row get the
    next free one, in order, from ``next_row``. With ``skip`` a failure changes nothing for the others; otherwise what
    came before the first one is given, then the failure, and no more. ``max_pixels`` as of ``read_photo``.
    """
    shape = (batch_size, recipe.size, recipe.size, 3)
    batch = Batch(torch.empty(shape, dtype=torch.uint8, pin_memory=pin))
    for loaded in _load_in_order(photos, recipe, workers, 2 * batch_size, max_pixels or MOST_PIXELS):
        if isinstance(loaded, Failure):
            if batch.rows and not skip:
                yield batch.trimmed()
            yield loaded
            if not skip:
                return
            continue
        row = loaded.photo.row
        if row is None:
            row, next_row = next_row, next_row + 1
        if batch.rows and row // slots != batch.rows[0] // slots:
            yield batch.trimmed()
            batch = Batch(torch.empty(shape, dtype=torch.uint8, pin_memory=pin))
        batch.add(loaded.photo, loaded.pixels, loaded.sha256, row)
        if len(batch.rows) == batch_size or (row + 1) % slots == 0:
            yield batch.trimmed()
            batch = Batch(torch.empty(shape, dtype=torch.uint8, pin_memory=pin))
    if batch.rows:
        yield batch.trimmed()
