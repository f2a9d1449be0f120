"""A square in blocks, which checks and stimuli hide whole: single pixels of a photograph mean little."""

import numpy as np

BLOCKS = 16  # along a side, unless it is said otherwise


def block_edges(size: int, n: int = BLOCKS) -> np.ndarray:
    """Where ``n`` blocks begin and end along a side of ``size`` pixels, (n + 1,) int64; fewer if there are fewer pixels."""
    return np.linspace(0, size, min(n, size) + 1).round().astype(np.int64)


def block_sums(maps: np.ndarray, n: int = BLOCKS) -> np.ndarray:
    """Sums over blocks of (…, y, x), a square: (…, n, n) float64."""
    starts = block_edges(maps.shape[-1], n)[:-1]
    rows = np.add.reduceat(np.asarray(maps, np.float64), starts, axis=-2)
    return np.asarray(np.add.reduceat(rows, starts, axis=-1))


def block_pixels(blocks: np.ndarray, size: int) -> np.ndarray:
    """Values of blocks (…, n, n) to those of the pixels (…, size, size) in each."""
    of_pixel = np.repeat(np.arange(blocks.shape[-1]), np.diff(block_edges(size, blocks.shape[-1])))
    return np.asarray(blocks[..., of_pixel, :][..., of_pixel])
