"""A network cut after the layers asked for, with its weights in place, ready to compute."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from featurestore.caching.capture_check import check_capture
from featurestore.checkpoints.weights import Weights
from featurestore.errors import FeatureStoreError
from featurestore.networks.hooks import HookedNetwork
from featurestore.networks.spec import BackboneSpec
from featurestore.networks.tracing import between, cuts_before, extractor, tensor_names
from featurestore.text import listing


@dataclass(frozen=True)
class Loaded:
    """An extractor of ``layers`` and the seconds that building it and reading its weights took."""

    layers: list[str]
    network: nn.Module
    seconds: float


def refuse_absent(spec: BackboneSpec, layers: Iterable[str], weights: Weights) -> None:
    """FeatureStoreError if some of ``layers`` need weights that a file which was cut short does not hold."""
    if not weights.absent:
        return
    cuts = {name: extractor(spec.build_meta(), {name: spec.layers[name]}) for name in layers}
    lacking = [name for name, cut in cuts.items() if weights.absent & set(cut.state_dict())]
    if lacking:
        raise FeatureStoreError(
            f"{weights.name} does not hold all of {spec.name} ({len(weights.absent)} keys are missing at its end), so it "
            f"cannot give {listing(lacking)}. Ask for earlier layers, or give `weights` a file of the whole network."
        )


def load_extractor(
    spec: BackboneSpec, layers: list[str], weights: Weights, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The extractor with weights in place, reading only those up to the last layer if it is a traced one.

    Channels-last on every device: on CPU it is the faster layout for these convolutions, on GPU the one tensor cores use.
    """
    refuse_absent(spec, layers, weights)
    paths = {name: spec.layers[name] for name in layers}
    cut = _hooked(spec, paths, weights) if spec.hooks else _traced(spec, paths, weights)
    if spec.equal is None:  # a network that is not ours
        check_capture(cut, spec, paths, weights)
    return _in_fast_layout(cut.requires_grad_(False), spec).to(device=device, dtype=dtype)


def _traced(spec: BackboneSpec, paths: Mapping[str, str], weights: Weights) -> nn.Module:
    cut = extractor(spec.build_meta(), paths)
    if any(key not in weights.keys for key in tensor_names(cut)):
        cut = extractor(spec.build(), paths)  # constants that the constructor makes, and no checkpoint holds
    weights.put_into(cut, assign=True)
    return cut


def _hooked(spec: BackboneSpec, paths: Mapping[str, str], weights: Weights) -> nn.Module:
    network = spec.build()
    weights.put_into(network)
    return HookedNetwork(network, paths)


def _in_fast_layout(cut: nn.Module, spec: BackboneSpec) -> nn.Module:
    """Channels last where the network runs so: one that is not ours may have a ``view`` or a tensor that does not take it."""
    try:
        cut.to(memory_format=torch.channels_last)
        if spec.equal is None:
            size = spec.input_size or spec.default_recipe().size
            with torch.inference_mode():
                cut(torch.zeros(1, 3, size, size).contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        cut.to(memory_format=torch.contiguous_format)
        cut.register_forward_pre_hook(lambda _, images: (images[0].contiguous(),))
    return cut


def network_part(spec: BackboneSpec, start: str | None, end: str) -> nn.Module:
    """The part of a network between two layers, by name, with weights still to be loaded; without ``start`` from the images.

    See ``networks.tracing.between``. Its own tensors are on the meta device, unless its constructor makes some that no checkpoint
    holds. FeatureStoreError for unknown layers, and if it cannot be cut there: names layers where it can be.
    """
    spec.check_layers([end] if start is None else [start, end])
    if spec.hooks:
        raise FeatureStoreError(
            f"{spec.name} cannot be traced by torch.fx, so it cannot be divided at a layer: no part of it can be fine-tuned."
        )
    paths = None if start is None else spec.layers[start], spec.layers[end]
    network = spec.build_meta()
    try:
        part = between(network, *paths)
        known = network.state_dict().keys()
        return part if all(name in known for name in tensor_names(part)) else between(spec.build(), *paths)
    except ValueError:
        cuts = cuts_before(network, spec.layers, spec.layers[end])
        if start in cuts:
            raise
        hint = f"Layers where it can be: {listing(cuts[::-1], 12)}, or input." if cuts else "Only input is possible."
        late = list(spec.layers).index(str(start)) >= list(spec.layers).index(end)
        why = f"it is not before {end!r}" if late else f"a branch of it leads to {end!r} beside this layer"
        raise FeatureStoreError(f"{spec.name} cannot be divided at {start!r}: {why}. {hint}") from None


def load_part(spec: BackboneSpec, start: str | None, end: str, weights: Weights) -> nn.Module:
    """``network_part`` with float32 weights in place, on the CPU; its parameters can be trained."""
    refuse_absent(spec, [end], weights)
    part = network_part(spec, start, end)
    weights.put_into(part, assign=True)
    return part.requires_grad_(True)


def load(spec: BackboneSpec, layers: list[str], weights: Weights, device: torch.device, dtype: torch.dtype) -> Loaded:
    """``load_extractor``, timed."""
    started = time.perf_counter()
    network = load_extractor(spec, layers, weights, device, dtype)
    return Loaded(layers, network, time.perf_counter() - started)
