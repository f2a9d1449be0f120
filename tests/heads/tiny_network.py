"""A network of a user's own that computes in no time: convolutions, batch norm, a residual block, a descriptor."""

from collections import OrderedDict

import torch
from torch import nn

NAME, HOOKED = f"{__name__}:build", f"{__name__}:build_hooked"
RECIPE = 'size = 32\nresize = "pil"\nchannels = "RGB"\nmean = [127.5, 127.5, 127.5]\nscale = 128.0\n'


class Residual(nn.Module):
    """(n, 8, y, x) to the same."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(True)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return self.relu(self.norm(self.conv(maps)) + maps)


def build() -> nn.Module:
    """(n, 3, 32, 32) to (n, 24)."""
    modules = OrderedDict(conv1=nn.Conv2d(3, 8, 4, 4), relu1=nn.ReLU(True), block1=Residual(), block2=Residual())
    modules |= {"pool": nn.AdaptiveAvgPool2d(2), "flatten": nn.Flatten(), "descriptor": nn.Linear(32, 24)}
    return nn.Sequential(modules)


class Looking(nn.Sequential):
    """One that looks at its numbers: torch.fx cannot trace it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.min() < -1e9:
            raise ValueError("no picture")
        return super().forward(images)


def build_hooked() -> nn.Module:
    """The same network, captured by hooks."""
    return Looking(OrderedDict(build().named_children()))
