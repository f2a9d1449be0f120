"""What every head offers.

A head is asked for the logits of *examples*: index tuples into a batch of distinct rows. A batch of triplets names few
distinct items, so what depends on one item alone is computed once per item and gathered to the triplets.
``forward`` states the same mathematics plainly, without that. ``logits`` and ``accumulate`` drop out only where they are
given a generator; ``forward`` does in training mode, as torch modules do.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from featurestore.errors import FeatureStoreError

DROPOUT = 0.5  # after the bridge and inside the fc block, as published


class Head(nn.Module):
    """What every head offers. ``architecture`` holds the arguments that ``build_head`` makes it from again.

    ``shape`` is that of one row of the layer, such as (512, 7, 7) or (4096,).
    """

    n_places = 3  # items in one example
    wants_statistics = False  # whether ``standardise`` is to be called with the training rows' before training
    has_bridge = False  # a product so large that its precision decides the time of a training step
    low_precision = False  # whether the bridge multiplies in bfloat16

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.n_features = math.prod(shape)
        self.architecture: dict[str, Any] = {}
        self.trained_on: dict[str, Any] = {}  # of one read from our file: ``layer``, and the ``sources`` of its rows

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

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Those that are no head's but a backbone's, with a learning rate of their own."""
        return []

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

    def published_modules(self, block: int, earlier: bool) -> dict[str, str]:
        """Our modules with weights to the published ones, which are numbered on from the ``block`` of the layer.

        ``earlier`` is the earlier published system, whose bridge is fc8. FeatureStoreError if neither has such a head.
        """
        raise FeatureStoreError(
            f"the published system has no {self.architecture.get('head')} head, so there are no keys to write it under. "
            "Its weights.safetensors can be loaded with load_head."
        )

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


def dropout_mask(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """bool: where dropout puts a zero. Eight decisions to a random int64, which is what makes it cheap."""
    n = math.prod(shape)
    numbers = torch.empty(-(-n // 8), dtype=torch.int64, device=generator.device)
    numbers.random_(-(2**63), None, generator=generator)
    return (numbers.view(torch.uint8)[:n] < round(DROPOUT * 256)).view(shape)
