"""Small modules that several networks are built from."""

import torch
from torch import nn


class L2Normalise(nn.Module):
    """(n, features) to the same, each row of Euclidean length 1 (a row of zeros stays zero)."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Each row divided by its length."""
        return nn.functional.normalize(rows, dim=1)
