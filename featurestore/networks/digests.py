"""Hashes of what a network computes: of its operations, and of its numbers."""

import hashlib
import inspect
import sys
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
    settings = [f"{path} {type(module).__name__} {_settings(module)}" for path, module in network.named_modules()]
    code = _files_of(network, spec) if spec.hooks else _operations(network)
    digest = hashlib.sha256("\n".join([code[0], *settings, *code[1:]]).encode())
    weights = network.state_dict().keys()
    if any(name not in weights for name in tensor_names(network if spec.hooks else extractor(network, spec.layers))):
        whole = spec.build() if spec.hooks else extractor(spec.build(), spec.layers)
        for name, value in [*whole.named_parameters(), *whole.named_buffers()]:
            if name not in weights:
                digest.update(f"\n{name} {value.dtype} {tuple(value.shape)} ".encode() + _bytes_of(value))
    return digest.hexdigest()


def _operations(network: nn.Module) -> list[str]:
    """The traced operations, and the text of functions among them."""
    graph = PathTracer().trace(network)
    return [str(graph), *(_source(node.target) for node in graph.nodes if node.op == "call_function")]


def _files_of(network: nn.Module, spec: BackboneSpec) -> list[str]:
    """Its modules' configurations, and the text of the files that it and its builder are in, torch's and Python's left out."""
    classes = {cls for module in network.modules() for cls in type(module).__mro__}
    names = {cls.__module__ for cls in classes} | {spec.name.partition(":")[0]}
    others = {*_LIBRARIES, *sys.stdlib_module_names}
    ours = sorted(name for name in names if name.partition(".")[0] not in others and name in sys.modules)
    configurations = [_plain(getattr(module, "config", None)) for module in network.modules()]
    return [repr(configurations), *(_source(sys.modules[name]) for name in ours)]


def _plain(configuration: object) -> dict[str, object]:
    """Attributes of an object that are plain values, such as a transformer's sizes."""
    values = getattr(configuration, "__dict__", {})
    return {
        name: value
        for name, value in sorted(values.items())
        if not name.startswith("_") and (isinstance(value, (bool, int, float, str)) or value is None)
    }


def _settings(module: nn.Module) -> str:
    """A module's attributes that are plain values, such as strides, or functions, by name."""
    plain: dict[str, object] = {}
    for name, value in sorted(vars(module).items()):
        if name.startswith("_") or name in ("training", "name_or_path"):  # book-keeping; the folder it was read from
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
