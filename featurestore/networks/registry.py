"""The networks, by name. Naming a face network, or listing its layers, loads neither torch nor weights."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from featurestore.errors import FeatureStoreError
from featurestore.networks.layer_names import (
    INCEPTION_RESNET_V1_LAYERS,
    INCEPTION_RESNET_V1_SAME,
    RESNET50_LAYERS,
    RESNET50_SAME,
    SENET50_LAYERS,
    VGGFACE_LAYERS,
    VGGFACE_SAME,
    Same,
)
from featurestore.text import near_matches

if TYPE_CHECKING:
    from torch import nn

    from featurestore.photos.recipes import Recipe

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class PublishedFile:
    """A checkpoint that its authors serve. ``member`` is the file wanted out of a ``.tar.gz``.

    ``sha256`` may be the first digits alone, as torchvision puts them into file names; empty where none is published.
    """

    url: str
    sha256: str = ""
    member: str = ""


@dataclass(frozen=True)
class BackboneSpec:
    """What the pass has to know of a network before it builds it.

    ``layers`` maps each layer's published name to its module path, in the order they are computed. ``recipe`` is the
    published one, by name or itself. ``builder`` makes the network, with whatever weights torch's current device gives;
    where the number of ``classes`` varies between published files, it takes that, and ``classifier`` names the module that
    has them. ``input_size`` is the side of the square input in pixels; None leaves it to the recipe. ``same`` holds pairs
    of layers that are equal in eval mode by construction; None if that is not known. ``ends`` names the key
    prefixes, last first, that a file may lack because it was cut there. ``files`` are the downloads, the usual one first;
    ``elsewhere`` says where to look if there is none. ``imported`` networks are the user's own code. ``gains`` are
    (regular expression of keys, factor) for seeded random weights, where without them a network is chaotic.
    """

    name: str
    layers: dict[str, str]
    recipe: "str | Recipe | None"
    licence: str
    builder: Callable[..., "nn.Module"]
    input_size: int | None = None
    same: Same | None = None
    classes: int | None = None
    classifier: str = ""
    ends: tuple[str, ...] = ()
    files: dict[str, PublishedFile] = field(default_factory=dict)
    elsewhere: str = ""
    imported: bool = False
    gains: tuple[tuple[str, float], ...] = ()

    def check_layers(self, names: Iterable[str]) -> list[str]:
        """``names`` in network order without repeats, ``all`` resolved; FeatureStoreError if one is unknown."""
        names = list(names)
        if names == ["all"]:
            return list(self.layers)
        for name in names:
            if name not in self.layers:
                raise FeatureStoreError(
                    f"{self.name} has no layer {name!r}. {_near_layers(name, list(self.layers))} "
                    f"All: --list-layers --backbone {self.name}"
                )
        return [name for name in self.layers if name in names]

    def build(self) -> "nn.Module":
        """The network, with the weights its constructor draws."""
        return self.builder() if self.classes is None else self.builder(self.classes)

    def build_meta(self) -> "nn.Module":
        """The network without memory for weights: enough for keys, shapes and tracing."""
        import torch
        from torch import nn

        try:
            with torch.device("meta"):
                return self.build()
        except Exception:  # a constructor that computes with tensors, which have no values there; or that really fails
            pass

        def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
            return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

        # One parameter after the other, then: each is dropped when it is registered.
        hook = nn.modules.module.register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
        try:
            return self.build().to("meta")
        finally:
            hook.remove()

    def weight_shapes(self) -> Shapes:
        """Shapes by state-dict key: what a checkpoint has to hold."""
        return {key: tuple(value.shape) for key, value in self.build_meta().state_dict().items()}

    def with_classes(self, classes: int) -> "BackboneSpec":
        """The same network with another number of classes."""
        return replace(self, classes=classes)

    def own_recipe(self) -> "Recipe":
        """The published recipe; FeatureStoreError if the network has none."""
        from featurestore.photos.recipes import get_recipe

        if self.recipe is None:
            raise FeatureStoreError(
                f"{self.name} is a network of your own, so say how a picture becomes its input: --recipe FILE.toml with "
                'size, resize, channels, mean and scale, such as size = 224, resize = "pil", channels = "RGB", '
                "mean = [127.5, 127.5, 127.5], scale = 128."
            )
        return get_recipe(self.recipe) if isinstance(self.recipe, str) else self.recipe


def _near_layers(name: str, layers: list[str]) -> str:
    """The layers closest to a name, or the network's last ones, which are asked for most."""
    return near_matches(name, layers, f"The last of its {len(layers)} are {', '.join(layers[-6:])}.")


def _build_vggface() -> "nn.Module":
    from featurestore.networks.published.vggface import (
        VGGFace,  # torch is loaded when a network is built, not when named
    )

    return VGGFace()


