"""Inception-ResNet v1, with the module names and checkpoint keys of FaceNet's published PyTorch port.

Szegedy et al., "Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning", 2016;
Schroff, Kalenichenko & Philbin, "FaceNet", 2015.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from featurestore.networks.spec import BackboneSpec, PublishedFile, equal_layers
from featurestore.photos.recipes import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from featurestore.networks.parts import Block

_STAGES = {"repeat_1": 5, "repeat_2": 10, "repeat_3": 5}  # residual blocks in each
_Size = int | tuple[int, int]


def build(classes: int = 8631) -> "nn.Module":
    """(n, 3, 160, 160) float to the embedding (n, 512), of length 1, and the logits (n, classes).

    The logits are made of the vector before its length is taken off.
    """
    from torch import nn

    from featurestore.networks.parts import Block, L2Normalise

    return Block(
        _run,
        conv2d_1a=_unit(3, 32, 3, stride=2),  # 79 × 79
        conv2d_2a=_unit(32, 32, 3),  # 77 × 77
        conv2d_2b=_unit(32, 64, 3, padding=1),
        maxpool_3a=nn.MaxPool2d(3, stride=2),  # 38 × 38
        conv2d_3b=_unit(64, 80, 1),
        conv2d_4a=_unit(80, 192, 3),  # 36 × 36
        conv2d_4b=_unit(192, 256, 3, stride=2),  # 17 × 17
        repeat_1=nn.Sequential(*(_block35() for _ in range(_STAGES["repeat_1"]))),
        mixed_6a=_mixed_6a(),
        repeat_2=nn.Sequential(*(_block17() for _ in range(_STAGES["repeat_2"]))),
        mixed_7a=_mixed_7a(),
        repeat_3=nn.Sequential(*(_block8() for _ in range(_STAGES["repeat_3"]))),
        block8=_block8(scale=1.0, relu=False),
        avgpool_1a=nn.AdaptiveAvgPool2d(1),
        dropout=nn.Dropout(0.6),
        last_linear=nn.Linear(1792, 512, bias=False),
        last_bn=nn.BatchNorm1d(512, eps=1e-3),
        embedding=L2Normalise(),
        logits=nn.Linear(512, classes),
    )


def _run(network: "Block", images: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
    x = network.conv2d_2b(network.conv2d_2a(network.conv2d_1a(images)))
    x = network.conv2d_4b(network.conv2d_4a(network.conv2d_3b(network.maxpool_3a(x))))
    x = network.mixed_6a(network.repeat_1(x))
    x = network.mixed_7a(network.repeat_2(x))
    x = network.avgpool_1a(network.block8(network.repeat_3(x)))  # (n, 1792, 1, 1)
    x = network.last_bn(network.last_linear(network.dropout(x).flatten(1)))
    return network.embedding(x), network.logits(x)


def _unit(width_in: int, width: int, kernel: _Size, stride: int = 1, padding: _Size = 0) -> "nn.Sequential":
    """Convolution without bias, batch norm (eps 1e-3), ReLU."""
    from torch import nn

    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(width_in, width, kernel, stride, padding, bias=False),
            bn=nn.BatchNorm2d(width, eps=1e-3),
            relu=nn.ReLU(),
        )
    )


def _branches(run: Callable[..., Any], branches: "Sequence[nn.Module]") -> "Block":
    from featurestore.networks.parts import Block

    return Block(run, **{f"branch{i}": branch for i, branch in enumerate(branches)})


def _concatenate(block: "Block", x: "torch.Tensor") -> "torch.Tensor":
    """(n, width, y, x) to as many channels as the branches have together."""
    import torch

    return torch.cat([branch(x) for name, branch in block.named_children() if name.startswith("branch")], 1)


def _residual(width: int, branches: "Sequence[nn.Module]", width_out: int, scale: float, relu: bool = True) -> "Block":
    """relu(x + scale × conv2d(branches of x, concatenated)); the last block of the network has no ReLU."""
    from torch import nn

    block = _branches(partial(_run_residual, scale=scale), branches)
    block.add_module("conv2d", nn.Conv2d(width_out, width, kernel_size=1))
    block.add_module("relu", nn.ReLU() if relu else nn.Identity())
    return block


def _run_residual(block: "Block", x: "torch.Tensor", scale: float) -> "torch.Tensor":
    return block.relu(block.conv2d(_concatenate(block, x)) * scale + x)


def _block35(scale: float = 0.17) -> "Block":
    """256 channels, 17 × 17."""
    from torch import nn

    branches = [
        _unit(256, 32, 1),
        nn.Sequential(_unit(256, 32, 1), _unit(32, 32, 3, padding=1)),
        nn.Sequential(_unit(256, 32, 1), _unit(32, 32, 3, padding=1), _unit(32, 32, 3, padding=1)),
    ]
    return _residual(256, branches, 96, scale)


def _block17(scale: float = 0.10) -> "Block":
    """896 channels, 8 × 8."""
    from torch import nn

    long = nn.Sequential(
        _unit(896, 128, 1), _unit(128, 128, (1, 7), padding=(0, 3)), _unit(128, 128, (7, 1), padding=(3, 0))
    )
    return _residual(896, [_unit(896, 128, 1), long], 256, scale)


def _block8(scale: float = 0.20, relu: bool = True) -> "Block":
    """1,792 channels, 3 × 3."""
    from torch import nn

    long = nn.Sequential(
        _unit(1792, 192, 1), _unit(192, 192, (1, 3), padding=(0, 1)), _unit(192, 192, (3, 1), padding=(1, 0))
    )
    return _residual(1792, [_unit(1792, 192, 1), long], 384, scale, relu)


def _mixed_6a() -> "Block":
    """256 × 17 × 17 to 896 × 8 × 8."""
    from torch import nn

    long = nn.Sequential(_unit(256, 192, 1), _unit(192, 192, 3, padding=1), _unit(192, 256, 3, stride=2))
    return _branches(_concatenate, [_unit(256, 384, 3, stride=2), long, nn.MaxPool2d(3, stride=2)])


def _mixed_7a() -> "Block":
    """896 × 8 × 8 to 1,792 × 3 × 3."""
    from torch import nn

    branches = [
        nn.Sequential(_unit(896, 256, 1), _unit(256, 384, 3, stride=2)),
        nn.Sequential(_unit(896, 256, 1), _unit(256, 256, 3, stride=2)),
        nn.Sequential(_unit(896, 256, 1), _unit(256, 256, 3, padding=1), _unit(256, 256, 3, stride=2)),
        nn.MaxPool2d(3, stride=2),
    ]
    return _branches(_concatenate, branches)


def _layers() -> dict[str, str]:
    def unit(name: str) -> list[str]:
        return [f"{name}.conv", f"{name}.bn", name]

    def stage(name: str) -> list[str]:
        return [*(f"{name}.{block}" for block in range(_STAGES[name])), name]

    names = [
        *unit("conv2d_1a"), *unit("conv2d_2a"), *unit("conv2d_2b"), "maxpool_3a",
        *unit("conv2d_3b"), *unit("conv2d_4a"), *unit("conv2d_4b"),
        *stage("repeat_1"), "mixed_6a", *stage("repeat_2"), "mixed_7a", *stage("repeat_3"),
        "block8", "avgpool_1a", "last_linear", "last_bn", "embedding", "logits",
    ]  # fmt: skip
    return {**{name: name for name in names}, "descriptor": "embedding"}


_FILES = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"

NETWORKS = [
    BackboneSpec(
        name="inception_resnet_v1",
        layers=_layers(),
        recipes=(
            Recipe(
                "facenet", 160, "pil", "RGB", (127.5, 127.5, 127.5), scale=128.0,
                note="FaceNet's fixed standardisation",
            ),
        ),
        licence=(
            "FaceNet weights (facenet-pytorch, converted from David Sandberg's) come under the MIT licence; the "
            "photographs they were trained on, VGGFace2 and CASIA-WebFace, are for non-commercial research."
        ),
        builder=build,
        input_size=160,
        equal=equal_layers(
            ("embedding", "descriptor"), *((name, f"{name}.{blocks - 1}") for name, blocks in _STAGES.items())
        ),
        classes=8631,
        classifier="logits",
        ends=("logits.",),
        files={
            # The file's sha256 as ten public projects give it, which all agree.
            "vggface2": PublishedFile(
                _FILES + "20180402-114759-vggface2.pt",
                sha256="281cebca8662831adb987a874bdcb36e73f5b1c6dc5ee5878f305e985625d99b",
            ),
            "casia-webface": PublishedFile(_FILES + "20180408-102900-casia-webface.pt"),
        },
    )
]  # fmt: skip
