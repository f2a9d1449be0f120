"""The captured layers of a network that is not ours, checked against forward hooks on two random inputs, at every load.

Capture turns in-place operations into new tensors, which is right unless the old tensor is read later. For the face
networks of this package that is tested; for torchvision's and the user's own it is checked here, before anything is stored.
"""

from collections.abc import Mapping

import torch
from torch import nn

from featurestore.checkpoints.weights import Weights
from featurestore.errors import FeatureStoreError
from featurestore.networks.hooks import record
from featurestore.networks.spec import BackboneSpec

_SAME = 1e-4  # of the largest value: the same operations on the same pictures
_ALONE = 1e-2  # one picture alone and in a batch: libraries sum in another order, and deep networks amplify that


def check_capture(cut: nn.Module, spec: BackboneSpec, paths: Mapping[str, str], weights: Weights) -> None:
    """FeatureStoreError unless ``cut`` gives for each layer what its module gives in the whole network.

    Refused are layers that come out differently, that change from one run to the next, that depend on the other pictures of
    a batch, or that have not one row for each picture. ``cut`` is on the CPU, in float32.
    """
    size = spec.input_size or spec.default_recipe().size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    images += torch.tensor([0.5, -0.5]).view(2, 1, 1, 1)  # two that a forward which looks at its numbers tells apart
    try:
        whole = spec.build().eval().requires_grad_(False)
        weights.put_into(whole)
        with torch.no_grad():
            expected = record(whole, paths, images)
            first, again, alone = cut(images), cut(images), [cut(images[:1]), cut(images[1:])]
    except FeatureStoreError:
        raise
    except Exception as error:  # torch raises many types, and the network is the user's
        raise FeatureStoreError(
            f"{spec.name} cannot be run: {type(error).__name__}: {error}".rstrip(". ") + "."
        ) from error
    for name in paths:
        if len(first[name]) != 2 or any(len(one[name]) != 1 for one in alone):
            raise FeatureStoreError(f"layer {name!r} of {spec.name} does not give one row per picture. Leave it out.")
        if not torch.isfinite(first[name]).all():
            raise FeatureStoreError(
                f"layer {name!r} of {spec.name} gives NaN or infinite numbers for random pictures. Look at the weights, and at "
                "divisions by what can be zero."
            )
        if _far(first[name], again[name]) > _SAME:
            raise FeatureStoreError(
                f"layer {name!r} of {spec.name} gives different numbers each time: something random, such as dropout, is active "
                "in eval mode. Switch it off in the network."
            )
        (whole_output, *more) = expected[name] or [""]
        if more or not isinstance(whole_output, torch.Tensor) or _far(first[name], whole_output) > _SAME:
            raise FeatureStoreError(
                f"layer {name!r} of {spec.name} differs from the same module's output in the whole network. Something in its "
                "forward works in place on a tensor that is read later, is random for each instance, or depends on hooks. "
                "Write new tensors (inplace=False, x = x + y), and keep constants in buffers."
            )
        if any(_far(one[name][0], row) > _ALONE for one, row in zip(alone, first[name], strict=True)):
            raise _depends_on_the_batch(spec, name)


def check_among_others(
    spec: BackboneSpec, batch: Mapping[str, torch.Tensor], alone: Mapping[str, torch.Tensor]
) -> None:
    """FeatureStoreError unless the first photograph's rows in a real ``batch`` (n, elements) are those that it has ``alone``.

    A forward may branch at a number of pictures that the two above do not reach.
    """
    for name, rows in batch.items():
        if _far(alone[name][0].float(), rows[0].float()) > _ALONE:
            raise _depends_on_the_batch(spec, name)


def _depends_on_the_batch(spec: BackboneSpec, name: str) -> FeatureStoreError:
    return FeatureStoreError(
        f"layer {name!r} of {spec.name} gives a picture other numbers alone than among others, so its rows would "
        "depend on the batch. A normalisation over the batch must use its running statistics, and a forward that "
        "branches must do so for each picture by itself."
    )


def _far(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value; infinite for other shapes or NaN."""
    if one.shape != other.shape:
        return torch.inf
    scale = float(other.double().abs().max()) or 1.0
    share = float((one.double() - other.double()).abs().max()) / scale
    return share if share == share else torch.inf
