"""What a source was made with, as its attributes say: the network, the weights, the recipe, the precision.

A store may be untrusted: nothing is imported because a file names it.
"""

from featurestore.checkpoints.packaged import PACKAGED
from featurestore.checkpoints.weights import BUILT, BUILT_BY, Weights, open_weights
from featurestore.devices import PRECISIONS
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import get_backbone, known_backbone
from featurestore.networks.shapes import with_input_size
from featurestore.networks.spec import BackboneSpec
from featurestore.photos.boxes import place_of
from featurestore.photos.loading import Photo
from featurestore.photos.recipes import Recipe, recipe_from_dict
from featurestore.store.reader import Source


def backbone_of(source: Source, backbone: str | None = None) -> BackboneSpec:
    """The network a source was made with. Code of a user's own is imported only if its name is given as ``backbone``."""
    name = source.attributes["backbone"]
    spec = known_backbone(name) or (get_backbone(name) if name == backbone else None)
    if spec is None:
        raise FeatureStoreError(
            f"{source.name} was computed by {name!r}, which is code outside of this program. If you trust it, name it: "
            f"`backbone` {name}"
        )
    recipe = recipe_of(source)
    if spec.input_size not in (None, recipe.size):
        raise FeatureStoreError(f"{source.name} says {recipe.size}-pixel inputs, {name} takes {spec.input_size}.")
    return with_input_size(spec, recipe.size)


def weights_of(source: Source, weights: str | None, backbone: str | None = None) -> Weights:
    """The weights a source was made with: redrawn from their seed, an installed package's, or the file ``weights``.

    ``backbone`` names a network of the user's own that may be imported; see ``backbone_of``.
    """
    identity, name = source.attributes["weights"], source.attributes.get("weights_name", "")
    if identity.startswith("seed:") and weights is None:
        weights = f"random:{identity.partition(':')[2]}"
    if name.startswith(BUILT_BY) and weights is None:
        weights = BUILT
    if weights is None and not _is_packaged(source):
        raise FeatureStoreError(
            f"recomputing needs the weights file {name} (sha256 {identity[:12]}…). Give it with `weights`."
        )
    opened = open_weights(weights or PACKAGED, backbone_of(source, backbone))
    if opened.identity != identity:
        raise FeatureStoreError(
            f"{weights} is not the weights of {source.name}: it is {opened.identity[:16]}…, "
            f"the source was made with {name}, {identity[:16]}…"
        )
    return opened


def _is_packaged(source: Source) -> bool:
    """Whether a Python package, installed or not, holds the weights that a source was made with."""
    spec = known_backbone(source.attributes["backbone"])
    packaged = spec.packaged if spec else None
    return packaged is not None and packaged.sha256 == source.attributes["weights"]


def precision_of(source: Source) -> str:
    """The precision a source was computed in."""
    precision: str = source.attributes["precision"]
    if precision not in PRECISIONS:
        raise FeatureStoreError(f"{source.name} was computed in {precision!r}, which this version does not know.")
    return precision


def recipe_of(source: Source) -> Recipe:
    """The recipe a source was made with."""
    stored = source.attributes["recipe"]
    recipe = recipe_from_dict(stored)
    if recipe.as_dict() != stored:
        raise FeatureStoreError(f"{source.name} was made with recipe {stored}, which this version does not have.")
    return recipe


def photo_of(source: Source, row: int) -> Photo:
    """The photograph of an item, which must still have the content that its rows were computed from."""
    face, view = source.keys[row]
    item = source.items.iloc[row]
    place = place_of(item, recipe_of(source))
    return Photo(face, view, item["path"], row=row, sha256=item["image_sha256"] or None, place=place)
