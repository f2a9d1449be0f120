"""Random weights from a seed, the same on every machine: for trials of the software, never for results."""

import math
import re
import zlib
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from featurestore.networks.spec import Gains

_DRAW = 1 << 22  # values drawn at a time, to bound the float64 scratch


def draw_weights(
    seed: int, keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]], gains: Gains = ()
) -> dict[str, torch.Tensor]:
    """Random float32 weights that depend on (seed, key, shape) alone, so on no machine, order or torch version.

    He-scaled normal weights, small normal biases, batch-norm statistics near the identity; drawn in float64 by
    ``numpy.random.default_rng(crc32("seed:key"))``, scaled (also by the first of ``gains`` whose expression is the key's),
    then cast.
    """
    return {key: torch.from_numpy(_draw_one(seed, key, shapes, _gain(key, gains))) for key in keys}


def _gain(key: str, gains: Gains) -> float:
    return next((factor for expression, factor in gains if re.fullmatch(expression, key)), 1.0)


def _draw_one(seed: int, key: str, shapes: Mapping[str, tuple[int, ...]], gain: float) -> np.ndarray:
    shape = shapes[key]
    module, _, leaf = key.rpartition(".")
    rng = np.random.default_rng(zlib.crc32(f"{seed}:{key}".encode()))
    if leaf == "num_batches_tracked":
        return np.array(1, np.int64)
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        return (rng.uniform(0.5, 1.5, shape) * gain).astype(np.float32)
    if leaf == "weight":
        std = math.sqrt(2 / math.prod(shape[1:])) * gain
    else:
        batch_norm = f"{module}.running_mean" in shapes
        std = (0.1 if batch_norm else 0.05) * gain
    values = np.empty(math.prod(shape), np.float32)
    for start in range(0, values.size, _DRAW):
        stop = min(start + _DRAW, values.size)
        values[start:stop] = rng.standard_normal(stop - start) * std
    return values.reshape(shape)
