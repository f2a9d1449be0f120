"""What is known of a network before it is built: its layers, recipes, weights and licence. Nothing here loads torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from featurestore.errors import FeatureStoreError
from featurestore.photos.recipes import Recipe
from featurestore.text import near_matches

if TYPE_CHECKING:
    from torch import nn

TORCHVISION = "torchvision:"  # begins the names of torchvision's networks
TIMM = "timm:"  # and of timm's
INPUT_OF = "input of "  # before a module path: what that module is given, not its output
Shapes = dict[str, tuple[int, ...]]
Gains = tuple[tuple[str, float], ...]
EqualLayers = frozenset[frozenset[str]]


def equal_layers(*pairs: tuple[str, str]) -> EqualLayers:
    """Pairs of layers that are equal in eval mode by construction.

    A dropout and the ReLU before it, a stage and its last block, a descriptor and the layer that it is another name for.
    """
    return frozenset(frozenset(pair) for pair in pairs)


@dataclass(frozen=True)
class PublishedFile:
    """A checkpoint that its authors serve. ``member`` is the file wanted out of a ``.tar.gz``.

    ``sha256`` may be the first digits alone, as torchvision puts them into file names; empty where none is published.
    """

    url: str
    sha256: str = ""
    member: str = ""


@dataclass(frozen=True)
class PackagedFile:
    """A checkpoint within a Python package that pip installs: ``path`` is relative to the package's folder."""

    package: str
    path: str
    sha256: str


@dataclass(frozen=True)
class BackboneSpec:
    """What the caching run has to know of a network before it builds it.

    ``layers`` maps each layer's published name to its module path, in the order they are computed; ``left_out`` are modules
    of a network that is not ours which are no layers, and why. ``hooks``: it is captured by forward hooks, since torch.fx
    cannot trace it. ``recipes`` are the
    published ones, the default first; a network of the user's own has none. ``builder`` makes the network, with whatever
    weights torch's current device gives; where the number of ``classes`` varies between published files, it takes that,
    and ``classifier`` names the module that has them. ``input_size`` is the side of the square input in pixels; None
    leaves it to the recipe. ``equal`` holds the pairs of ``equal_layers``; None if they are not known. ``ends`` names
    the key prefixes, last first, that a file may lack because it was cut there. ``files`` are the downloads, the usual
    one first; ``packaged`` is a file that comes with a Python package; ``elsewhere`` says where to look if there is no
    download. ``imported`` networks are the user's own code.
    ``gains`` are (regular expression of keys, factor) for seeded random weights, where without them a network is chaotic.
    """

    name: str
    layers: dict[str, str]
    recipes: tuple[Recipe, ...]
    licence: str
    builder: "Callable[..., nn.Module]"
    input_size: int | None = None
    equal: EqualLayers | None = None
    classes: int | None = None
    classifier: str = ""
    ends: tuple[str, ...] = ()
    files: dict[str, PublishedFile] = field(default_factory=dict)
    packaged: PackagedFile | None = None
    elsewhere: str = ""
    imported: bool = False
    gains: Gains = ()
    hooks: bool = False
    left_out: dict[str, str] = field(default_factory=dict)

    def check_layers(self, names: Iterable[str]) -> list[str]:
        """``names`` in network order without repeats, ``all`` resolved; FeatureStoreError if one is unknown."""
        names = list(names)
        if names == ["all"]:
            return list(self.layers)
        for name in names:
            if name in self.left_out:
                raise FeatureStoreError(
                    f"{name!r} of {self.name} cannot be a layer: {self.left_out[name]}. Leave it out."
                )
            if name not in self.layers:
                raise FeatureStoreError(
                    f"{self.name} has no layer {name!r}. {_near_layers(name, list(self.layers))} "
                    f"All: pipelines/cache_layers.py --list-layers --backbone {self.name}"
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

    def default_recipe(self) -> Recipe:
        """The published recipe; FeatureStoreError if the network has none."""
        if not self.recipes:
            raise FeatureStoreError(
                f"{self.name} has no recipe of its own, so say how a picture becomes its input: `recipe` FILE.toml with "
                'size, resize, channels, mean and scale, such as size = 224, resize = "pil", channels = "RGB", '
                "mean = [127.5, 127.5, 127.5], scale = 128."
            )
        return self.recipes[0]


def _near_layers(name: str, layers: list[str]) -> str:
    """The layers closest to a name, or the network's last ones, which are asked for most."""
    return near_matches(name, layers, f"The last of its {len(layers)} are {', '.join(layers[-6:])}.")
