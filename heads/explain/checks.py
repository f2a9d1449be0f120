"""Is an explanation true? What hiding the pixels that a map calls relevant does to the choice, beside other orders of hiding."""

from collections.abc import Mapping

import cv2
import numpy as np
import torch

from heads.explain.methods import Trial

FRACTIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)  # of the photographs' area that is hidden, or shown
BLOCKS = 16  # across the square: what is hidden at once
RANDOM, EDGES = "random", "edges"  # orders that know nothing of the network
_AT_ONCE = 12  # photographs in a forward pass


def block_sums(maps: torch.Tensor | np.ndarray) -> np.ndarray:
    """Sums over blocks of (places, y, x): (places, BLOCKS, BLOCKS) float64. Where the size is no multiple, some are a pixel larger."""
    values = np.asarray(maps, np.float64)
    edges = block_edges(values.shape[-1])[:-1]
    return np.add.reduceat(np.add.reduceat(values, edges, axis=1), edges, axis=2)


def block_edges(size: int) -> np.ndarray:
    """Where blocks begin and end along a side of ``size`` pixels, (BLOCKS + 1,) int64."""
    return np.linspace(0, size, min(BLOCKS, size) + 1).round().astype(np.int64)


def block_pixels(blocks: np.ndarray, size: int) -> np.ndarray:
    """bool (places, BLOCKS, BLOCKS) to the pixels (places, size, size)."""
    of_pixel = np.repeat(np.arange(blocks.shape[-1]), np.diff(block_edges(size)))
    return blocks[:, of_pixel][:, :, of_pixel]


def edge_strength(pixels: torch.Tensor) -> np.ndarray:
    """Sobel gradients of the grey photographs (places, size, size, 3) uint8: (places, size, size)."""
    grey = pixels.float().mean(-1).numpy()
    return np.stack([np.hypot(cv2.Sobel(each, -1, 1, 0), cv2.Sobel(each, -1, 0, 1)) for each in grey])


def most(scores: np.ndarray, fraction: float) -> np.ndarray:
    """bool (places, y, x): the blocks with the largest scores, in all photographs of the trial together."""
    n = round(fraction * scores.size)
    chosen = np.zeros(scores.size, bool)
    chosen[np.argsort(-scores, axis=None, kind="stable")[:n]] = True
    return chosen.reshape(scores.shape)


def orders_beside(trial: Trial, seed: int) -> dict[str, np.ndarray]:
    """Scores of blocks that know nothing of the network: random ones, by ``seed``, and the strength of edges."""
    edges = block_sums(edge_strength(trial.pixels))
    return {RANDOM: np.random.default_rng(seed).random(edges.shape), EDGES: edges}


def curves(trial: Trial, orders: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is explained while blocks are hidden, and while they are shown, most relevant first: (2, FRACTIONS) of each order.

    Deletion hides them in the photographs, insertion shows them in the recipe's mean colour. The value is that of the choice
    that ``trial`` explains.
    """
    with torch.no_grad():
        inputs = trial.inputs().detach()
        found = {}
        for name, scores in orders.items():
            shown = []
            for hides in (True, False):
                for fraction in FRACTIONS:
                    first = block_pixels(most(scores, fraction), inputs.shape[-1])
                    shown.append(torch.from_numpy(~first if hides else first))
            masked = inputs * torch.stack(shown)[:, :, None].to(inputs.device)
            n = max(1, _AT_ONCE // inputs.shape[1])
            values = torch.cat([trial.of_inputs(part) for part in masked.split(n)])
            found[name] = values.float().cpu().numpy().reshape(2, len(FRACTIONS))
    return found

