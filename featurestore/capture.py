"""Named layers out of one forward pass of a frozen network.

The published extractors kept a reference to a convolution's output which the next in-place ReLU then overwrote:
15 of 38 layers were silently wrong. Here the traced graph decides: an operation works in place only on a tensor
that nobody else, reader or layer, will look at again.
"""

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from featurestore.backbones import BackboneSpec
from featurestore.weights import Weights

_FRESH = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)  # modules whose output is always a new tensor
_IN_PLACE_OPERATORS = {operator.iadd: operator.add, operator.isub: operator.sub, operator.imul: operator.mul}


class _PathTracer(fx.Tracer):
    """Notes which graph node holds the output of each module.

    torchvision's feature extractor finds outputs by names that it makes unique by counting: asked for
    ``features.conv_1_1`` of this network it returns ``conv_1_2``. Module paths need no making unique.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, list[fx.Node]] = {}

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        result = super().call_module(m, forward, args, kwargs)
        if isinstance(result, fx.Proxy):
            self.outputs.setdefault(self.path_of_module(m), []).append(result.node)
        return result


def extractor(network: nn.Module, layers: Mapping[str, str]) -> fx.GraphModule:
    """A module that maps images to ``{name: output}`` for ``layers`` (name to module path), and computes nothing more.

    The network is put into eval mode, traced, cut after the last layer asked for, and frozen. Its parameters
    are shared, not copied. Outputs are safe to keep: no later operation writes into them.
    Raises ValueError if a path is not a module that is called exactly once and returns a tensor.
    """
    tracer = _PathTracer()
    graph = tracer.trace(network.eval())
    captured = {}
    for name, path in layers.items():
        nodes = tracer.outputs.get(path, [])
        if len(nodes) != 1:
            raise ValueError(f"layer {name!r}: module {path!r} gives {len(nodes)} tensors in one forward pass, not 1")
        captured[name] = nodes[0]
    (whole,) = [node for node in graph.nodes if node.op == "output"]
    graph.erase_node(whole)
    graph.output(captured)
    cut = fx.GraphModule(network, graph).eval()
    graph.eliminate_dead_code()
    cut.delete_all_unused_submodules()
    _protect_from_in_place(cut, graph)
    cut.recompile()
    return cut.requires_grad_(False)


def _protect_from_in_place(module: nn.Module, graph: fx.Graph) -> None:
    """Turn in-place operations off, except on a fresh tensor with one reader that is no layer."""
    modules = dict(module.named_modules())
    output = next(node for node in graph.nodes if node.op == "output")
    captured = set(output.all_input_nodes)
    unsafe: set[str] = set()
    activations: set[str] = set()
    for node in graph.nodes:
        if node.op == "call_module" and hasattr(modules[node.target], "inplace"):
            (source,) = node.all_input_nodes
            fresh = source.op == "call_module" and isinstance(modules[source.target], _FRESH)
            activations.add(node.target)
            if not fresh or len(source.users) > 1 or source in captured:
                unsafe.add(node.target)  # one module may be called several times: one unsafe call decides
        elif node.op == "call_function" and node.target in _IN_PLACE_OPERATORS:
            node.target = _IN_PLACE_OPERATORS[node.target]
        elif node.op == "call_function" and node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        elif node.op == "call_method" and node.target.endswith("_") and not node.target.endswith("__"):
            raise ValueError(f"{node.target}() works in place at {node}; its input cannot be captured safely")
    for name in activations:
        modules[name].inplace = name not in unsafe


def meta_network(spec: BackboneSpec) -> nn.Module:
    """The network without memory for weights: enough for keys, shapes and tracing."""
    with torch.device("meta"):
        return spec.build()


def weight_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes by state-dict key: what a checkpoint has to hold."""
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def layer_shapes(spec: BackboneSpec, layers: list[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of one image's output at each layer, (channel, y, x) or (feature,), found without computing anything."""
    names = layers or list(spec.layers)
    cut = extractor(meta_network(spec), {name: spec.layers[name] for name in names})
    outputs = cut(torch.empty(1, 3, spec.input_size, spec.input_size, device="meta"))
    return {name: tuple(outputs[name].shape[1:]) for name in names}


def load_extractor(
    spec: BackboneSpec, layers: list[str], weights: Weights, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """The extractor with weights in place, reading only those up to the last layer.

    Channels-last on every device: on CPU it is the faster layout for these convolutions, on GPU the one tensor cores use.
    """
    cut = extractor(meta_network(spec), {name: spec.layers[name] for name in layers})
    cut.load_state_dict(weights.read(cut.state_dict()), assign=True)
    return cut.requires_grad_(False).to(device=device, dtype=dtype).to(memory_format=torch.channels_last)
