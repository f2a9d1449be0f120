"""Hashes of what a network computes: of its operations, and of its numbers."""

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from featurestore.networks.spec import BackboneSpec
from featurestore.networks.tracing import PathTracer, extractor, tensor_names

_LIBRARIES = ("torch", "torchvision", "_operator", "builtins", "math")


def graph_digest(spec: BackboneSpec) -> str:
    """sha256 (hex) of what a network does beside its weights: operations, modules' settings, and constants.

    Settings are such as strides. Constants are tensors that its constructor makes and no state dict holds.
    """
    network = spec.build_meta().eval()
    graph = PathTracer().trace(network)
    settings = [f"{path} {type(module).__name__} {_settings(module)}" for path, module in network.named_modules()]
    functions = [_source(node.target) for node in graph.nodes if node.op == "call_function"]
    digest = hashlib.sha256("\n".join([str(graph), *settings, *functions]).encode())
    weights = network.state_dict().keys()
    if any(name not in weights for name in tensor_names(extractor(network, spec.layers))):
        whole = extractor(spec.build(), spec.layers)
        for name, value in [*whole.named_parameters(), *whole.named_buffers()]:
            if name not in weights:
                digest.update(f"\n{name} {value.dtype} {tuple(value.shape)} ".encode() + _bytes_of(value))
    return digest.hexdigest()


def _settings(module: nn.Module) -> str:
    """A module's attributes that are plain values, such as strides, or functions, by name."""
    plain: dict[str, object] = {}
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name == "training":  # torch's own book-keeping
            continue
        if isinstance(value, (bool, int, float, str, tuple, list, torch.dtype)) or value is None:
            plain[name] = value
        elif callable(value) and hasattr(value, "__qualname__"):
            plain[name] = value.__qualname__
    return repr(plain)


def _source(function: Any) -> str:
    """The text of a function of the user's own (wrapped by ``torch.fx.wrap``)."""
    if (getattr(function, "__module__", None) or "").partition(".")[0] in _LIBRARIES:
        return ""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def state_digest(state: Mapping[str, torch.Tensor]) -> str:
    """sha256 (hex) of a state dict: names, dtypes, shapes and numbers."""
    digest = hashlib.sha256()
    for key, value in state.items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\0".encode())
        digest.update(_bytes_of(value))
    return digest.hexdigest()


def _bytes_of(value: torch.Tensor) -> bytes:
    """A tensor's numbers in C order, as they lie in memory."""
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
