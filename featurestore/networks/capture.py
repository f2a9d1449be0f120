"""How a network's layers are captured: traced by torch.fx, or by forward hooks where it cannot be traced."""

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from featurestore.files import safe_name
from featurestore.networks.hooks import HookedNetwork
from featurestore.networks.spec import INPUT_OF, BackboneSpec
from featurestore.networks.tracing import extractor, module_paths

DESCRIPTOR = "descriptor"


def capture(spec: BackboneSpec, network: nn.Module, layers: Mapping[str, str]) -> nn.Module:
    """A module that maps images to ``{name: output}`` for ``layers`` (name to module path), and computes nothing more."""
    return HookedNetwork(network, layers) if spec.hooks else extractor(network, layers)


def with_layers(spec: BackboneSpec) -> BackboneSpec:
    """A network that is not ours with its modules as layers, by their paths in the order in which they are done.

    Where torch.fx cannot trace it, or finds an operation in place that cannot be undone, all its modules are layers for
    now, captured by hooks; ``shapes.with_input_size`` runs it and keeps those that can be.
    """
    network = spec.build_meta()
    modules = [path for path, _ in network.named_modules() if path]
    try:
        paths = module_paths(network)
        extractor(network, {path: path for path in paths})
        hooks = False
    except Exception:  # torch.fx raises many types, and the network is the user's
        paths, hooks = modules, True
    # A module may have a name that no folder can have.
    layers = {path: path for path in paths if safe_name(path)}
    reason = "it does not run exactly once in a forward pass, or gives no tensor"
    return replace(spec, layers=layers, hooks=hooks, left_out={path: reason for path in modules if path not in layers})


def with_descriptor(spec: BackboneSpec, classifier: str) -> BackboneSpec:
    """The same with the layer ``descriptor``: what the module ``classifier`` is given, the pooled features."""
    if DESCRIPTOR in spec.layers or classifier not in spec.layers:
        return spec
    layers: dict[str, str] = {}
    for name, path in spec.layers.items():
        if name == classifier:
            layers[DESCRIPTOR] = INPUT_OF + path
        layers[name] = path
    return replace(spec, layers=layers, classifier=classifier)
