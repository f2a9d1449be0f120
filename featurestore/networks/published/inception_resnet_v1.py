"""Inception-ResNet v1, with the module names and checkpoint keys of FaceNet's published PyTorch port.

Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning", 2016;
Schroff, Kalenichenko & Philbin, "FaceNet", 2015.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from featurestore.networks.layer_names import REPEATS
from featurestore.networks.parts import L2Normalise

Size = int | tuple[int, int]


class Unit(nn.Sequential):
    """Convolution without bias, batch norm (eps 1e-3), ReLU."""

    def __init__(self, width_in: int, width: int, kernel: Size, stride: int = 1, padding: Size = 0) -> None:
        super().__init__(
            OrderedDict(
                conv=nn.Conv2d(width_in, width, kernel, stride, padding, bias=False),
                bn=nn.BatchNorm2d(width, eps=1e-3),
                relu=nn.ReLU(),
            )
        )


class Branches(nn.Module):
    """Branches of x, concatenated."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.n_branches = len(branches)
        for i, branch in enumerate(branches):
            self.add_module(f"branch{i}", branch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, width, y, x) to as many channels as the branches have together."""
        return torch.cat([getattr(self, f"branch{i}")(x) for i in range(self.n_branches)], 1)


class Residual(Branches):
    """relu(x + scale × conv2d(branches of x, concatenated)); the last block of the network has no ReLU."""

    def __init__(
        self, width: int, branches: Sequence[nn.Module], width_out: int, scale: float, relu: bool = True
    ) -> None:
        super().__init__(branches)
        self.scale = scale
        self.conv2d = nn.Conv2d(width_out, width, kernel_size=1)
        self.relu = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, width, y, x) to the same shape."""
        return self.relu(self.conv2d(super().forward(x)) * self.scale + x)


def block35(scale: float = 0.17) -> Residual:
    """256 channels, 17 × 17."""
    branches = [
        Unit(256, 32, 1),
        nn.Sequential(Unit(256, 32, 1), Unit(32, 32, 3, padding=1)),
        nn.Sequential(Unit(256, 32, 1), Unit(32, 32, 3, padding=1), Unit(32, 32, 3, padding=1)),
    ]
    return Residual(256, branches, 96, scale)


def block17(scale: float = 0.10) -> Residual:
    """896 channels, 8 × 8."""
    long = nn.Sequential(
        Unit(896, 128, 1), Unit(128, 128, (1, 7), padding=(0, 3)), Unit(128, 128, (7, 1), padding=(3, 0))
    )
    return Residual(896, [Unit(896, 128, 1), long], 256, scale)


def block8(scale: float = 0.20, relu: bool = True) -> Residual:
    """1,792 channels, 3 × 3."""
    long = nn.Sequential(
        Unit(1792, 192, 1), Unit(192, 192, (1, 3), padding=(0, 1)), Unit(192, 192, (3, 1), padding=(1, 0))
    )
    return Residual(1792, [Unit(1792, 192, 1), long], 384, scale, relu)


def mixed_6a() -> Branches:
    """256 × 17 × 17 to 896 × 8 × 8."""
    long = nn.Sequential(Unit(256, 192, 1), Unit(192, 192, 3, padding=1), Unit(192, 256, 3, stride=2))
    return Branches([Unit(256, 384, 3, stride=2), long, nn.MaxPool2d(3, stride=2)])


def mixed_7a() -> Branches:
    """896 × 8 × 8 to 1,792 × 3 × 3."""
    branches = [
        nn.Sequential(Unit(896, 256, 1), Unit(256, 384, 3, stride=2)),
        nn.Sequential(Unit(896, 256, 1), Unit(256, 256, 3, stride=2)),
        nn.Sequential(Unit(896, 256, 1), Unit(256, 256, 3, padding=1), Unit(256, 256, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    ]
    return Branches(branches)


class InceptionResnetV1(nn.Module):
    """(n, 3, 160, 160) float to the embedding (n, 512), of length 1, and the logits (n, classes).

    The logits are made of the vector before its length is taken off.
    """

    def __init__(self, classes: int = 8631) -> None:
        super().__init__()
        self.conv2d_1a = Unit(3, 32, 3, stride=2)  # 79 × 79
        self.conv2d_2a = Unit(32, 32, 3)  # 77 × 77
        self.conv2d_2b = Unit(32, 64, 3, padding=1)
        self.maxpool_3a = nn.MaxPool2d(3, stride=2)  # 38 × 38
        self.conv2d_3b = Unit(64, 80, 1)
        self.conv2d_4a = Unit(80, 192, 3)  # 36 × 36
        self.conv2d_4b = Unit(192, 256, 3, stride=2)  # 17 × 17
        self.repeat_1 = nn.Sequential(*(block35() for _ in range(REPEATS["repeat_1"])))
        self.mixed_6a = mixed_6a()
        self.repeat_2 = nn.Sequential(*(block17() for _ in range(REPEATS["repeat_2"])))
        self.mixed_7a = mixed_7a()
        self.repeat_3 = nn.Sequential(*(block8() for _ in range(REPEATS["repeat_3"])))
        self.block8 = block8(scale=1.0, relu=False)
        self.avgpool_1a = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.6)
        self.last_linear = nn.Linear(1792, 512, bias=False)
        self.last_bn = nn.BatchNorm1d(512, eps=1e-3)
        self.embedding = L2Normalise()
        self.logits = nn.Linear(512, classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward pass."""
        x = self.conv2d_2b(self.conv2d_2a(self.conv2d_1a(images)))
        x = self.conv2d_4b(self.conv2d_4a(self.conv2d_3b(self.maxpool_3a(x))))
        x = self.mixed_6a(self.repeat_1(x))
        x = self.mixed_7a(self.repeat_2(x))
        x = self.avgpool_1a(self.block8(self.repeat_3(x)))  # (n, 1792, 1, 1)
        x = self.last_bn(self.last_linear(torch.flatten(self.dropout(x), 1)))
        return self.embedding(x), self.logits(x)
