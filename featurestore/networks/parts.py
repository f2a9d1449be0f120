"""Small modules that several networks are built from."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn


class Block(nn.Module):
    """Named modules, and the function that passes a tensor through them: ``run(block, x)``.

    A network's file describes it by functions that build such blocks, so that its layers can be listed without torch.
    """

    def __init__(self, run: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: torch.Tensor) -> Any:
        """One forward pass."""
        return self.run(self, x)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., torch.Tensor]:  # type: ignore[override]
            """A module by its name."""


class Affine(nn.Module):
    """(n, channels, y, x) to the same: each channel times its ``weight``, plus its ``bias``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """In one pass over the maps."""
        return torch.addcmul(self.bias.view(-1, 1, 1), maps, self.weight.view(-1, 1, 1))


class L2Normalise(nn.Module):
    """(n, features) to the same, each row of Euclidean length 1 (a row of zeros stays zero)."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Each row divided by its length."""
        return nn.functional.normalize(rows, dim=1)
