"""Demo faces as files: photographs, their table, a contact sheet, and simulated odd-one-out trials."""

import csv
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

from featurestore.demo.faces import TRAITS, Face, build, draw_faces, places, render, yaw_angles
from featurestore.keys import BOX, LANDMARKS


def _write_face(face: Face, folder: Path, yaws: list[float], names: list[str]) -> np.ndarray:
    """Render one face's views to PNG; returns them in a row for the contact sheet."""
    surface = build(face)
    pictures = [render(surface, yaw) for yaw in yaws]
    (folder / face.face_id).mkdir(parents=True, exist_ok=True)
    for picture, name in zip(pictures, names, strict=True):
        cv2.imwrite(str(folder / face.face_id / f"{name}.png"), picture[:, :, ::-1])
    return np.concatenate(
        [cv2.resize(picture, (112, 112), interpolation=cv2.INTER_AREA) for picture in pictures], axis=1
    )


def make_faces(
    folder: Path,
    n_faces: int = 100,
    n_views: int = 5,
    seed: int = 0,
    n_trials: int = 5000,
    error_rate: float = 0.1,
    progress: Callable[[int], object] = lambda n: None,
) -> float:
    """Write ``face-001/…png``, ``faces.csv``, ``trials.csv`` and ``contact_sheet.png``; the same from the same arguments.

    Returns the best accuracy reachable on the trials: 1 - error rate, because an observer who errs picks one of the
    other two faces.
    """
    folder.mkdir(parents=True, exist_ok=True)
    faces = draw_faces(n_faces, seed)
    yaws = yaw_angles(n_views)
    names = ["frontal" if yaw == 0 else f"yaw{yaw:+.0f}" for yaw in yaws]
    strips = []
    with ThreadPoolExecutor() as pool:
        for strip in pool.map(partial(_write_face, folder=folder, yaws=yaws, names=names), faces):
            strips.append(strip)
            progress(n_views)
    _write_sheet(folder / "contact_sheet.png", strips)
    with (folder / "faces.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["face_id", "view", "path", "gender", "yaw", *TRAITS, *BOX, *LANDMARKS])
        for face in faces:
            for yaw, name, (box, landmarks) in zip(yaws, names, places(face, yaws), strict=True):
                traits = [f"{value:.4f}" for value in face.traits]
                keyed = [face.face_id, name, f"{face.face_id}/{name}.png"]
                writer.writerow([*keyed, face.gender, yaw, *traits, *box, *landmarks])
    _write_trials(folder / "trials.csv", faces, names, seed, n_trials, error_rate)
    return 1 - error_rate


def _write_sheet(path: Path, strips: list[np.ndarray], most: int = 12) -> None:
    """The first faces, one row of views each, in two columns."""
    shown = strips[:most]
    if len(shown) % 2:
        shown.append(np.full_like(shown[0], 255))
    half = len(shown) // 2
    columns = [np.concatenate(shown[:half]), np.concatenate(shown[half:])]
    cv2.imwrite(str(path), np.concatenate(columns, axis=1)[:, :, ::-1])


def _write_trials(path: Path, faces: list[Face], views: list[str], seed: int, n: int, error_rate: float) -> None:
    """Odd-one-out choices of simulated observers: the face left out of the pair with the nearest traits, unless they err.

    The last fifth shows each triplet to five of them, so that a noise ceiling can be estimated.
    """
    if len(faces) < 3:
        return
    rng = np.random.default_rng([seed, 1_000_003])
    traits = np.stack([face.traits for face in faces])
    pairs = list(combinations(range(3), 2))
    once = n - n // 5
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "participant", "face_1", "view_1", "face_2", "view_2", "face_3", "view_3", "odd"])
        for trial in range(n):
            if trial < once or (trial - once) % 5 == 0:
                three = rng.choice(len(faces), 3, replace=False)
                seen = rng.integers(0, len(views), 3)
            distances = [np.linalg.norm(traits[three[a]] - traits[three[b]]) for a, b in pairs]
            odd = 3 - sum(pairs[int(np.argmin(distances))])
            if rng.random() < error_rate:
                odd = (odd + int(rng.integers(1, 3))) % 3
            shown = [part for i in range(3) for part in (faces[three[i]].face_id, views[seen[i]])]
            writer.writerow([trial + 1, f"observer-{trial % 20 + 1:02d}", *shown, faces[three[odd]].face_id])
