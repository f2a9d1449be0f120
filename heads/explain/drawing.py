"""Figures of an explanation: single trials, mean maps by face, what hiding does, regions."""

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from featurestore.figures import draw_deletion, draw_mean_maps, draw_regions, draw_trial
from featurestore.figures.canvas import COLOURS
from featurestore.text import in_natural_order
from heads.explain.archive import CHOICES, open_maps
from heads.explain.checks import EDGES, RANDOM
from heads.explain.job import ExplainPlan
from heads.explain.pictures import mean_maps

_FACES = 8  # whose mean maps are drawn


def draw_explanation(plan: ExplainPlan, out: Path, n: int) -> list[Path]:
    """Draw the first ``n`` trials, and what the CSVs of ``out`` say, into ``out``/figures; returns the files.

    Of more methods than a figure tells apart, the first are drawn together.
    """
    folder = out / "figures"
    folder.mkdir(exist_ok=True)
    paths = [_draw_trial(plan, out, folder, i) for i in range(n)]
    paths.append(_draw_faces(plan, out, folder / "faces.png"))
    methods = [method.name for method in plan.methods[: len(COLOURS)]]
    if (out / "curves.csv").is_file():
        table = pd.read_csv(out / "curves.csv")
        table = table[table["method"].isin([*methods, RANDOM, EDGES])]
        paths.append(draw_deletion(table, folder / "deletion.png", "margin" + _random(plan)))
    if (out / "regions.csv").is_file():
        table = pd.read_csv(out / "regions.csv")
        table = table[(table["choice"] == CHOICES[0]) & table["method"].isin(methods)]
        paths.append(draw_regions(table, folder / "regions.png"))
    return paths


def squares(plan: ExplainPlan, pixels: torch.Tensor) -> np.ndarray:
    """The recipe's pixels (n, size, size, 3) as they look: R, G, B."""
    return np.asarray(pixels.flip(-1) if plan.any_legs.recipe.channels == "BGR" else pixels)


def _random(plan: ExplainPlan) -> str:
    """What figures say of a network of drawn numbers."""
    weights = plan.any_legs.weights
    return " (random weights)" if weights.random or weights.random_start else ""


def _draw_trial(plan: ExplainPlan, out: Path, folder: Path, i: int) -> Path:
    maps, trial = open_maps(out), plan.trial(i)
    one = maps.isel(trial=i)
    drawn = {method.name: one[method.name].sel(choice=CHOICES[0]).values for method in plan.methods}
    chosen, answer = int(one["chosen"]), int(one["answer"])
    for method in plan.methods:
        values = one[method.name].sel(choice=CHOICES[1]).values
        if np.isfinite(values).all():
            drawn[f"{method.name}, answer"] = values
    names = [" ".join(key) for key in plan.keys[i]]
    probabilities = one["probability"].values
    if len(plan.keys[i]) > 1:
        beneath = [f"odd: p = {p:.2f}" for p in probabilities]
        marks = {"chosen": chosen, "answer": answer}
    else:
        faces = plan.attributes["classes"]
        beneath = [f"{faces[chosen]}: p = {probabilities[chosen]:.2f}"]
        marks = {}
    if _random(plan):
        beneath[0] += f"\n{_random(plan).strip()}"
    path = folder / f"trial-{int(one['trial']):06d}.png"
    return draw_trial(squares(plan, trial.pixels), drawn, path, names=names, beneath=beneath, **marks)


def _draw_faces(plan: ExplainPlan, out: Path, path: Path) -> Path:
    maps = open_maps(out)
    faces = in_natural_order({face for keys in plan.keys for face, _ in keys})[:_FACES]
    means = {method.name: mean_maps(maps, method.name, faces=faces) for method in plan.methods}
    pictures = {}
    for face in faces:
        trial, place = next(
            (i, place) for i, keys in enumerate(plan.keys) for place, key in enumerate(keys) if key[0] == face
        )
        pictures[face] = squares(plan, plan.trial(trial).pixels)[place]
    return draw_mean_maps(pictures, means, path)
