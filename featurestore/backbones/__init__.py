"""The networks, by name. Naming one, or listing its layers, loads neither torch nor weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featurestore.backbones import vggface_layers
from featurestore.errors import FeatureStoreError, near_matches

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class BackboneSpec:
    """What the pass has to know of a network before it builds it.

    ``layers`` maps each layer's published name to its module path, in the order they are computed.
    ``input_size`` is the side of the square RGB/BGR input in pixels. ``same`` holds pairs of layers
    that are equal in eval mode by construction (a dropout and the ReLU before it).
    ``build`` makes the network, with whatever weights torch's current device gives.
    """

    name: str
    layers: dict[str, str]
    input_size: int
    recipe: str
    same: frozenset[frozenset[str]]
    licence: str
    build: Callable[[], "nn.Module"]

    def check_layers(self, names: list[str]) -> list[str]:
        """``names`` in network order without repeats, ``all`` resolved; FeatureStoreError if one is unknown."""
        if names == ["all"]:
            return list(self.layers)
        for name in names:
            if name not in self.layers:
                raise FeatureStoreError(f"{self.name} has no layer {name!r}. {near_matches(name, self.layers)}")
        return [name for name in self.layers if name in names]


def _build_vggface() -> "nn.Module":
    from featurestore.backbones.vggface import VGGFace  # torch is loaded when a network is built, not when named

    return VGGFace()


BACKBONES: dict[str, BackboneSpec] = {
    "vggface": BackboneSpec(
        name="vggface",
        layers=vggface_layers.MODULE_PATHS,
        input_size=224,
        recipe="vggface-published",
        same=vggface_layers.SAME_IN_EVAL,
        licence="VGG-Face weights (Parkhi, Vedaldi & Zisserman 2015) are for non-commercial research.",
        build=_build_vggface,
    )
}


def get_backbone(name: str) -> BackboneSpec:
    """The backbone of that name; FeatureStoreError with the near matches if there is none."""
    if name not in BACKBONES:
        raise FeatureStoreError(f"there is no backbone {name!r}. {near_matches(name, BACKBONES)}")
    return BACKBONES[name]
