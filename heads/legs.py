"""From photographs to a head's logits in one differentiable module: recipe, network up to the head's layer, head."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from featurestore.caching.extractor import load_extractor
from featurestore.caching.provenance import photo_of, precision_of, recipe_of, weights_of
from featurestore.caching.verify import TOLERANCE, difference
from featurestore.devices import reproducible
from featurestore.errors import FeatureStoreError
from featurestore.networks.shapes import layer_shapes
from featurestore.networks.spec import BackboneSpec
from featurestore.photos.loading import Batch, Failure, batches
from featurestore.store.reader import Source
from featurestore.text import listing
from heads.finetuning import FinetunedHead
from heads.models.base import Head

_BATCH = 8  # photographs in a forward pass, where many are computed
_FEWEST = 5  # places across: in coarser maps nothing of a face can be told apart
_ROUNDED = {"float16": 1e-3, "float32": 0.0}  # share of a value that is lost where rows are stored so


class ClassLogits(Head):
    """The network's own classes: a row (classes,) is its logits."""

    n_places = 1

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, classes), unchanged."""
        return rows.flatten(1)


class PairSimilarity(Head):
    """How alike two items are: (n, 1) cosines of their rows."""

    n_places = 2

    def forward(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        """Cosines of rows (n, *shape)."""
        one, other = (F.normalize(x.flatten(1), dim=1) for x in (x1, x2))
        return (one * other).sum(1, keepdim=True)


_HEADLESS = {"classes": ClassLogits, "similarity": PairSimilarity}


@dataclass(frozen=True)
class Pass:
    """One pass: the head's ``logits`` (n, classes), the layer's ``rows`` and the ``maps`` of another (both n × places, *shape).

    ``maps`` is None for a network without such a layer.
    """

    logits: torch.Tensor
    rows: torch.Tensor
    maps: torch.Tensor | None


class Legs(nn.Module):
    """One differentiable module from photographs to logits (n, classes): the recipe, the network up to ``layer``, the head.

    ``source`` says network, weights and recipe. ``head`` is a trained head; ``classes``, the layer's values as logits; or
    ``similarity``, the cosine of two items' rows. A head that ``load_head`` read from our own file knows its layer; for
    others ``layer`` is given. ``maps`` is a layer of maps (channel, y, x) on the way whose values ``run`` gives beside; without
    a name it is the last of 5 × 5 places or more. ``weights`` is the file that the source was made with, where it is one;
    ``backbone`` names a network of the user's own, which is then imported. A fine-tuned head brings its part of the network
    along. All is float32; the head is not copied, but put into eval mode and frozen.

    FeatureStoreError for a head that was trained on another source or layer, for weights that are not the source's, and for a
    layer of another shape than the head takes.
    """

    def __init__(
        self,
        source: Source,
        head: Head | Literal["classes", "similarity"] = "classes",
        layer: str | None = None,
        *,
        maps: str | None = None,
        weights: str | None = None,
        backbone: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if not isinstance(head, Head) and head not in _HEADLESS:
            raise FeatureStoreError(f"`head` is {head!r}; without a trained head it is one of {listing(_HEADLESS)}.")
        self.source, self.device = source, torch.device(device)
        tuned = head if isinstance(head, FinetunedHead) else None
        self.layer = source.layer(_layer_of(head, layer, source))
        head = tuned.head if tuned else head
        if not isinstance(head, Head):
            head = _HEADLESS[head](self.layer.shape)
        if head.shape != self.layer.shape:
            raise FeatureStoreError(
                f"the head takes rows of {head.shape}; those of {self.layer.name!r} are {self.layer.shape}."
            )
        self.recipe = recipe_of(source)
        self.weights = weights_of(source, weights, backbone)
        spec = self.weights.backbone
        spec.check_layers([self.layer.name])
        self.maps = maps or last_maps(spec, self.layer.name)
        if maps:
            _refuse_no_maps(spec, maps, self.layer.name)
        names = [name for name in (self.maps, self.layer.name) if name]
        self.backbone = load_extractor(spec, spec.check_layers(names), self.weights, self.device, torch.float32)
        self._tuned = tuned.backbone.state_dict() if tuned else {}
        if tuned:
            self.backbone.load_state_dict(self._tuned, strict=False)
        self.head = head.to(self.device).eval().requires_grad_(False)

    @property
    def n_places(self) -> int:
        """Photographs in one example."""
        return self.head.n_places

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of one example's pixels: (places, size, size, 3)."""
        return self.n_places, self.recipe.size, self.recipe.size, 3

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes) of the recipe's pixels (n, places, size, size, 3), 0 … 255, in the recipe's order of channels."""
        return self.run(self.inputs(pixels)).logits

    def inputs(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the network takes, (n, places, 3, size, size) float32: pixels less the recipe's mean, over its scale."""
        images = self.recipe.normalise(pixels.to(self.device).flatten(0, 1))
        return images.view(*pixels.shape[:2], *images.shape[1:])

    def run(self, inputs: torch.Tensor) -> Pass:
        """From ``inputs`` on."""
        images = inputs.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        layers: dict[str, torch.Tensor] = self.backbone(images)
        rows = layers[self.layer.name]
        places = rows.unflatten(0, inputs.shape[:2]).unbind(1)
        return Pass(self.head(*places), rows, layers[self.maps] if self.maps else None)

    def pixels(self, items: np.ndarray) -> torch.Tensor:
        """The photographs of ``items`` (n,) as the recipe makes them, uint8 (n, size, size, 3), on the CPU.

        FeatureStoreError for those that are gone or changed since they were cached.
        """
        distinct, places = np.unique(items, return_inverse=True)
        read = [batch.pixels for batch in self._photographs(distinct)]
        return torch.cat(read)[torch.from_numpy(places)]

    def check(self, items: np.ndarray, progress: Callable[[int], object] = lambda n: None) -> float:
        """Compare live activations with the cached rows of ``items``; the largest difference, over the row's largest value.

        FeatureStoreError for one beyond the tolerance of the source's precision, and for photographs that are gone or changed.
        ``progress`` is told how many items were compared.
        """
        rows, largest = self.source.rows(self.layer.name), 0.0
        most = TOLERANCE[precision_of(self.source)] + _ROUNDED[self.layer.dtype.name]
        with torch.no_grad(), reproducible(), self._as_cached():
            for batch in self._photographs(np.unique(items)):
                inputs = self.recipe.normalise(batch.pixels.to(self.device))
                live = self.backbone(inputs)[self.layer.name].cpu().numpy()
                for photo, cached, row in zip(batch.photos, rows.gather(batch.rows).numpy(), live, strict=True):
                    off = difference(cached, row)
                    if not off <= most:
                        raise self._other_network(str(photo), off, most)
                    largest = max(largest, off)
                progress(len(batch.rows))
        return largest

    @contextmanager
    def _as_cached(self) -> Iterator[None]:
        """With the weights that the rows were made with, where a fine-tuned head brought others."""
        self.backbone.load_state_dict(self.weights.read(self._tuned), strict=False)
        try:
            yield
        finally:
            self.backbone.load_state_dict(self._tuned, strict=False)

    def _other_network(self, photo: str, off: float, most: float) -> FeatureStoreError:
        return FeatureStoreError(
            f"layer {self.layer.name!r} of {photo}, computed now, differs from the cached row by {off:.1e} of its largest value "
            f"(allowed: {most:.0e}), so what would be explained is not what the head was trained on. Photograph, weights and "
            "recipe are the source's: the row is damaged, or made by another version of the network. Check it: "
            f"pipelines/verify_store.py {self.layer.store}"
        )

    def _photographs(self, items: np.ndarray) -> Iterator[Batch]:
        read = batches(
            [photo_of(self.source, int(item)) for item in items],
            self.recipe,
            slots=max(self.source.n_items, 1),
            next_row=0,
            batch_size=_BATCH,
            workers=2,
            skip=False,
        )
        return map(_readable, read)


