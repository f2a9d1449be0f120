"""ResNet-50 and SE-ResNet-50 for VGGFace2, with the module names and checkpoint keys of their published PyTorch port.

Cao, Shen, Xie, Parkhi & Zisserman, "VGGFace2: A dataset for recognising faces across pose and age", 2018. They differ
from torchvision's ResNet-50: the stride sits on a stage's first 1×1 convolution, and the max pool has no padding but
rounds up.
"""

from functools import partial
from typing import TYPE_CHECKING

from featurestore.networks.spec import BackboneSpec, equal_layers
from featurestore.photos.recipes import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from featurestore.networks.parts import Block

STAGES = {"layer1": (3, 64), "layer2": (4, 128), "layer3": (6, 256), "layer4": (3, 512)}  # blocks, inner width
_EXPANSION = 4  # a block's output is four times as wide as its inside
_SQUEEZE = 16  # the gates' inner layer is as many times narrower


def build(squeeze: bool, classes: int = 8631) -> "nn.Module":
    """(n, 3, 224, 224) float to (n, classes) logits; ``descriptor`` is the pooled vector (n, 2048)."""
    from torch import nn

    from featurestore.networks.parts import Block

    network = Block(
        _run,
        conv1=nn.Conv2d(3, 64, kernel_size=7, stride=2, padding=3, bias=False),  # 112 × 112
        bn1=nn.BatchNorm2d(64),
        relu=nn.ReLU(),
        maxpool=nn.MaxPool2d(kernel_size=3, stride=2, padding=0, ceil_mode=True),  # 56 × 56
    )
    width_in = 64
    for stage, (blocks, inner) in STAGES.items():
        network.add_module(stage, _stage(width_in, inner, blocks, 1 if stage == "layer1" else 2, squeeze))
        width_in = inner * _EXPANSION
    network.add_module("avgpool", nn.AvgPool2d(7))
    network.add_module("descriptor", nn.Flatten())
    network.add_module("fc", nn.Linear(width_in, classes))
    return network


def _run(network: "Block", images: "torch.Tensor") -> "torch.Tensor":
    x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    for stage in STAGES:
        x = getattr(network, stage)(x)
    return network.fc(network.descriptor(network.avgpool(x)))  # (n, 2048, 7, 7) to (n, 2048)


def _stage(width_in: int, inner: int, blocks: int, stride: int, squeeze: bool) -> "nn.Sequential":
    from torch import nn

    first = _bottleneck(width_in, inner, stride, downsample=True, squeeze=squeeze)
    rest = (_bottleneck(inner * _EXPANSION, inner, 1, downsample=False, squeeze=squeeze) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


def _bottleneck(width_in: int, inner: int, stride: int, downsample: bool, squeeze: bool) -> "Block":
    """(n, width_in, y, x) to (n, width, y / stride, x / stride)."""
    from torch import nn

    from featurestore.networks.parts import Block

    width = inner * _EXPANSION
    block = Block(
        _run_squeezed if squeeze else _run_bottleneck,
        conv1=nn.Conv2d(width_in, inner, kernel_size=1, stride=stride, bias=False),
        bn1=nn.BatchNorm2d(inner),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(inner, inner, kernel_size=3, padding=1, bias=False),
        bn2=nn.BatchNorm2d(inner),
        relu2=nn.ReLU(),
        conv3=nn.Conv2d(inner, width, kernel_size=1, bias=False),
        bn3=nn.BatchNorm2d(width),
        relu=nn.ReLU(),
        downsample=nn.Sequential(
            nn.Conv2d(width_in, width, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(width)
        )
        if downsample
        else nn.Identity(),
    )
    if squeeze:
        block.add_module("squeeze_mean", nn.AdaptiveAvgPool2d(1))
        block.add_module("conv4", nn.Conv2d(width, width // _SQUEEZE, kernel_size=1))
        block.add_module("relu4", nn.ReLU())
        block.add_module("conv5", nn.Conv2d(width // _SQUEEZE, width, kernel_size=1))
        block.add_module("gates", nn.Sigmoid())
    return block


def _convolved(block: "Block", x: "torch.Tensor") -> "torch.Tensor":
    out = block.relu1(block.bn1(block.conv1(x)))
    out = block.relu2(block.bn2(block.conv2(out)))
    return block.bn3(block.conv3(out))


def _run_bottleneck(block: "Block", x: "torch.Tensor") -> "torch.Tensor":
    return block.relu(_convolved(block, x) + block.downsample(x))


def _run_squeezed(block: "Block", x: "torch.Tensor") -> "torch.Tensor":
    """Squeeze and excitation: each channel times a number between 0 and 1, computed from the means of all channels."""
    out = _convolved(block, x)
    gates = block.gates(block.conv5(block.relu4(block.conv4(block.squeeze_mean(out)))))  # (n, width, 1, 1)
    return block.relu(out * gates + block.downsample(x))


def _layers(squeeze: bool) -> dict[str, str]:
    names = ["conv1", "bn1", "relu", "maxpool"]
    for stage, (blocks, _) in STAGES.items():
        for block in range(blocks):
            names.append(f"{stage}.{block}.bn3")
            if squeeze:
                names.append(f"{stage}.{block}.gates")
            if block == 0:
                names.append(f"{stage}.{block}.downsample")
            names.append(f"{stage}.{block}")
        names.append(stage)
    names += ["avgpool", "descriptor", "fc"]
    return {name: name for name in names}


_MEAN_BGR = (91.4953, 103.8827, 131.0912)  # of VGGFace2's training set
_RECIPES = (
    Recipe(
        "vggface2", 224, "pil-crop", "BGR", _MEAN_BGR, short_side=256,
        note="VGGFace2: short side 256, centre crop, B, G, R pixels minus the means of their own channels",
    ),
    Recipe(
        "vggface2-swapped", 224, "cv2-crop", "BGR", _MEAN_BGR[::-1], short_side=224, box_edges="outward",
        note="as one published script: OpenCV, short side 224, centre crop, B, G, R minus the means in R, G, B order",
    ),
)  # fmt: skip
# With plain random weights the squeeze's gates saturate, and rounding alone turns late layers into something else.
_SQUEEZE_GAINS = ((r"bn1\.running_var", 8000.0), (r"layer\d\.\d+\.bn3\.weight", 0.3))


def _network(name: str, squeeze: bool) -> BackboneSpec:
    return BackboneSpec(
        name=name,
        layers=_layers(squeeze),
        recipes=_RECIPES,
        licence="VGGFace2 weights (Cao et al. 2018) are for non-commercial research; see the dataset's terms.",
        builder=partial(build, squeeze),
        input_size=224,
        equal=equal_layers(*((stage, f"{stage}.{blocks - 1}") for stage, (blocks, _) in STAGES.items())),
        gains=_SQUEEZE_GAINS if squeeze else (),
        elsewhere=(
            f"{name}_weight.pkl is on its authors' Google Drive, linked from github.com/cydonia999/VGGFace2-pytorch, which "
            f"serves no plain download. Fetch it with a browser and give `weights` {name}_weight.pkl."
        ),
    )


NETWORKS = [
    _network("resnet50_ft", squeeze=False),
    _network("resnet50_scratch", squeeze=False),
    _network("senet50_ft", squeeze=True),
    _network("senet50_scratch", squeeze=True),
]
