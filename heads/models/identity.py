"""the multi-view head: which face is this? Needs no trials"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from heads.models.base import StandardisedHead


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

    def published_modules(self, block: int, earlier: bool) -> dict[str, str]:
        """See ``Head.published_modules``."""
        return {"linear": "decision_layer.fc_d"}

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits (n, faces) of rows (n, *shape), in the order of ``faces``."""
        logits: torch.Tensor = self.linear(self.standardised(rows))
        return logits

    def logits(
        self, rows: torch.Tensor, examples: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """See ``Head.logits``; examples (n, 1)."""
        return F.embedding(examples[:, 0], self.forward(rows))  # its backward is deterministic, unlike an index's


build = IdentityHead