def _readable(batch: Batch | Failure) -> Batch:
    if isinstance(batch, Failure):
        raise FeatureStoreError(
            f"{batch}. What is explained has to be the photograph that was cached: put it back, or leave its items out (`where`)."
        )
    return batch


def _layer_of(head: Head | str, layer: str | None, source: Source) -> str:
    """The layer that a head was trained on; FeatureStoreError if it is not known, or contradicts what is given."""
    trained = head.trained_on if isinstance(head, Head) else {}
    if isinstance(head, FinetunedHead):
        trained = {**trained, "layer": head.part.end}
    if trained.get("sources") and source.name not in trained["sources"]:
        raise FeatureStoreError(
            f"the head was trained on {listing(trained['sources'])}, not on {source.name}: its weights mean nothing for another "
            "source's activations."
        )
    known = trained.get("layer")
    if layer is None and known is None:
        raise FeatureStoreError("which layer does the head take? Give `layer`.")
    if layer is not None and known not in (None, layer):
        raise FeatureStoreError(f"the head was trained on layer {known!r}, not on {layer!r}.")
    return str(layer or known)


def last_maps(spec: BackboneSpec, layer: str) -> str | None:
    """The last layer up to ``layer`` that gives maps (channel, y, x), of ``_FEWEST`` places across if there is such a one.

    None if there is none at all.
    """
    names = list(spec.layers)
    names = names[: names.index(layer) + 1]
    shapes = layer_shapes(spec, names)
    found = [name for name in reversed(names) if _are_maps(shapes.get(name, ()))]
    return next((name for name in found if min(shapes[name][1:]) >= _FEWEST), found[0] if found else None)


def _are_maps(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[1] > 1 and shape[2] > 1


def _refuse_no_maps(spec: BackboneSpec, maps: str, layer: str) -> None:
    """FeatureStoreError for a layer that gives no maps, or comes after ``layer``."""
    spec.check_layers([maps])
    shape, names = layer_shapes(spec, [maps])[maps], list(spec.layers)
    if not _are_maps(shape):
        raise FeatureStoreError(
            f"layer {maps!r} gives {shape}, not maps (channel, y, x). The last that does: {last_maps(spec, layer)}."
        )
    if names.index(maps) > names.index(layer):
        raise FeatureStoreError(
            f"layer {maps!r} comes after {layer!r}, where the head is. Choose one before: {last_maps(spec, layer)}."
        )