def _build_inception_resnet_v1(classes: int) -> "nn.Module":
    from featurestore.networks.published.inception_resnet_v1 import InceptionResnetV1

    return InceptionResnetV1(classes)


def _build_resnet50() -> "nn.Module":
    from featurestore.networks.published.vggface2 import ResNet50

    return ResNet50(squeeze=False)


def _build_senet50() -> "nn.Module":
    from featurestore.networks.published.vggface2 import ResNet50

    return ResNet50(squeeze=True)


# With plain random weights the squeeze's gates saturate, and rounding alone turns late layers into something else.
_SENET_GAINS = ((r"bn1\.running_var", 8000.0), (r"layer\d\.\d+\.bn3\.weight", 0.3))
_FACENET_FILES = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"


def _vggface2(name: str, squeeze: bool) -> BackboneSpec:
    return BackboneSpec(
        name=name,
        layers=SENET50_LAYERS if squeeze else RESNET50_LAYERS,
        recipe="vggface2",
        licence="VGGFace2 weights (Cao et al. 2018) are for non-commercial research; see the dataset's terms.",
        builder=_build_senet50 if squeeze else _build_resnet50,
        input_size=224,
        same=RESNET50_SAME,
        gains=_SENET_GAINS if squeeze else (),
        elsewhere=(
            f"{name}_weight.pkl is on its authors' Google Drive, linked from github.com/cydonia999/VGGFace2-pytorch, which "
            f"serves no plain download. Fetch it with a browser and give --weights {name}_weight.pkl."
        ),
    )


_FACE_NETWORKS = [
    BackboneSpec(
        name="vggface",
        layers=VGGFACE_LAYERS,
        recipe="vggface-published",
        licence="VGG-Face weights (Parkhi, Vedaldi & Zisserman 2015) are for non-commercial research.",
        builder=_build_vggface,
        input_size=224,
        same=VGGFACE_SAME,
        ends=("fc.fc8.", "fc.fc7.", "fc.fc6."),
        files={
            "luatorch": PublishedFile(
                "https://www.robots.ox.ac.uk/~vgg/software/vgg_face/src/vgg_face_torch.tar.gz", member="VGG_FACE.t7"
            )
        },
    ),
    BackboneSpec(
        name="inception_resnet_v1",
        layers=INCEPTION_RESNET_V1_LAYERS,
        recipe="facenet",
        licence=(
            "FaceNet weights (facenet-pytorch, converted from David Sandberg's) come under the MIT licence; the "
            "photographs they were trained on, VGGFace2 and CASIA-WebFace, are for non-commercial research."
        ),
        builder=_build_inception_resnet_v1,
        input_size=160,
        same=INCEPTION_RESNET_V1_SAME,
        classes=8631,
        classifier="logits",
        ends=("logits.",),
        files={
            # The file's sha256 as ten public projects give it, which all agree.
            "vggface2": PublishedFile(
                _FACENET_FILES + "20180402-114759-vggface2.pt",
                sha256="281cebca8662831adb987a874bdcb36e73f5b1c6dc5ee5878f305e985625d99b",
            ),
            "casia-webface": PublishedFile(_FACENET_FILES + "20180408-102900-casia-webface.pt"),
        },
    ),
    *(_vggface2(name, squeeze=False) for name in ("resnet50_ft", "resnet50_scratch")),
    *(_vggface2(name, squeeze=True) for name in ("senet50_ft", "senet50_scratch")),
]

BACKBONES: dict[str, BackboneSpec] = {spec.name: spec for spec in _FACE_NETWORKS}
TORCHVISION = "torchvision:"


def get_backbone(name: str) -> BackboneSpec:
    """The backbone of that name: a face network, ``torchvision:NAME`` or ``my_module:build_model``.

    The last imports ``my_module`` and so runs its code: never pass a name that somebody else wrote. FeatureStoreError,
    with near matches, if there is none.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    from featurestore.networks import external as others

    if ":" not in name:
        also = f"{TORCHVISION}{name}" if others.in_torchvision(name) else f"{TORCHVISION}NAME"
        raise FeatureStoreError(
            f"there is no backbone {name!r}. {near_matches(name, BACKBONES)} Or {also}, or my_module:build_model of your own."
        )
    return others.torchvision_backbone(name) if name.startswith(TORCHVISION) else others.imported_backbone(name)


def known_backbone(name: str) -> BackboneSpec | None:
    """The backbone of a name that a store gives, or None: nothing is imported because a stranger's file says so."""
    try:
        return get_backbone(name) if name in BACKBONES or name.startswith(TORCHVISION) else None
    except FeatureStoreError:
        return None
