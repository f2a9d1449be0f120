"""What a caching run was asked for, checked: names, weights, device, and the source they make."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from featurestore.caching.extractor import refuse_absent
from featurestore.checkpoints.weights import Weights, open_weights
from featurestore.devices import choose_device
from featurestore.errors import FeatureStoreError
from featurestore.keys import BOX
from featurestore.networks.digests import graph_digest
from featurestore.networks.registry import get_backbone, get_recipe
from featurestore.networks.shapes import layer_shapes, with_input_size
from featurestore.networks.spec import BackboneSpec
from featurestore.photos.boxes import numbers
from featurestore.photos.keys import FoundFaces
from featurestore.photos.recipes import BOX_MARGIN, Recipe
from featurestore.remote.mirror import local_store
from featurestore.store.zarr_format import source_name
from featurestore.versions import library_versions

BATCH_SIZE = {"cpu": 16, "cuda": 64, "mps": 32}


@dataclass(frozen=True)
class CachingRequest:
    """What the user asked for; see the options of pipelines/cache_layers.py. None leaves the choice to us."""

    store: Path
    faces: FoundFaces
    layers: list[str]
    weights: str
    backbone: str = "vggface"
    recipe: str | None = None
    device: str = "auto"
    precision: str = "fp32"
    dtype: str | None = None
    compress: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    on_error: Literal["stop", "skip"] = "stop"
    recompute_changed: bool = False
    items_per_shard: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "store", local_store(self.store, writing=True)
        )  # of a URL, the folder it is written through


@dataclass(frozen=True)
class CachingJob:
    """A request whose every name has been checked and whose weights fit.

    ``graph`` is the sha256 of the operations of a network of the user's own, whose name does not identify it; otherwise empty.
    """

    request: CachingRequest
    spec: BackboneSpec
    layers: list[str]
    recipe: Recipe
    weights: Weights
    device: torch.device
    shapes: dict[str, tuple[int, ...]]
    graph: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a source: two jobs with the same identity compute the same rows."""
        return {
            "backbone": self.spec.name,
            "weights": self.weights.identity,
            "recipe": self.recipe.as_dict(),
            "precision": self.request.precision,
            **({"graph": self.graph} if self.graph else {}),
        }

    @property
    def batch_size(self) -> int:
        """Images in one forward pass."""
        return self.request.batch_size or BATCH_SIZE[self.device.type]

    @property
    def source_name(self) -> str:
        """Backbone and a hash of the identity: the group's name."""
        return source_name(self.identity)

    @property
    def attributes(self) -> dict[str, Any]:
        """The group's attributes."""
        return {
            **self.identity,
            "weights_name": self.weights.name,
            "licence": self.weights.licence,
            "library_versions": library_versions(),
            "batch_size": self.batch_size,
        }


def prepare_job(request: CachingRequest) -> CachingJob:
    """Check names, weights, device and recipe. Raises FeatureStoreError before anything is read or written twice."""
    spec = get_backbone(request.backbone)
    spec.check_layers(request.layers)
    recipe = get_recipe(request.recipe) if request.recipe else spec.default_recipe()
    if spec.input_size not in (None, recipe.size):
        raise FeatureStoreError(
            f"recipe {recipe.name!r} makes {recipe.size}-pixel inputs, {spec.name} takes {spec.input_size}. "
            f"Its own recipe is {spec.default_recipe().name!r}."
        )
    if request.faces.boxed and not recipe.place:
        recipe = replace(recipe, box_margin=BOX_MARGIN)
    request = replace(request, faces=_placed(request.faces, recipe))
    spec = with_input_size(spec, recipe.size)
    layers = spec.check_layers(request.layers)
    device = choose_device(request.device)
    weights = open_weights(request.weights, spec)
    spec = weights.backbone
    refuse_absent(spec, layers, weights)
    graph = graph_digest(spec) if spec.imported else ""
    return CachingJob(request, spec, layers, recipe, weights, device, layer_shapes(spec, layers), graph)


def _placed(faces: FoundFaces, recipe: Recipe) -> FoundFaces:
    """``faces`` with the numbers by which ``recipe`` cuts them out; FeatureStoreError if they do not have them."""
    missing = [name for name in recipe.place if name not in faces.table.columns]
    if missing:
        what = "cuts faces out by their boxes" if recipe.place == BOX else "turns faces upright by five landmarks"
        raise FeatureStoreError(
            f"recipe {recipe.name!r} {what}, and the photographs have no {missing[0]}. Find them with `find_faces`, or give them "
            "with `boxes` FILE, as pipelines/find_faces.py writes it; or take another `recipe`."
        )
    table = faces.table.copy()
    table[list(recipe.place)] = numbers(table, recipe.place, f"the table of photographs ({faces.layout})").to_numpy()
    return replace(faces, table=table)
