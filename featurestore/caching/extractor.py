"""A network cut after the layers asked for, with its weights in place, ready to compute."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from featurestore.caching.capture_check import check_capture
from featurestore.checkpoints.weights import Weights
from featurestore.errors import FeatureStoreError
from featurestore.networks.spec import BackboneSpec
from featurestore.networks.tracing import extractor, tensor_names
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
    """The extractor with weights in place, reading only those up to the last layer.

    Channels-last on every device: on CPU it is the faster layout for these convolutions, on GPU the one tensor cores use.
    """
    refuse_absent(spec, layers, weights)
    paths = {name: spec.layers[name] for name in layers}
    cut = extractor(spec.build_meta(), paths)
    if any(key not in weights.keys for key in tensor_names(cut)):
        cut = extractor(spec.build(), paths)  # constants that the constructor makes, and no checkpoint holds
    cut.load_state_dict(
        weights.read([key for key in cut.state_dict() if key in weights.keys]), strict=False, assign=True
    )
    if spec.equal is None:  # a network that is not ours
        check_capture(cut, spec, paths, weights)
    return cut.requires_grad_(False).to(device=device, dtype=dtype).to(memory_format=torch.channels_last)


def load(spec: BackboneSpec, layers: list[str], weights: Weights, device: torch.device, dtype: torch.dtype) -> Loaded:
    """``load_extractor``, timed."""
    started = time.perf_counter()
    network = load_extractor(spec, layers, weights, device, dtype)
    return Loaded(layers, network, time.perf_counter() - started)
