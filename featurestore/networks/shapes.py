"""The shapes of a network's layers, found without computing anything."""

from collections.abc import Iterable
from dataclasses import replace

import torch

from featurestore.errors import FeatureStoreError
from featurestore.networks.spec import BackboneSpec
from featurestore.networks.tracing import extractor

_IMAGE_DIMENSIONS = (1, 2, 3)  # of a layer that the store can hold: (feature,), (token, feature), (channel, y, x)


def layer_shapes(spec: BackboneSpec, layers: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of one image's output at each layer, (channel, y, x) or (feature,), found without computing anything.

    Modules of a network that is not ours and which give no such tensor are left out.
    """
    names = list(layers or spec.layers)
    size = spec.input_size or spec.default_recipe().size
    cut = extractor(spec.build_meta(), {name: spec.layers[name] for name in names})
    with torch.inference_mode():
        outputs = cut(torch.empty(2, 3, size, size, device="meta"))
    return {name: tuple(outputs[name].shape[1:]) for name in names if _is_layer(outputs[name])}


def _is_layer(output: object) -> bool:
    return (
        isinstance(output, torch.Tensor)
        and output.is_floating_point()
        and output.dim() - 1 in _IMAGE_DIMENSIONS
        and output.shape[0] == 2  # a row for each of the two images
    )


def with_input_size(spec: BackboneSpec, recipe_size: int) -> BackboneSpec:
    """The spec with an input size, and with those layers alone that give a tensor of a shape which the store can hold.

    FeatureStoreError if the network does not take pictures of that size.
    """
    if spec.input_size is not None:
        return spec
    sized = replace(spec, input_size=recipe_size)
    try:
        shapes = layer_shapes(sized)
    except (RuntimeError, AssertionError, ValueError, IndexError, TypeError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise FeatureStoreError(
            f"{spec.name} cannot be run on {recipe_size} × {recipe_size} pixels: {reason}. "
            "If it was trained on another size, give `recipe` that one."
        ) from error
    if not shapes:
        raise FeatureStoreError(f"{spec.name} has no module whose output is a tensor with a row for each picture.")
    return replace(sized, layers={name: spec.layers[name] for name in spec.layers if name in shapes})
