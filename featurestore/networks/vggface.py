"""VGG-Face, with the layer names and checkpoint keys of its published PyTorch port.

Parkhi, Vedaldi & Zisserman, "Deep Face Recognition", 2015: blocks of 3×3 convolutions, then three linear layers.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING

from featurestore.networks.spec import BackboneSpec, PublishedFile, equal_layers
from featurestore.photos.recipes import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from featurestore.networks.parts import Block

BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # convolutions, width
_CEIL_MODE_BLOCK = 3
LINEAR = (("fc6", 512 * 7 * 7, 4096), ("fc7", 4096, 4096), ("fc8", 4096, 2622))


def build(classes: int = 2622) -> "nn.Module":
    """(n, 3, 224, 224) float to (n, classes) logits, no softmax.

    State dict keys are ``features.conv_1_1.weight`` … ``fc.fc8.bias`` (32 keys).
    """
    from torch import nn

    from featurestore.networks.parts import Block, L2Normalise

    features, fc = nn.Sequential(_features()), nn.Sequential(_classifier(classes))
    return Block(_run, features=features, fc=fc, descriptor=L2Normalise())


def _run(network: "Block", images: "torch.Tensor") -> "torch.Tensor":
    x = network.features(images)  # (n, 512, 7, 7)
    x = x.flatten(1)  # in C, H, W order
    for name, module in network.get_submodule("fc").named_children():
        x = module(x)
        if name == "fc7-relu":
            network.descriptor(x)  # beside the way to the logits: a layer for those who capture it
    return x


def _features() -> "OrderedDict[str, nn.Module]":
    from torch import nn

    modules: OrderedDict[str, nn.Module] = OrderedDict()
    width_in = 3
    for block, (convolutions, width) in enumerate(BLOCKS, start=1):
        for i in range(1, convolutions + 1):
            modules[f"conv_{block}_{i}"] = nn.Conv2d(width_in, width, kernel_size=3, padding=1)
            modules[f"relu_{block}_{i}"] = nn.ReLU()
            width_in = width
        modules[f"maxp_{block}_{convolutions}"] = nn.MaxPool2d(2, 2, ceil_mode=block == _CEIL_MODE_BLOCK)
    return modules


def _classifier(classes: int) -> "OrderedDict[str, nn.Module]":
    from torch import nn

    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for name, width_in, width in LINEAR:
        modules[name] = nn.Linear(width_in, width if name != "fc8" else classes)
        if name != "fc8":
            modules[f"{name}-relu"] = nn.ReLU()
            modules[f"{name}-dropout"] = nn.Dropout(0.5)
    return modules


def _layers() -> dict[str, str]:
    paths = {}
    for block, (convolutions, _) in enumerate(BLOCKS, start=1):
        for i in range(1, convolutions + 1):
            for kind in ("conv", "relu"):
                paths[f"{kind}_{block}_{i}"] = f"features.{kind}_{block}_{i}"
        paths[f"maxp_{block}_{convolutions}"] = f"features.maxp_{block}_{convolutions}"
    for name, _, _ in LINEAR:
        tails = ("", "-relu", "-dropout") if name != "fc8" else ("",)
        for tail in tails:
            paths[name + tail] = f"fc.{name}{tail}"
    return {**paths, "descriptor": "descriptor"}


_MEAN_RGB = (129.1863, 104.7624, 93.5940)  # mean face of the VGG-Face training set, in R, G, B order
_MEAN_BGR = _MEAN_RGB[::-1]

NETWORKS = [
    BackboneSpec(
        name="vggface",
        layers=_layers(),
        recipes=(
            Recipe(
                "vggface-published", 224, "cv2", "BGR", _MEAN_RGB,
                note="as the published PyTorch ports: B, G, R pixels minus means in R, G, B order",
            ),
            Recipe(
                "vggface-bgr", 224, "cv2", "BGR", _MEAN_BGR,
                note="B, G, R pixels minus the means of their own channels",
            ),
            Recipe(
                "vggface-rgb", 224, "cv2", "RGB", _MEAN_RGB,
                note="R, G, B pixels minus the means of their own channels",
            ),
        ),
        licence="VGG-Face weights (Parkhi, Vedaldi & Zisserman 2015) are for non-commercial research.",
        builder=build,
        input_size=224,
        equal=equal_layers(("fc6-relu", "fc6-dropout"), ("fc7-relu", "fc7-dropout")),
        ends=("fc.fc8.", "fc.fc7.", "fc.fc6."),
        files={
            "luatorch": PublishedFile(
                "https://www.robots.ox.ac.uk/~vgg/software/vgg_face/src/vgg_face_torch.tar.gz", member="VGG_FACE.t7"
            )
        },
    )
]  # fmt: skip
