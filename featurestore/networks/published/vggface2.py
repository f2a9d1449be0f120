"""ResNet-50 and SE-ResNet-50 for VGGFace2, with the module names and checkpoint keys of their published PyTorch port.

Cao, Shen, Xie, Parkhi & Zisserman, "VGGFace2: A dataset for recognising faces across pose and age", 2018. They differ
from torchvision's ResNet-50: the stride sits on a stage's first 1×1 convolution, and the max pool has no padding but
rounds up.
"""

import torch
from torch import nn

from featurestore.networks.layer_names import STAGES

_EXPANSION = 4  # a block's output is four times as wide as its inside
_SQUEEZE = 16  # the gates' inner layer is as many times narrower


class Gates(nn.Module):
    """Squeeze and excitation: a number between 0 and 1 for each channel, from the means of all.

    The 1×1 convolutions belong to the block, whose checkpoint keys they have; see ``Bottleneck``.
    """

    def forward(self, scores: torch.Tensor) -> torch.Tensor:
        """(n, width, 1, 1) to gates of the same shape."""
        return torch.sigmoid(scores)


class Bottleneck(nn.Module):
    """1×1 (with the stride), 3×3, 1×1 convolutions, gated by ``squeeze``, added to what came in."""

    def __init__(self, width_in: int, inner: int, stride: int, downsample: bool, squeeze: bool) -> None:
        super().__init__()
        width = inner * _EXPANSION
        self.conv1 = nn.Conv2d(width_in, inner, kernel_size=1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, width, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.relu1, self.relu2, self.relu = nn.ReLU(), nn.ReLU(), nn.ReLU()
        self.squeeze = squeeze
        if squeeze:
            self.squeeze_mean = nn.AdaptiveAvgPool2d(1)
            self.conv4 = nn.Conv2d(width, width // _SQUEEZE, kernel_size=1)
            self.relu4 = nn.ReLU()
            self.conv5 = nn.Conv2d(width // _SQUEEZE, width, kernel_size=1)
            self.gates = Gates()
        self.downsample = (
            nn.Sequential(nn.Conv2d(width_in, width, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(width))
            if downsample
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(n, width_in, y, x) to (n, width, y / stride, x / stride)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.squeeze:
            out = out * self.gates(self.conv5(self.relu4(self.conv4(self.squeeze_mean(out)))))
        return self.relu(out + self.downsample(x))


class ResNet50(nn.Module):
    """(n, 3, 224, 224) float to (n, classes) logits; ``descriptor`` is the pooled vector (n, 2048)."""

    def __init__(self, squeeze: bool, classes: int = 8631) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False)  # 112 × 112
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=0, ceil_mode=True)  # 56 × 56
        width_in = 64
        for stage, (blocks, inner) in STAGES.items():
            stride = 1 if stage == "layer1" else 2
            self.add_module(stage, _stage(width_in, inner, blocks, stride, squeeze))
            width_in = inner * _EXPANSION
        self.avgpool = nn.AvgPool2d(7)
        self.descriptor = nn.Flatten()
        self.fc = nn.Linear(width_in, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """One forward pass."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        for stage in STAGES:
            x = getattr(self, stage)(x)
        return self.fc(self.descriptor(self.avgpool(x)))  # (n, 2048, 7, 7) to (n, 2048)


def _stage(width_in: int, inner: int, blocks: int, stride: int, squeeze: bool) -> nn.Sequential:
    first = Bottleneck(width_in, inner, stride, downsample=True, squeeze=squeeze)
    rest = (Bottleneck(inner * _EXPANSION, inner, 1, downsample=False, squeeze=squeeze) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)
