"""bridge and linear layers, as published; its authors found that it does not converge"""

import torch
import torch.nn.functional as F
from torch import nn

from heads.models.base import DROPOUT, dropout_mask
from heads.models.triplet import BRIDGE_OF_MAPS, TripletHead

_HIDDEN = 1024  # features of the hidden layer after a bridge from a map; from a vector there is none


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

    def published_modules(self, block: int) -> dict[str, str]:
        """See ``Head.published_modules``."""
        if self.hidden is None:
            return {"last": f"fc_d_{block + 2}"}
        return {"hidden": f"fc_d_{block + 2}", "last": f"fc_d_{block + 3}"}

    def forward(self, bridged: torch.Tensor) -> torch.Tensor:
        """Plainly: (n, 3, width) to logits (n, 3)."""
        x = bridged.flatten(1)
        if self.hidden is not None:
            x = F.dropout(F.relu(self.hidden(x)), DROPOUT, self.training)
        logits: torch.Tensor = self.last(x)
        return logits

    def fast(self, bridged: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The same from (3, n, width), with dropout drawn from ``generator``."""
        x = bridged.transpose(0, 1).flatten(1)
        if self.hidden is not None:
            x = F.relu(self.hidden(x))
            if generator is not None:
                x = (x / (1 - DROPOUT)).masked_fill(dropout_mask(x.shape, generator), 0)
        logits: torch.Tensor = self.last(x)
        return logits


def build(shape: tuple[int, ...], parallel: bool = False) -> TripletHead:
    """``parallel``: one bridge for each of the three places, not a shared one."""
    return TripletHead(shape, lambda width: FcDecision(width, _HIDDEN if width == BRIDGE_OF_MAPS else 0), parallel)
