"""The networks and their recipes by name. Naming one, or listing its layers, loads neither torch nor weights.

A published network is a module of this folder that defines ``NETWORKS``, a list of ``BackboneSpec``; it is discovered
automatically.
"""

from pathlib import Path

from featurestore import networks
from featurestore.discovery import load_modules
from featurestore.errors import FeatureStoreError
from featurestore.networks.spec import TIMM, TORCHVISION, BackboneSpec
from featurestore.photos.recipes import RECIPE_READERS, Recipe, read_recipe
from featurestore.text import near_matches

BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec for module in load_modules(networks, "NETWORKS") for spec in module.NETWORKS
}
RECIPES: dict[str, Recipe] = {recipe.name: recipe for spec in BACKBONES.values() for recipe in spec.recipes}


def get_backbone(name: str) -> BackboneSpec:
    """The backbone of that name: a face network, ``torchvision:NAME``, ``timm:NAME`` or ``my_module:build_model``.

    The last imports ``my_module`` and so runs its code: never pass a name from an untrusted source. FeatureStoreError,
    with near matches, if there is none.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    from featurestore.networks import external

    if ":" not in name:
        also = f"{TORCHVISION}{name}" if external.in_torchvision(name) else f"{TORCHVISION}NAME"
        raise FeatureStoreError(
            f"there is no backbone {name!r}. {near_matches(name, BACKBONES)} Or {also}, {TIMM}NAME, or my_module:build_model of "
            "your own."
        )
    if name.startswith(TIMM):
        from featurestore.networks.timm_models import timm_backbone

        return timm_backbone(name)
    return external.torchvision_backbone(name) if name.startswith(TORCHVISION) else external.imported_backbone(name)


def known_backbone(name: str) -> BackboneSpec | None:
    """The backbone of a name that a store gives, or None: an untrusted file must not decide what is imported."""
    try:
        return get_backbone(name) if name in BACKBONES or name.startswith((TORCHVISION, TIMM)) else None
    except FeatureStoreError:
        return None


def get_recipe(name: str) -> Recipe:
    """The recipe of that name, or in that ``.toml`` or ``.json`` file; FeatureStoreError if there is none."""
    if name in RECIPES:
        return RECIPES[name]
    path = Path(name).expanduser()
    if path.suffix.lower() not in RECIPE_READERS:
        raise FeatureStoreError(
            f"there is no recipe {name!r}. {near_matches(name, RECIPES)} A recipe of your own is a .toml or .json file."
        )
    recipe = read_recipe(path)
    if recipe.name in RECIPES:
        raise FeatureStoreError(
            f"the recipe {path} has the name {recipe.name!r} of a published one. Give it another name."
        )
    return recipe
