"""The heads: small networks on the cached rows of a frozen one.

A head is asked for the logits of *examples*: index tuples into a batch of distinct rows. A batch of triplets names few
distinct items, so what depends on one item alone is computed once per item and gathered to the triplets.
``forward`` states the same mathematics plainly, without that. ``logits`` and ``accumulate`` drop out only where they are
given a generator; ``forward`` does in training mode, as torch modules do.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from featurestore.errors import FeatureStoreError
from featurestore.text import near_matches
from heads.models.banded import convolve

DROPOUT = 0.5  # after the bridge and inside the fc block, as published

# Channels in and out, kernel (height, width), stride (height, width), by width of the bridge. The signal is the stack of
# the rows x1, x2, x1, x3, x2, x3; its width goes 4047, 1974, 938, 280, 67, 3 and 251, 152, 53, 3.
CONV_KERNELS: dict[int, tuple[tuple[int, int, tuple[int, int], tuple[int, int]], ...]] = {
    4096: (
        (1, 2, (2, 50), (2, 1)),
        (2, 2, (3, 100), (1, 2)),
        (2, 1, (1, 100), (1, 2)),
        (1, 1, (1, 100), (1, 3)),
        (1, 1, (1, 80), (1, 3)),
        (1, 1, (1, 65), (1, 1)),
    ),
    300: (
        (1, 2, (2, 50), (2, 1)),
        (2, 2, (3, 100), (1, 1)),
        (2, 1, (1, 100), (1, 1)),
        (1, 1, (1, 51), (1, 1)),
    ),
}
_BLOCKS = {4096: (64, 32, 32, None, None, None), 300: (50, None, None, None)}  # outputs to one product; measured
_CHUNK = {4096: 64, 300: 256}  # triplets at a time, so that their signals fit the processor's caches; measured


class Head(nn.Module):
    """What every head offers. ``architecture`` holds the arguments that ``build_head`` makes it from again.

    ``shape`` is that of one row of the layer, such as (512, 7, 7) or (4096,).
    """

    n_places = 3  # items in one example
    wants_statistics = False  # whether ``standardise`` is to be called with the training rows' before training
    low_precision = False  # whether a bridge multiplies in bfloat16

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.n_features = math.prod(shape)
        self.architecture: dict[str, Any] = {}

    def reset(self, generator: torch.Generator) -> None:
        """Draw the initial weights: torch's defaults, Xavier uniform with bias .01 where the published code does."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                bound = 1 / math.sqrt(math.prod(module.weight.shape[1:]))
                nn.init.uniform_(module.weight, -bound, bound, generator=generator)
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -bound, bound, generator=generator)

    def logits(
        self, rows: torch.Tensor, examples: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Logits (n, classes) of ``examples`` (n, n_places), which index the distinct ``rows`` (m, *shape)."""
        raise NotImplementedError

    def standardise(self, mean: torch.Tensor, scale: float) -> None:
        """Take the training rows' ``mean`` (features,) off every row and multiply by ``scale``; for heads that want it."""
        raise NotImplementedError

    def penalty(self) -> torch.Tensor | None:
        """What is added to the loss for the weights themselves; None for nothing."""
        return None

    def accumulate(
        self, rows: torch.Tensor, examples: torch.Tensor, labels: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the gradient of the mean cross-entropy and of the penalty; returns both, summed, and the logits (n, classes)."""
        logits = self.logits(rows, examples, generator)
        loss = F.cross_entropy(logits, labels)
        penalty = self.penalty()
        if penalty is not None:
            loss = loss + penalty
        loss.backward()
        return loss.detach(), logits.detach()

    def extra_repr(self) -> str:
        """The row's shape, for ``print(head)``."""
        return f"shape={self.shape}"


class StandardisedHead(Head):
    """A head that sees rows less the training rows' mean, times one factor that makes their features' mean square 1.

    Raw activations differ a thousandfold in size between layers; on large ones the conv head's ReLUs die in the first
    steps. Both are buffers, so they travel with the weights; ``export`` folds them into the first linear layer.
    """

    wants_statistics = True
    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(shape)
        self.register_buffer("mean", torch.zeros(self.n_features))
        self.register_buffer("scale", torch.ones(()))

    def reset(self, generator: torch.Generator) -> None:
        """Rows as they are."""
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.scale)

    def standardise(self, mean: torch.Tensor, scale: float) -> None:
        """See ``Head.standardise``."""
        self.mean.copy_(mean)
        self.scale.fill_(scale)

    def standardised(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (m, *shape) as vectors (m, features)."""
        return (rows.flatten(1) - self.mean) * self.scale


class Bridge(nn.Sequential):
    """One item's row to ``width`` features: linear, ReLU, dropout."""

    def __init__(self, n_features: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_features, width)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(DROPOUT)


class ConvDecision(nn.Sequential):
    """Convolutions over the stacked pairs x1 x2, x1 x3, x2 x3, with ReLU between them: (n, 3, width) to (n, 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.chunk = width, _CHUNK[width]
        for i, (channels_in, channels_out, kernel, stride) in enumerate(CONV_KERNELS[width]):
            if i:
                self.append(nn.ReLU())
            self.append(nn.Conv2d(channels_in, channels_out, kernel, stride))

    def reset(self) -> None:
        """Turn kernels whose weights sum to less than zero, and start biases at zero.

        What a kernel sees is never negative: with a negative sum or bias it would answer below zero everywhere, its ReLU
        would never open, and with one or two channels to a layer nothing could be learned at all.
        """
        with torch.no_grad():
            for convolution in self.convolutions[:-1]:
                signs = convolution.weight.sum((1, 2, 3), keepdim=True).sign()
                convolution.weight.mul_(torch.where(signs < 0, -1.0, 1.0))
                _bias(convolution).zero_()

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """The layers with weights, first to last."""
        return [module for module in self if isinstance(module, nn.Conv2d)]

    def forward(self, bridged: torch.Tensor) -> torch.Tensor:
        """Plainly: (n, 3, width) to logits (n, 3)."""
        stacked = bridged[:, [0, 1, 0, 2, 1, 2]].unsqueeze(1)  # (n, 1, 6, width)
        return super().forward(stacked).flatten(1)

    def fast(self, bridged: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The same from (3, n, width), the three items first, by matrix products."""
        first, *later = self.convolutions
        block, *blocks = _BLOCKS[self.width]
        _, n, width = bridged.shape
        # The first kernel's two rows meet one item each, so a pair's signal is a sum of two that know one item.
        upper, lower = first.weight[:, 0, 0, :, None], first.weight[:, 0, 1, :, None]
        above = convolve(bridged[:2].reshape(2 * n, width, 1), upper, torch.zeros_like(_bias(first)), 1, width, block)
        below = convolve(bridged[1:].reshape(2 * n, width, 1), lower, _bias(first), 1, width, block)
        (a1, a2), (b2, b3) = (signal.view(2, n, -1, 2).unbind(0) for signal in (above, below))
        valid = width - first.kernel_size[1] + 1
        kept = a1.shape[1] if blocks[0] else valid
        signal = torch.stack([(a + b)[:, :kept] for a, b in ((a1, b2), (a1, b3), (a2, b3))], dim=2)
        signal = signal.flatten(2)  # (n, positions, 3 pairs × 2 channels)
        for convolution, block in zip(later, blocks, strict=True):
            stride, taps = convolution.stride[1], convolution.kernel_size[1]
            kernel = convolution.weight.permute(0, 3, 2, 1).flatten(2)  # (out, taps, pair × channel)
            signal = convolve(F.relu(signal), kernel, _bias(convolution), stride, valid, block)
            valid = (valid - taps) // stride + 1
        return signal[:, :valid, 0]


class FcDecision(nn.Module):
    """Linear layers on the three items side by side: (n, 3, width) to (n, 3); ``hidden`` 0 for a single layer."""

    chunk = 1 << 16

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.width = width
        self.hidden = nn.Linear(3 * width, hidden) if hidden else None
        self.last = nn.Linear(hidden or 3 * width, 3)

    def reset(self, generator: torch.Generator) -> None:
        """Xavier uniform, bias .01, as published."""
        for linear in filter(None, (self.hidden, self.last)):
            nn.init.xavier_uniform_(linear.weight, generator=generator)
            nn.init.constant_(linear.bias, 0.01)

    def forward(self, bridged: torch.Tensor) -> torch.Tensor:
        """Plainly: (n, 3, width) to logits (n, 3)."""
        x = bridged.flatten(1)
        if self.hidden is not None:
            x = F.dropout(F.relu(self.hidden(x)), DROPOUT, self.training)
        return self.last(x)

    def fast(self, bridged: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The same from (3, n, width), with dropout drawn from ``generator``."""
        x = bridged.transpose(0, 1).flatten(1)
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
            if generator is not None:
                x = (x / (1 - DROPOUT)).masked_fill(_dropped(x.shape, generator), 0)
        return self.last(x)


class TripletHead(StandardisedHead):
    """A bridge from each item, shared by the three or one each, then a decision block on all three.

    Bridge 4,096 wide from a map (channels, y, x), 300 from a vector, as published.
    """

    def __init__(
        self, shape: tuple[int, ...], decision: str, parallel: bool = False, hidden: int | None = None
    ) -> None:
        super().__init__(shape)
        width = 4096 if len(shape) > 1 else 300
        self.bridges = nn.ModuleList(Bridge(self.n_features, width) for _ in range(3 if parallel else 1))
        if hidden is None:
            hidden = 1024 if width == 4096 else 0
        self.decision: ConvDecision | FcDecision = (
            ConvDecision(width) if decision == "conv" else FcDecision(width, hidden)
        )

    def reset(self, generator: torch.Generator) -> None:
        """Torch's defaults, with live kernels; the fc block as published."""
        StandardisedHead.reset(self, generator)
        Head.reset(self, generator)
        if isinstance(self.decision, FcDecision):
            self.decision.reset(generator)
        else:
            self.decision.reset()

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, x3: torch.Tensor) -> torch.Tensor:
        """Logits (n, 3), which of the three is odd, from three tensors of rows (n, *shape)."""
        bridges = list(self.bridges) * (1 if len(self.bridges) == 3 else 3)
        items = [bridge(self.standardised(x)) for bridge, x in zip(bridges, (x1, x2, x3), strict=True)]
        return self.decision(torch.stack(items, dim=1))

    @property
    def _bridges(self) -> list[Bridge]:
        return [bridge for bridge in self.bridges if isinstance(bridge, Bridge)]

    def _embed(self, rows: torch.Tensor, triplets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every item once through its bridge: (m, width), and where each triplet's three are in it, (n, 3)."""
        rows = self.standardised(rows)
        if len(self.bridges) == 1:
            return self._cross(self._bridges[0], rows), triplets
        embedded, places, start = [], [], 0
        for bridge, items in zip(self._bridges, triplets.unbind(1), strict=True):
            distinct, inverse = items.unique(return_inverse=True)
            embedded.append(self._cross(bridge, rows[distinct]))
            places.append(inverse + start)
            start += len(distinct)
        return torch.cat(embedded), torch.stack(places, dim=1)

    def _cross(self, bridge: Bridge, rows: torch.Tensor) -> torch.Tensor:
        """Rows (m, features) to (m, width), dropout left to come."""
        with torch.autocast(rows.device.type, torch.bfloat16, enabled=self.low_precision):
            return F.relu(bridge.linear(rows)).to(rows.dtype)

    def _decide(self, embedded: torch.Tensor, places: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        if generator is None:
            gathered = _gather(embedded, places)
        else:
            # Dropout after the gather: every place of every triplet draws its own, as if each had its own bridge.
            gathered = _gather(embedded / (1 - DROPOUT), places)
            gathered.masked_fill_(_dropped(gathered.shape, generator), 0)
        return self.decision.fast(gathered, generator)

    def logits(
        self, rows: torch.Tensor, examples: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """See ``Head.logits``."""
        embedded, places = self._embed(rows, examples)
        return torch.cat([self._decide(embedded, part, generator) for part in places.split(self.decision.chunk)])

    def accumulate(
        self, rows: torch.Tensor, examples: torch.Tensor, labels: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``Head.accumulate``, but backward through the decision block a few triplets at a time, to bound memory."""
        embedded, places = self._embed(rows, examples)
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


class SimilarityHead(Head):
    """A linear map to an embedding; the odd one is the face left out of the most similar pair.

    The map is the identity plus a low-rank update (``rank``), or plus a full matrix (``rank=None``), so an untrained head
    judges by the raw activations, and ``pull`` × ‖update‖² pulls it back there. Rank 0 has nothing to train: zero-shot.
    Similarity is the cosine or the dot product of embeddings, times a learned factor; the order of the three does not
    matter. Rows are only scaled, to a mean squared length of 1: taking their mean off would change the raw judgments that
    training starts from. Rank 0 leaves them as they are.
    """

    scale: torch.Tensor

    def __init__(
        self, shape: tuple[int, ...], rank: int | None = 64, measure: str = "cosine", pull: float = 1e-2
    ) -> None:
        super().__init__(shape)
        n = self.n_features
        if rank is None and n > 4096:
            raise FeatureStoreError(
                f"a full map of {n} features has {n * n:,} numbers. Give a rank, such as --rank 64."
            )
        if rank is not None and rank < 0:
            raise FeatureStoreError(f"a map of rank {rank} is not possible; give 1 or more, or full.")
        rank = min(rank, n) if rank is not None else None
        self.rank, self.measure, self.pull = rank, measure, pull
        self.wants_statistics = rank != 0
        self.register_buffer("scale", torch.ones(()))
        if rank is None:
            self.update = nn.Parameter(torch.zeros(n, n))
        elif rank:
            self.down = nn.Parameter(torch.zeros(n, rank))
            self.up = nn.Parameter(torch.zeros(rank, n))
        self.log_factor = nn.Parameter(torch.zeros(()), requires_grad=rank != 0)

    def reset(self, generator: torch.Generator) -> None:
        """An update of zero: ``up`` zero, ``down`` normal; similarities of order 1 become logits of order 10."""
        nn.init.ones_(self.scale)
        if self.rank is None:
            nn.init.zeros_(self.update)
        elif self.rank:
            nn.init.normal_(self.down, std=1 / math.sqrt(self.n_features), generator=generator)
            nn.init.zeros_(self.up)
        nn.init.constant_(self.log_factor, math.log(10.0))

    def standardise(self, mean: torch.Tensor, scale: float) -> None:
        """Scale alone: the mean square about ``mean`` and ``mean``'s own together make the rows' squared length."""
        self.scale.fill_(float(self.n_features / scale**2 + mean.double().square().sum()) ** -0.5)

    def scaled(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (m, *shape) as vectors (m, features)."""
        return rows.flatten(1) * self.scale

    def embed(self, rows: torch.Tensor) -> torch.Tensor:
        """The embedding of rows (m, *shape): (m, features)."""
        x = self.scaled(rows)
        if self.rank is None:
            return x + x @ self.update
        return x + (x @ self.down) @ self.up if self.rank else x

    def forward(self, x1: torch.Tensor, x2: torch.Tensor, x3: torch.Tensor) -> torch.Tensor:
        """Logits (n, 3): of each place, how alike the two others are."""
        items = [self.embed(x) for x in (x1, x2, x3)]
        if self.measure == "cosine":
            items = [F.normalize(item, dim=1) for item in items]
        pairs = [(items[a] * items[b]).sum(1) for a, b in ((1, 2), (0, 2), (0, 1))]
        return torch.stack(pairs, dim=1) * self.log_factor.exp()

    def logits(
        self, rows: torch.Tensor, examples: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """As ``forward``; the part of a similarity that the update does not touch is computed without gradient."""
        left, right = examples[:, [1, 0, 0]].flatten(), examples[:, [2, 2, 1]].flatten()
        if self.rank is None:
            embedded = self.embed(rows)
            similarity = _inner(embedded, left, right)
            lengths = embedded.square().sum(1)
        else:
            with torch.no_grad():
                x = self.scaled(rows)
                similarity = _inner(x, left, right)
                lengths = x.square().sum(1)
            if self.rank:
                # z = x + (x down) up, so  z·z' = x·x' + p·q' + q·p' + p (up upᵀ) p'  with p = x down, q = x upᵀ.
                p, q = x @ self.down, x @ self.up.t()
                mixed = q + p @ (self.up @ self.up.t()) / 2
                pl, pr, ml, mr = p[left], p[right], mixed[left], mixed[right]
                similarity = similarity + (pl * mr).sum(1) + (ml * pr).sum(1)
                lengths = lengths + 2 * (p * mixed).sum(1)
        if self.measure == "cosine":
            norms = lengths.clamp_min(1e-24).sqrt()
            similarity = similarity / (norms[left] * norms[right])
        return similarity.view(-1, 3) * self.log_factor.exp()

    def penalty(self) -> torch.Tensor | None:
        """``pull`` times the squared Frobenius norm of the update."""
        if self.rank is None:
            return self.pull * self.update.square().sum()
        return self.pull * ((self.up @ self.up.t()) * (self.down.t() @ self.down)).sum() if self.rank else None


class IdentityHead(StandardisedHead):
    """The multi-view head: one linear layer from a row to face identities; logits (n, faces)."""

    n_places = 1

    def __init__(self, shape: tuple[int, ...], faces: Iterable[str]) -> None:
        super().__init__(shape)
        self.faces = tuple(faces)
        self.linear = nn.Linear(self.n_features, len(self.faces))

    def reset(self, generator: torch.Generator) -> None:
        """Xavier uniform, bias .01, as published."""
        super().reset(generator)
        nn.init.xavier_uniform_(self.linear.weight, generator=generator)
        nn.init.constant_(self.linear.bias, 0.01)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (n, faces) of rows (n, *shape), in the order of ``faces``."""
        return self.linear(self.standardised(rows))

    def logits(
        self, rows: torch.Tensor, examples: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """See ``Head.logits``; examples (n, 1)."""
        return self(rows)[examples[:, 0]]


def _gather(embedded: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """(m, width) at places (n, 3): (3, n, width). The backward of an embedding is deterministic, unlike an index's."""
    return F.embedding(places.t().contiguous(), embedded)


def _bias(convolution: nn.Conv2d) -> torch.Tensor:
    assert convolution.bias is not None  # torch's type allows it
    return convolution.bias


def _dropped(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """bool: where dropout puts a zero. Eight decisions to a random int64, which is what makes it cheap."""
    n = math.prod(shape)
    numbers = torch.empty(-(-n // 8), dtype=torch.int64, device=generator.device)
    numbers.random_(-(2**63), None, generator=generator)
    return (numbers.view(torch.uint8)[:n] < round(DROPOUT * 256)).view(shape)


def _inner(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x[left] · x[right] for each pair, (n,): out of all products where rows are few, in pieces where they are many."""
    if len(x) ** 2 <= 100 * len(left):
        return (x @ x.t())[left, right]
    return torch.cat([(x[a] * x[b]).sum(1) for a, b in zip(left.split(64), right.split(64), strict=True)])


BUILDERS: dict[str, Callable[..., Head]] = {
    "conv": lambda shape, parallel=False: TripletHead(shape, "conv", parallel),
    "fc": lambda shape, parallel=False: TripletHead(shape, "fc", parallel),
    "fc8-conv": lambda shape: TripletHead(_vector(shape), "conv"),
    "fc8-fc": lambda shape: TripletHead(_vector(shape), "fc", hidden=300),
    "similarity": SimilarityHead,
    "zero-shot": lambda shape, measure="cosine": SimilarityHead(shape, 0, measure),
    "identity": IdentityHead,
}


def build_head(name: str, shape: tuple[int, ...], **options: Any) -> Head:
    """An untrained head of that name for rows of ``shape``, with weights still to be drawn (``reset``) or loaded.

    Options: ``parallel`` (conv, fc: one bridge for each of the three), ``rank``, ``measure`` (``cosine`` or ``dot``) and
    ``pull`` (similarity), ``measure`` (zero-shot), ``faces`` (identity). FeatureStoreError for an unknown name.
    """
    if name not in BUILDERS:
        raise FeatureStoreError(f"there is no head {name!r}. {near_matches(name, BUILDERS)}")
    with torch.device("meta"):
        head = BUILDERS[name](tuple(shape), **options)
    head.architecture = {"head": name, "shape": list(shape), **options}
    return head


def draw_head(name: str, shape: tuple[int, ...], seed: int, **options: Any) -> Head:
    """A head with initial weights that depend on ``seed`` and the architecture alone, in training mode, on the CPU."""
    head = build_head(name, shape, **options).to_empty(device="cpu")
    head.reset(torch.Generator().manual_seed(seed))
    return head


def _vector(shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(shape) != 1:
        raise FeatureStoreError(f"the fc8 heads take vectors, such as fc7-relu (4096), not rows of shape {shape}.")
    return shape
