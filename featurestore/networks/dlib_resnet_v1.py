"""dlib's face recognition network: a ResNet of 29 convolutions whose descriptors are compared by Euclidean distance.

Davis King, "High Quality Face Recognition with Deep Metric Learning", 2017. No window with stride 2 pads, a shortcut that has to
shrink is an average pool, and where the two sides of an addition differ in size, the smaller one counts as zero beyond
its last channel, row and column. dlib names no layer: the names of layers and weights are this project's.
"""

from typing import TYPE_CHECKING, NamedTuple

from featurestore.networks.spec import BackboneSpec, PackagedFile, equal_layers
from featurestore.photos.recipes import Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

    from featurestore.networks.parts import Block

SIZE = 150  # side of the input, pixels
STEM_WIDTH, DESCRIPTOR = 32, 128
_GROUPS = ((3, 32), (4, 64), (3, 128), (3, 256), (1, 256))  # blocks, channels


class ResidualBlock(NamedTuple):
    """Channels going in and out; whether rows and columns are halved."""

    width_in: int
    width: int
    halves: bool


def _blocks() -> dict[str, ResidualBlock]:
    blocks = {}
    width_in = STEM_WIDTH
    for group, (n, width) in enumerate(_GROUPS, start=1):
        for i in range(1, n + 1):
            blocks[f"block{group}_{i}"] = ResidualBlock(width_in, width, halves=group > 1 and i == 1)
            width_in = width
    return blocks


BLOCKS = _blocks()


def build() -> "nn.Module":
    """(n, 3, 150, 150) float to descriptors (n, 128), which are not normalised.

    State dict keys are ``stem.conv.weight``, ``stem.affine.weight`` … ``block1_1.conv1.weight`` … ``descriptor.weight``.
    """
    from torch import nn

    from featurestore.networks.parts import Affine, Block

    network = Block(
        _run,
        stem=Block(
            _run_stem, conv=nn.Conv2d(3, STEM_WIDTH, 7, stride=2), affine=Affine(STEM_WIDTH), relu=nn.ReLU()
        ),  # 72 × 72
        pool=nn.MaxPool2d(3, stride=2),  # 35 × 35
    )
    for name, shape in BLOCKS.items():
        network.add_module(name, _block(shape))
    network.add_module("average", nn.AdaptiveAvgPool2d(1))
    network.add_module("pooled", nn.Flatten())
    network.add_module("descriptor", nn.Linear(_GROUPS[-1][1], DESCRIPTOR, bias=False))
    return network


def _run(network: "Block", images: "torch.Tensor") -> "torch.Tensor":
    x = network.pool(network.stem(images))
    for name in BLOCKS:
        x = getattr(network, name)(x)
    return network.descriptor(network.pooled(network.average(x)))  # (n, 256, 2, 2) to (n, 256)


def _run_stem(stem: "Block", images: "torch.Tensor") -> "torch.Tensor":
    return stem.relu(stem.affine(stem.conv(images)))


def _block(shape: ResidualBlock) -> "Block":
    """(n, width_in, y, x) to (n, width, y, x), or to half as many rows and columns, rounded down."""
    from torch import nn

    from featurestore.networks.parts import Affine, Block

    stride, padding = (2, 0) if shape.halves else (1, 1)
    return Block(
        _run_halving if shape.halves else _run_plain,
        conv1=nn.Conv2d(shape.width_in, shape.width, 3, stride=stride, padding=padding),
        affine1=Affine(shape.width),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(shape.width, shape.width, 3, padding=1),
        affine2=Affine(shape.width),
        relu=nn.ReLU(),
        **({"shortcut": nn.AvgPool2d(2)} if shape.halves else {}),
    )


def _run_plain(block: "Block", x: "torch.Tensor") -> "torch.Tensor":
    return block.relu(_branch(block, x) + x)


def _run_halving(block: "Block", x: "torch.Tensor") -> "torch.Tensor":
    """The branch has more channels than the shortcut, or as many, and where x has an even side one row and column less."""
    from torch.nn.functional import pad

    branch, shortcut = _branch(block, x), block.shortcut(x)
    channels = branch.shape[1] - shortcut.shape[1]
    rows, columns = (shortcut.shape[axis] - branch.shape[axis] for axis in (2, 3))
    return block.relu(pad(branch, (0, columns, 0, rows)) + pad(shortcut, (0, 0, 0, 0, 0, channels)))


def _branch(block: "Block", x: "torch.Tensor") -> "torch.Tensor":
    out = block.relu1(block.affine1(block.conv1(x)))
    return block.affine2(block.conv2(out))


MEAN_RGB = (122.782, 117.001, 104.298)  # as the network's file has them
_LAYERS = ("stem", "pool", *BLOCKS, "pooled", "descriptor")

NETWORKS = [
    BackboneSpec(
        name="dlib_resnet_v1",
        layers={name: name for name in _LAYERS},
        recipes=(
            Recipe(
                "dlib-chip", SIZE, "chip", "RGB", MEAN_RGB, scale=256.0,
                note="each face turned upright by five landmarks, as the network was trained: R, G, B minus means, / 256",
            ),
            Recipe(
                "dlib-whole", SIZE, "cv2", "RGB", MEAN_RGB, scale=256.0,
                note="the whole photograph, not aligned: distances of different people fall below dlib's 0.6 (62 % of them; "
                "aligned 2 %), so that the rule is of no use",
            ),
        ),
        licence="dlib's face recognition network (Davis King, 2017) is in the public domain (CC0 1.0).",
        builder=build,
        input_size=SIZE,
        equal=equal_layers(),
        packaged=PackagedFile(
            "face_recognition_models",
            "models/dlib_face_recognition_resnet_model_v1.dat",
            "55533b28a95800a551ba546ba62fe69625c7e95a7061c338adffead08719da30",
        ),
        elsewhere="dlib_resnet_v1 has no plain download; a Python package holds its file: give `weights` packaged.",
    )
]  # fmt: skip
