"""A bridge from each of three items, and a decision block on the three."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from featurestore.errors import FeatureStoreError
from heads.models.base import DROPOUT, Head, StandardisedHead, dropout_mask
from heads.models.low_precision import low_product

BRIDGE_OF_MAPS, BRIDGE_OF_VECTORS = 4096, 300  # features, as published


class Decision(Protocol):
    """A decision block: a torch module from (n, 3, width) to logits (n, 3). ``chunk`` is how many triplets it takes at a time."""

    chunk: int

    def reset(self, generator: torch.Generator) -> None:
        """Draw its initial weights."""

    def __call__(self, bridged: torch.Tensor) -> torch.Tensor:
        """Plainly: (n, 3, width) to logits (n, 3)."""

    def fast(self, bridged: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The same from (3, n, width), the three items first, with dropout drawn from ``generator``."""

    def published_modules(self, block: int) -> dict[str, str]:
        """See ``Head.published_modules``."""


class Bridge(nn.Sequential):
    """One item's row to ``width`` features: linear, ReLU, dropout."""

    def __init__(self, n_features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_features, width)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(DROPOUT)


class TripletHead(StandardisedHead):
    """A bridge from each item, shared by the three or one each, then a decision block on all three.

    Bridge 4,096 wide from a map (channels, y, x), 300 from a vector, as published.
    """

    has_bridge = True
    decision: Decision

    def __init__(self, shape: tuple[int, ...], decision: Callable[[int], Decision], parallel: bool = False) -> None:
        super().__init__(shape)
        width = BRIDGE_OF_MAPS if len(shape) > 1 else BRIDGE_OF_VECTORS
        self.bridges = nn.ModuleList(Bridge(self.n_features, width) for _ in range(3 if parallel else 1))
        self.decision = decision(width)

    def reset(self, generator: torch.Generator) -> None:
        """Torch's defaults, with live kernels; the fc block as published."""
        StandardisedHead.reset(self, generator)
        Head.reset(self, generator)
        self.decision.reset(generator)

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, x3: torch.Tensor) -> torch.Tensor:
        """Logits (n, 3), which of the three is odd, from three tensors of rows (n, *shape)."""
        bridges = list(self.bridges) * (1 if len(self.bridges) == 3 else 3)
        items = [bridge(self.standardised(x)) for bridge, x in zip(bridges, (x1, x2, x3), strict=True)]
        return self.decision(torch.stack(items, dim=1))

    def published_modules(self, block: int, earlier: bool) -> dict[str, str]:
        """See ``Head.published_modules``."""
        core = "vgg_core_fc8" if earlier else "vgg_core_bridge"
        parallel = len(self.bridges) == 3
        bridges = {
            f"bridges.{i}.linear": f"{core}.{f'bridge{i + 1}.' if parallel else ''}fc{block + 1}"
            for i in range(len(self.bridges))
        }
        decision = self.decision.published_modules(block)
        return bridges | {f"decision.{ours}": f"decision_block.{theirs}" for ours, theirs in decision.items()}

    @property
    def _bridges(self) -> list[Bridge]:
        return [bridge for bridge in self.bridges if isinstance(bridge, Bridge)]

    def _embed(
        self, rows: torch.Tensor, triplets: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Every item once through its bridge: (m, width), and where each triplet's three are in it, (n, 3).

        With a ``generator`` scaled for the dropout that follows.
        """
        rows = self.standardised(rows)
        scale = 1.0 if generator is None else 1 / (1 - DROPOUT)
        if len(self.bridges) == 1:
            return self._cross(self._bridges[0], rows) * scale, triplets
        embedded, places, start = [], [], 0
        for bridge, items in zip(self._bridges, triplets.unbind(1), strict=True):
            distinct, inverse = items.unique(return_inverse=True)
            embedded.append(self._cross(bridge, rows[distinct]))
            places.append(inverse + start)
            start += len(distinct)
        return torch.cat(embedded) * scale, torch.stack(places, dim=1)

    def _cross(self, bridge: Bridge, rows: torch.Tensor) -> torch.Tensor:
        """Rows (m, features) to (m, width), before dropout."""
        linear = bridge.linear
        return F.relu(low_product(rows, linear.weight) + linear.bias if self.low_precision else linear(rows))

    def _decide(self, embedded: torch.Tensor, places: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        gathered = _gather(embedded, places)
        if generator is not None:
            # Dropout after the gather: every place of every triplet draws its own, as if each had its own bridge.
            gathered.masked_fill_(dropout_mask(gathered.shape, generator), 0)
        return self.decision.fast(gathered, generator)

    def logits(
        self, rows: torch.Tensor, examples: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """See ``Head.logits``."""
        embedded, places = self._embed(rows, examples, generator)
        return torch.cat([self._decide(embedded, part, generator) for part in places.split(self.decision.chunk)])

    def accumulate(
        self, rows: torch.Tensor, examples: torch.Tensor, labels: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``Head.accumulate``, but backward through the decision block a few triplets at a time, to bound memory."""
        embedded, places = self._embed(rows, examples, generator)
        leaf = embedded.detach().requires_grad_()
        total, logits = torch.zeros((), device=rows.device), []
        chunk = self.decision.chunk
        for part, wanted in zip(places.split(chunk), labels.split(chunk), strict=True):
            logits.append(self._decide(leaf, part, generator))
            loss = F.cross_entropy(logits[-1], wanted, reduction="sum") / len(labels)
            loss.backward()
            total += loss.detach()
        embedded.backward(leaf.grad)
        return total, torch.cat(logits).detach()


def _gather(embedded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(m, width) at places (n, 3): (3, n, width). The backward of an embedding is deterministic, unlike an index's."""
    return F.embedding(places.t().contiguous(), embedded)


def require_vectors(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape``, or FeatureStoreError if rows are no vectors."""
    if len(shape) != 1:
        raise FeatureStoreError(f"the fc8 heads take vectors, such as fc7-relu (4096), not rows of shape {shape}.")
    return shape
