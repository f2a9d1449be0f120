"""VGG-Face, with the layer names and checkpoint keys of its published PyTorch port."""

from collections import OrderedDict

import torch
from torch import nn

from featurestore.networks.layer_names import BLOCKS, CEIL_MODE_BLOCK, LINEAR
from featurestore.networks.parts import L2Normalise


class VGGFace(nn.Module):
    """(n, 3, 224, 224) float to (n, classes) logits, no softmax.

    State dict keys are ``features.conv_1_1.weight`` … ``fc.fc8.bias`` (32 keys).
    """

    def __init__(self, classes: int = 2622) -> None:
        super().__init__()
        self.features = nn.Sequential(_features())
        self.fc = nn.Sequential(_classifier(classes))
        self.descriptor = L2Normalise()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """One forward pass."""
        x = self.features(images)  # (n, 512, 7, 7)
        x = torch.flatten(x, 1)  # in C, H, W order
        for name, module in self.fc.named_children():
            x = module(x)
            if name == "fc7-relu":
                self.descriptor(x)  # beside the way to the logits: a layer for those who capture it
        return x


def _features() -> OrderedDict[str, nn.Module]:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    width_in = 3
    for block, (convolutions, width) in enumerate(BLOCKS, start=1):
        for i in range(1, convolutions + 1):
            modules[f"conv_{block}_{i}"] = nn.Conv2d(width_in, width, kernel_size=3, padding=1)
            modules[f"relu_{block}_{i}"] = nn.ReLU()
            width_in = width
        modules[f"maxp_{block}_{convolutions}"] = nn.MaxPool2d(2, 2, ceil_mode=block == CEIL_MODE_BLOCK)
    return modules


def _classifier(classes: int) -> OrderedDict[str, nn.Module]:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for name, width_in, width in LINEAR:
        modules[name] = nn.Linear(width_in, width if name != "fc8" else classes)
        if name != "fc8":
            modules[f"{name}-relu"] = nn.ReLU()
            modules[f"{name}-dropout"] = nn.Dropout(0.5)
    return modules
