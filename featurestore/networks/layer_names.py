"""Plans of the face networks and the published names of their layers, without torch.

Each ``…_LAYERS`` maps a layer's name to the module whose output it is, in the order they are computed. ``…_SAME`` holds
pairs of names that are equal in eval mode by construction: a dropout and the ReLU before it, a stage and its last
block, a descriptor and the layer that it is another name for.
"""

Same = frozenset[frozenset[str]]


def _pairs(*pairs: tuple[str, str]) -> Same:
    return frozenset(frozenset(pair) for pair in pairs)


# VGG-Face. Parkhi, Vedaldi & Zisserman, "Deep Face Recognition", 2015: blocks of 3×3 convolutions, three linear layers.
BLOCKS = ((2, 64), (2, 128), (3, 256), (3, 512), (3, 512))  # convolutions, width
CEIL_MODE_BLOCK = 3
LINEAR = (("fc6", 512 * 7 * 7, 4096), ("fc7", 4096, 4096), ("fc8", 4096, 2622))


def _vggface() -> dict[str, str]:
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


VGGFACE_LAYERS = _vggface()
VGGFACE_SAME = _pairs(("fc6-relu", "fc6-dropout"), ("fc7-relu", "fc7-dropout"))


# Inception-ResNet v1, as FaceNet was ported to PyTorch. The three stages of residual blocks, and their lengths.
REPEATS = {"repeat_1": 5, "repeat_2": 10, "repeat_3": 5}


def _inception_resnet_v1() -> dict[str, str]:
    names: list[str] = []

    def unit(name: str) -> None:
        names.extend([f"{name}.conv", f"{name}.bn", name])

    def stage(name: str) -> None:
        names.extend([*(f"{name}.{block}" for block in range(REPEATS[name])), name])

    for name in ("conv2d_1a", "conv2d_2a", "conv2d_2b"):
        unit(name)
    names.append("maxpool_3a")
    for name in ("conv2d_3b", "conv2d_4a", "conv2d_4b"):
        unit(name)
    stage("repeat_1")
    names.append("mixed_6a")
    stage("repeat_2")
    names.append("mixed_7a")
    stage("repeat_3")
    names += ["block8", "avgpool_1a", "last_linear", "last_bn", "embedding", "logits"]
    return {**{name: name for name in names}, "descriptor": "embedding"}


INCEPTION_RESNET_V1_LAYERS = _inception_resnet_v1()
INCEPTION_RESNET_V1_SAME = _pairs(
    ("embedding", "descriptor"), *((name, f"{name}.{blocks - 1}") for name, blocks in REPEATS.items())
)


# ResNet-50 and SE-ResNet-50 for VGGFace2. Cao et al., "VGGFace2", 2018: blocks to a stage, and a stage's inner width.
STAGES = {"layer1": (3, 64), "layer2": (4, 128), "layer3": (6, 256), "layer4": (3, 512)}


def _resnet50(squeeze: bool) -> dict[str, str]:
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


RESNET50_LAYERS = _resnet50(squeeze=False)
SENET50_LAYERS = _resnet50(squeeze=True)
RESNET50_SAME = _pairs(*((stage, f"{stage}.{blocks - 1}") for stage, (blocks, _) in STAGES.items()))
