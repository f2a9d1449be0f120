"""Named layers out of one forward pass of a frozen network.

The published extractors kept a reference to a convolution's output which the next in-place ReLU then overwrote:
15 of 38 layers were silently wrong. Here the traced graph decides: an operation works in place only on a tensor
that nobody else, reader or layer, will look at again.
"""

import hashlib
import inspect
import operator
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from featurestore.caching.capture_check import prove
from featurestore.checkpoints.weights import Weights, bytes_of
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import BackboneSpec
from featurestore.text import listing

_FRESH = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)  # modules whose output is always a new tensor
_IN_PLACE_OPERATORS = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul", "mod")
}
_LIBRARIES = ("torch", "torchvision", "_operator", "builtins", "math")
_IMAGE_DIMENSIONS = (1, 2, 3)  # of a layer that the store can hold: (feature,), (token, feature), (channel, y, x)


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
        elif node.op == "call_function":
            _call_out_of_place(node)
        elif node.op == "call_method" and _name_says_in_place(node.target):
            raise _works_in_place(node, node.target)
    for name in activations:
        modules[name].inplace = name not in unsafe


def _call_out_of_place(node: fx.Node) -> None:
    """Turn ``relu(x, inplace=True)`` into a new tensor; ValueError for functions that only work in place."""
    name = getattr(node.target, "__name__", "")
    if getattr(node.target, "__module__", "") == "_operator":  # and_, or_ and not_ are called so for Python's sake
        return
    if _name_says_in_place(name) or node.kwargs.get("out") is not None:
        raise _works_in_place(node, name)
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
    elif True in node.args:
        try:
            places = list(inspect.signature(node.target).parameters)  # type: ignore[arg-type]
        except (TypeError, ValueError):  # a function written in C: torch gives those no flag
            return
        if "inplace" in places[: len(node.args)]:
            node.update_arg(places.index("inplace"), False)


def _name_says_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


def _works_in_place(node: fx.Node, name: str) -> ValueError:
    return ValueError(f"{name}() works in place at {node}; its input cannot be captured safely")


def module_paths(network: nn.Module) -> list[str]:
    """Paths of the modules that give one value in one forward pass, in the order they are done."""
    tracer = _PathTracer()
    graph = tracer.trace(network.eval())
    order = {node: i for i, node in enumerate(graph.nodes)}
    single = {path: nodes[0] for path, nodes in tracer.outputs.items() if len(nodes) == 1 and path}
    return sorted(single, key=lambda path: (order[single[path]], -path.count(".")))


def graph_digest(spec: BackboneSpec) -> str:
    """sha256 (hex) of what a network does beside its weights: operations, modules' settings, and constants.

    Settings are such as strides. Constants are tensors that its constructor makes and no state dict holds.
    """
    network = spec.build_meta().eval()
    graph = _PathTracer().trace(network)
    settings = [f"{path} {type(module).__name__} {_settings(module)}" for path, module in network.named_modules()]
    functions = [_source(node.target) for node in graph.nodes if node.op == "call_function"]
    digest = hashlib.sha256("\n".join([str(graph), *settings, *functions]).encode())
    weights = network.state_dict().keys()
    if any(name not in weights for name in _tensors(extractor(network, spec.layers))):
        whole = extractor(spec.build(), spec.layers)
        for name, value in [*whole.named_parameters(), *whole.named_buffers()]:
            if name not in weights:
                digest.update(f"\n{name} {value.dtype} {tuple(value.shape)} ".encode() + bytes_of(value))
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
    """The text of a function of the user's own (one that torch.fx was told to call as a whole)."""
    if (getattr(function, "__module__", None) or "").partition(".")[0] in _LIBRARIES:
        return ""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def layer_shapes(spec: BackboneSpec, layers: Iterable[str] | None = None) -> dict[str, tuple[int, ...]]:
    """Shape of one image's output at each layer, (channel, y, x) or (feature,), found without computing anything.

    Modules of a network that is not ours and which give no such tensor are left out.
    """
    names = list(layers or spec.layers)
    size = spec.input_size or spec.own_recipe().size
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


def settle(spec: BackboneSpec, recipe_size: int) -> BackboneSpec:
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
            "If it was trained on another size, give --recipe that one."
        ) from error
    if not shapes:
        raise FeatureStoreError(f"{spec.name} has no module whose output is a tensor with a row for each picture.")
    return replace(sized, layers={name: spec.layers[name] for name in spec.layers if name in shapes})


def refuse_absent(spec: BackboneSpec, layers: Iterable[str], weights: Weights) -> None:
    """FeatureStoreError if some of ``layers`` need weights that a file which was cut short does not hold."""
    if not weights.absent:
        return
    cuts = {name: extractor(spec.build_meta(), {name: spec.layers[name]}) for name in layers}
    lacking = [name for name, cut in cuts.items() if weights.absent & set(cut.state_dict())]
    if lacking:
        raise FeatureStoreError(
            f"{weights.name} does not hold all of {spec.name} ({len(weights.absent)} keys are missing at its end), so it "
            f"cannot give {listing(lacking)}. Ask for earlier layers, or give --weights a file of the whole network."
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
    if any(key not in weights.keys for key in _tensors(cut)):
        cut = extractor(spec.build(), paths)  # constants that the constructor makes, and no checkpoint holds
    cut.load_state_dict(
        weights.read([key for key in cut.state_dict() if key in weights.keys]), strict=False, assign=True
    )
    if spec.same is None:  # a network that is not ours
        prove(cut, spec, paths, weights)
    return cut.requires_grad_(False).to(device=device, dtype=dtype).to(memory_format=torch.channels_last)


def _tensors(network: nn.Module) -> Iterable[str]:
    yield from (name for name, _ in network.named_parameters())
    yield from (name for name, _ in network.named_buffers())
