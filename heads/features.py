"""Rows of one layer as a head takes them: distinct items, float32, on the head's device, in buffers used again."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import TypeVar

import numpy as np
import torch

from featurestore.errors import FeatureStoreError
from featurestore.store.rows import Rows
from heads.computed_rows import ComputedRows

Batch = TypeVar("Batch", bound=tuple[torch.Tensor, ...])

_BATCH = 256  # rows at a time, where all of them are looked at once
_FLIPS = 1  # tells the random numbers of the mirroring from those of the order of examples


class Features:
    """Rows of one layer from one source, or from several of the same shape, numbered one after the other.

    On a GPU the rows of ``items`` are kept in its memory if they take less than half of what is free; otherwise,
    and on the CPU, each batch is read from the memory maps. ``mirrored`` are the rows of the same items' mirrored photographs,
    of those at least that are trained on.
    """

    def __init__(
        self,
        parts: Sequence[Rows | ComputedRows],
        device: torch.device | str = "cpu",
        items: np.ndarray | None = None,
        mirrored: "Features | None" = None,
    ) -> None:
        shapes = {rows.layer.shape for rows in parts}
        if len(shapes) != 1:
            raise FeatureStoreError(
                f"layer {parts[0].layer.name!r} has rows of different shapes in the sources asked for: {sorted(shapes)}. "
                "Trials can only mix sources of one network."
            )
        self.parts = list(parts)
        self.mirrored = mirrored
        self.device = torch.device(device)
        self.shape: tuple[int, ...] = shapes.pop()
        self.starts = np.cumsum([0, *(len(rows) for rows in parts)])
        self._reused: torch.Tensor | None = None
        self._resident: tuple[torch.Tensor, torch.Tensor] | None = None
        if self.device.type == "cuda" and items is not None:
            self._keep_on_device(np.unique(items))

    def __len__(self) -> int:
        return int(self.starts[-1])

    def gather(self, items: torch.Tensor) -> torch.Tensor:
        """The rows of ``items`` (int64, ascending) as float32 (n, *shape). Valid until the next call: the buffer is reused."""
        if self._resident is not None:
            kept, place = self._resident
            return kept[place[items.to(self.device)]]
        gathered = self._from_maps(items)
        return gathered.to(self.device, torch.float32, non_blocking=True)

    def gathered(
        self, batches: Iterable[Batch], gather: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> Iterator[tuple[torch.Tensor, Batch]]:
        """Of each batch, whose first part are its items, the rows (by ``gather``) and itself; the next one's are read meanwhile.

        Rows are valid until the next batch.
        """
        for batch, following in pairwise(chain(batches, [None])):
            assert batch is not None
            rows = (gather or self.gather)(batch[0])
            if following is not None:
                self.prefetch(following[0])
            yield rows, batch

    def prefetch(self, items: torch.Tensor) -> None:
        """Start reading the rows of ``items`` (int64, ascending) that are not in memory."""
        if self._resident is None:
            for rows, wanted, _ in self._parts_of(items):
                rows.prefetch(wanted)

    def augmented(self, seed: int, epoch: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """``gather`` for one epoch of training: of each item the mirrored row instead, at random, if there are such."""
        mirrored = self.mirrored
        if mirrored is None:
            return self.gather
        flipped = torch.from_numpy(np.random.default_rng([seed, epoch, _FLIPS]).random(len(self)) < 0.5)

        def gather(items: torch.Tensor) -> torch.Tensor:
            rows, flip = self.gather(items), flipped[items]
            rows[flip.to(self.device)] = mirrored.gather(items[flip])
            return rows

        return gather

    def statistics(self, items: np.ndarray) -> tuple[torch.Tensor, float]:
        """Mean row of distinct ``items`` (features,) and the factor that makes the mean square of what is left of a feature 1."""
        n, total, squares = 0, torch.zeros(int(np.prod(self.shape)), dtype=torch.float64), 0.0
        parts = zip(torch.from_numpy(np.unique(items)).split(_BATCH), strict=True)
        for rows, _ in self.gathered(parts, self._from_maps):
            # On the CPU, since not every device has float64; not in float16, where the square of 256 is infinite.
            flat = rows.flatten(1).float()
            n += len(flat)
            total += flat.sum(0, dtype=torch.float64)
            squares += float(flat.square().sum(dtype=torch.float64))
        mean = total / n
        spread = (squares / n - float(mean.square().sum())) / len(mean)
        name = self.parts[0].layer.name
        if not np.isfinite(spread):
            raise FeatureStoreError(
                f"rows of layer {name!r} hold NaN or infinite numbers, so nothing can be learned from them. Find them: "
                f"pipelines/verify_store.py {self.parts[0].layer.store}"
            )
        if spread <= 1e-9 * squares / n / len(mean):
            raise FeatureStoreError(
                f"the {n} training rows of layer {name!r} are all the same, so nothing can be learned from them."
            )
        return mean.float(), spread**-0.5

    def _from_maps(self, items: torch.Tensor) -> torch.Tensor:
        out = self._buffer(len(items))
        for rows, wanted, place in self._parts_of(items):
            if rows.dtype == out.dtype:
                rows.gather(wanted, out=out[place])
            else:  # sources stored in different precisions meet in float32
                out[place] = rows.gather(wanted)
        return out

    def _parts_of(self, items: torch.Tensor) -> Iterator[tuple[Rows | ComputedRows, torch.Tensor, slice]]:
        """The sources that hold some of ``items``, with their own row numbers, and where among ``items`` those stand."""
        cuts = np.searchsorted(items.numpy(), self.starts).tolist()
        for rows, start, first, last in zip(self.parts, self.starts.tolist(), cuts, cuts[1:], strict=False):
            if last > first:
                yield rows, items[first:last] - start, slice(first, last)

    def _buffer(self, n: int) -> torch.Tensor:
        """The first ``n`` rows of a buffer that only grows: allocating a new one costs more than the gather."""
        buffer = self._reused
        if buffer is None or len(buffer) < n:
            pinned = self.device.type == "cuda"
            dtypes = {rows.dtype for rows in self.parts}
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
            buffer = self._reused = torch.empty((n, *self.shape), dtype=dtype, pin_memory=pinned)
        elif self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # the copy that reads this pinned buffer must be over
        return buffer[:n]

    def _keep_on_device(self, items: np.ndarray) -> None:
        free, _ = torch.cuda.mem_get_info(self.device)
        if len(items) * int(np.prod(self.shape)) * 4 > free / 2:
            return
        kept = torch.empty((len(items), *self.shape), device=self.device)
        start = 0
        for rows, _ in self.gathered(zip(torch.from_numpy(items).split(_BATCH), strict=True)):
            kept[start : start + len(rows)] = rows
            start += len(rows)
        place = torch.full((len(self),), -1, dtype=torch.int64)
        place[torch.from_numpy(items)] = torch.arange(len(items))
        self._resident = kept, place.to(self.device)
