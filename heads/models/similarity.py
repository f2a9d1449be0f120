"""linear map; the face left out of the most similar pair is odd; order-invariant"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from featurestore.errors import FeatureStoreError
from heads.models.base import Head


class SimilarityHead(Head):
    """A linear map to an embedding; the odd one is the face left out of the most similar pair.

    The map is the identity plus a low-rank update (``rank``), or plus a full matrix (``rank=None``), so an untrained head
    judges by the raw activations, and ``l2`` × ‖update‖² pulls it back there. Rank 0 has nothing to train: zero-shot.
    Similarity is the cosine or the dot product of embeddings, times a learned factor; the order of the three does not
    matter. Rows are only scaled, to a mean squared length of 1: taking their mean off would change the raw judgments that
    training starts from. Rank 0 leaves them as they are.
    """

    scale: torch.Tensor

    def __init__(
        self, shape: tuple[int, ...], rank: int | None = 64, measure: str = "cosine", l2: float = 1e-2
    ) -> None:
        super().__init__(shape)
        n = self.n_features
        if rank is None and n > 4096:
            raise FeatureStoreError(
                f"a full map of {n} features has {n * n:,} numbers. Give a rank, such as `rank` 64."
            )
        if rank is not None and rank < 0:
            raise FeatureStoreError(f"a map of rank {rank} is not possible; give 1 or more, or full.")
        rank = min(rank, n) if rank is not None else None
        self.rank, self.measure, self.l2 = rank, measure, l2
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
        """As ``forward``; the part of a similarity that the update does not touch needs a gradient only for ``rows``."""
        left, right = examples[:, [1, 0, 0]].flatten(), examples[:, [2, 2, 1]].flatten()
        if self.rank is None:
            embedded = self.embed(rows)
            similarity = _inner(embedded, left, right)
            lengths = embedded.square().sum(1)
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and rows.requires_grad):
                x = self.scaled(rows)
                similarity = _inner(x, left, right)
                lengths = x.square().sum(1)
            if self.rank:
                # z = x + (x down) up, so  z·z' = x·x' + p·q' + q·p' + p (up upᵀ) p'  with p = x down, q = x upᵀ.
                p, q = x @ self.down, x @ self.up.t()
                mixed = q + p @ (self.up @ self.up.t()) / 2
                at = F.embedding  # its backward is deterministic, unlike an index's
                similarity = (
                    similarity + (at(left, p) * at(right, mixed)).sum(1) + (at(left, mixed) * at(right, p)).sum(1)
                )
                lengths = lengths + 2 * (p * mixed).sum(1)
        if self.measure == "cosine":
            norms = lengths.clamp_min(1e-24).sqrt()
            similarity = similarity / (norms.index_select(0, left) * norms.index_select(0, right))
        return similarity.view(-1, 3) * self.log_factor.exp()

    def penalty(self) -> torch.Tensor | None:
        """``l2`` times the squared Frobenius norm of the update."""
        if self.rank is None:
            return self.l2 * self.update.square().sum()
        return self.l2 * ((self.up @ self.up.t()) * (self.down.t() @ self.down)).sum() if self.rank else None


def _inner(x: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """x[left] · x[right] for each pair, (n,): out of all products where rows are few, in pieces where they are many."""
    if len(x) ** 2 <= 100 * len(left):
        return (x @ x.t()).flatten().index_select(0, left * len(x) + right)
    pairs = zip(left.split(64), right.split(64), strict=True)
    # Not indexed either: what it sums in the backward would be in another order each time.
    return torch.cat([(F.embedding(a, x) * F.embedding(b, x)).sum(1) for a, b in pairs])


build = SimilarityHead
