"""The shapes of a network's layers, found without computing anything."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch

from featurestore.errors import FeatureStoreError
from featurestore.networks.capture import DESCRIPTOR, capture
from featurestore.networks.hooks import record
from featurestore.networks.spec import INPUT_OF, BackboneSpec

Outputs = Sequence[object]  # one for each time that a module runs
_IMAGE_DIMENSIONS = (1, 2, 3)  # of a layer that the store can hold: (feature,), (token, feature), (channel, y, x)


def layer_shapes(spec: BackboneSpec, layers: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of one image's output at each layer, (channel, y, x) or (feature,), found without computing anything.

    Modules of a network that is not ours and which give no such tensor are left out. A network that is captured by hooks and
    does not run without numbers is run on two random images.
    """
    names = list(layers or spec.layers)
    outputs = _outputs(spec, {name: spec.layers[name] for name in names})
    return {name: _shape(outputs[name]) for name in names if not _why_no_layer(outputs[name])}


def _shape(outputs: Outputs) -> tuple[int, ...]:
    (output,) = outputs
    assert isinstance(output, torch.Tensor)
    return tuple(output.shape[1:])


def _outputs(spec: BackboneSpec, paths: Mapping[str, str]) -> Mapping[str, Outputs]:
    """What each layer gives for two images in one forward pass, as tensors without numbers, in the order of computing."""
    size = spec.input_size or spec.default_recipe().size
    images = torch.empty(2, 3, size, size, device="meta")
    network = spec.build_meta()
    if not spec.hooks:
        with torch.inference_mode():
            return {name: [output] for name, output in capture(spec, network, paths)(images).items()}
    try:
        return record(network.eval(), paths, images, _without_numbers)
    except Exception:  # a forward that looks at numbers; or that really fails
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        return record(spec.build().eval(), paths, images, _without_numbers)


def _without_numbers(output: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(output, device="meta")


def _why_no_layer(outputs: Outputs) -> str:
    """Why the store cannot hold what a module gives in one forward pass; empty if it can."""
    if len(outputs) != 1:
        return f"it runs {len(outputs)} times in a forward pass, not once"
    (output,) = outputs
    if not isinstance(output, torch.Tensor):
        return f"it gives {output if isinstance(output, str) else type(output).__name__}, not a tensor"
    if not output.is_floating_point() or output.dim() - 1 not in _IMAGE_DIMENSIONS or output.shape[0] != 2:
        shape = ", ".join(map(str, output.shape))
        return f"for two pictures it gives a tensor ({shape}) of {output.dtype}, not a row of numbers or maps for each"
    return ""


def with_input_size(spec: BackboneSpec, recipe_size: int) -> BackboneSpec:
    """The spec with an input size, and with those layers alone that give a tensor of a shape which the store can hold.

    FeatureStoreError if the network does not take pictures of that size.
    """
    if spec.input_size is not None:
        return spec
    sized = replace(spec, input_size=recipe_size)
    try:
        outputs = _outputs(sized, spec.layers)
    except FeatureStoreError:
        raise
    except Exception as error:  # torch raises many types, and the network is not ours
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise FeatureStoreError(
            f"{spec.name} cannot be run on {recipe_size} × {recipe_size} pixels: {reason}. "
            "If it was trained on another size, give `recipe` that one."
        ) from error
    reasons = {name: _why_no_layer(found) for name, found in outputs.items()}
    descriptor = outputs.get(DESCRIPTOR, [])
    if spec.layers.get(DESCRIPTOR, "").startswith(INPUT_OF) and not reasons[DESCRIPTOR]:
        pooled = math.prod(_shape(descriptor)[1:]) == 1
        reasons[DESCRIPTOR] = "" if pooled else "the classifier is given maps or tokens, not pooled features"
    layers = {name: spec.layers[name] for name in outputs if not reasons[name]}
    if not layers:
        raise FeatureStoreError(f"{spec.name} has no module whose output is a tensor with a row for each picture.")
    left_out = {name: reason for name, reason in reasons.items() if reason}
    return replace(sized, layers=layers, left_out={**spec.left_out, **left_out})
