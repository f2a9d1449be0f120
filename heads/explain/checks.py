"""Is an explanation true? Checks of maps against the network that they are about.

Deletion and insertion: blocks of the photographs are blurred, or shown in blurred ones, the most relevant first, beside orders
that know nothing of the network. Randomised weights: a map that stays the same when weights are shuffled does not explain them
(Adebayo et al. 2018, "Sanity Checks for Saliency Maps").
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import cv2
import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import nn

from heads.explain.blocks import block_pixels, block_sums
from heads.explain.methods import Method, Trial
from heads.legs import Legs

# Of the photographs' area: what comes later is hardly the most relevant.
FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
HIDDEN = 0.1  # the one of them at which choices that flip are counted
KINDS = ("deletion", "insertion")
RANDOM, EDGES = "random", "edges"  # orders that know nothing of the network
CHANGES = 0.5  # mean rank correlation with the maps of shuffled weights above which a method does not explain them
_STAGES = 4  # of the network's layers, from the top, that are shuffled one after the other


def most(scores: np.ndarray, fraction: float) -> np.ndarray:
    """bool of the same shape: the ``fraction`` of blocks with the largest scores, in all photographs of a trial together."""
    chosen = np.zeros(scores.size, bool)
    chosen[np.argsort(-scores, axis=None, kind="stable")[: round(fraction * scores.size)]] = True
    return chosen.reshape(scores.shape)


def baseline_orders(trial: Trial, seed: int) -> dict[str, np.ndarray]:
    """Scores of blocks that know nothing of the network: random numbers by ``seed``, and Sobel gradients of the photographs."""
    grey = trial.pixels.float().mean(-1).numpy()
    edges = np.stack([np.hypot(cv2.Sobel(each, -1, 1, 0), cv2.Sobel(each, -1, 0, 1)) for each in grey])
    scores = block_sums(edges)
    return {RANDOM: np.random.default_rng(seed).random(scores.shape), EDGES: scores}


def curves(trial: Trial, orders: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ``trial`` explains while more and more blocks are hidden, or shown: of each order (KINDS, FRACTIONS) float32.

    ``orders`` are scores of blocks (places, BLOCKS, BLOCKS); the largest come first. What is hidden is blurred.
    """
    with torch.no_grad():
        inputs = trial.inputs().detach()
        size = inputs.shape[-1]
        blurred = np.stack([cv2.GaussianBlur(each, (0, 0), size / 15) for each in trial.pixels.numpy()])
        hidden = trial.legs.inputs(torch.from_numpy(blurred)[None])
        found = {}
        for name, scores in orders.items():
            chosen = np.stack([block_pixels(most(scores, fraction), size) for fraction in FRACTIONS])
            first = torch.from_numpy(chosen)[:, :, None].to(inputs.device)
            masked = torch.cat([torch.where(first, hidden, inputs), torch.where(first, inputs, hidden)])
            parts = masked.split(trial.at_once)
            values = torch.cat([trial.of_inputs(part) for part in parts])
            found[name] = values.float().cpu().numpy().reshape(len(KINDS), len(FRACTIONS))
    return found


def similarity_to_shuffled(
    trials: Sequence[Trial],
    methods: Sequence[Method],
    seed: int = 0,
    progress: Callable[[], object] = lambda: None,
) -> pd.DataFrame:
    """Maps beside those of the same network with shuffled weights: of the head, then of more and more of the network's layers.

    Rows: method, ``shuffled`` (what is), ``share`` of the network's layers that are, ``correlation``: Spearman's, over blocks,
    mean over ``trials``. Weights are shuffled within each tensor, from the top down, and put back at the end.
    """
    before = {method.name: [block_sums(method.function(trial).cpu().numpy()) for trial in trials] for method in methods}
    rows = []
    for shuffled, share in _shuffling(trials[0].legs, seed):
        for method in methods:
            after = [block_sums(method.function(trial).cpu().numpy()) for trial in trials]
            correlations = [_rank_correlation(*pair) for pair in zip(before[method.name], after, strict=True)]
            row = {"method": method.name, "shuffled": shuffled, "share": share}
            rows.append({**row, "correlation": float(np.mean(correlations)), "n": len(trials)})
        progress()
    return pd.DataFrame(rows)


def _rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; 0 where a map is the same everywhere, which says nothing."""
    if np.ptp(one) == 0 or np.ptp(other) == 0 or not np.isfinite(other).all():
        return 0.0
    return float(stats.spearmanr(one, other, axis=None).statistic)


def _shuffling(legs: Legs, seed: int) -> Iterator[tuple[str, float]]:
    """Shuffle the head's weights, then the network's from the top in ``_STAGES`` steps, naming what is shuffled at each."""
    generator = torch.Generator().manual_seed(seed)
    layers = [module for module in legs.backbone.modules() if list(module.parameters(recurse=False))]
    with _restored(legs):
        if any(weight.numel() > 1 for weight in legs.head.parameters()):
            _shuffle([legs.head], generator)
            yield "head", 0.0
        done = 0
        for until in sorted({round(stage * len(layers) / _STAGES) for stage in range(1, _STAGES + 1)} - {0}):
            _shuffle(layers[len(layers) - until : len(layers) - done], generator)
            done = until
            yield f"head and the upper {done} of {len(layers)} layers", done / len(layers)


def _shuffle(modules: Sequence[nn.Module], generator: torch.Generator) -> None:
    with torch.no_grad():
        for module in modules:
            for weight in module.parameters():
                order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))


@contextmanager
def _restored(legs: Legs) -> Iterator[None]:
    """Weights are put back at the end."""
    kept = [weight.detach().clone() for weight in legs.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(legs.parameters(), kept, strict=True):
                weight.copy_(before)
