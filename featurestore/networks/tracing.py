"""Named layers out of one forward pass of a frozen network, by torch.fx.

The published extractors kept a reference to a convolution's output which the next in-place ReLU then overwrote:
15 of 38 layers were silently wrong. Here the traced graph decides: an operation works in place only on a tensor
that no other operation and no captured layer reads.
"""

import inspect
import operator
from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx, nn

from featurestore.networks.spec import INPUT_OF

_FRESH = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)  # modules whose output is always a new tensor
_IN_PLACE_OPERATORS = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul", "mod")
}


class PathTracer(fx.Tracer):
    """Notes which graph node holds the output of each module.

    torchvision's feature extractor finds outputs by names that it makes unique by counting: asked for
    ``features.conv_1_1`` of this network it returns ``conv_1_2``. Module paths need no making unique.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, list[fx.Node]] = {}
        self.inputs: dict[str, list[fx.Node]] = {}

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """As fx.Tracer's, and noted."""
        result = super().call_module(m, forward, args, kwargs)
        path = self.path_of_module(m)
        if isinstance(result, fx.Proxy):
            self.outputs.setdefault(path, []).append(result.node)
        if args and isinstance(args[0], fx.Proxy):
            self.inputs.setdefault(path, []).append(args[0].node)
        return result

    def nodes(self, path: str) -> list[fx.Node]:
        """The nodes that a layer's path names: a module's outputs, or what it is given."""
        if path.startswith(INPUT_OF):
            return self.inputs.get(path.removeprefix(INPUT_OF), [])
        return self.outputs.get(path, [])


def extractor(network: nn.Module, layers: Mapping[str, str]) -> fx.GraphModule:
    """A module that maps images to ``{name: output}`` for ``layers`` (name to module path), and computes nothing more.

    The network is put into eval mode, traced, cut after the last layer asked for, and frozen. Its parameters
    are shared, not copied. Outputs are safe to keep: no later operation writes into them.
    Raises ValueError if a path is not a module that is called exactly once and returns a tensor.
    """
    tracer = PathTracer()
    graph = tracer.trace(network.eval())
    captured = {}
    for name, path in layers.items():
        nodes = tracer.nodes(path)
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


def between(network: nn.Module, start: str | None, end: str) -> fx.GraphModule:
    """The part of a network from one layer to a later one: maps rows of ``start`` (n, *shape) to the output of ``end``.

    Both are module paths; without ``start`` it begins at the images. It is in eval mode, so batch norm keeps its statistics and
    nothing drops out; its parameters are shared with ``network``, under the same names, and can be trained. Raises ValueError if
    ``end`` does not depend on ``start``, or depends on the images by another way too, and as ``extractor`` does for paths.
    """
    tracer = PathTracer()
    graph = tracer.trace(network.eval())
    last = _only_node(tracer, end)
    if start is not None:
        first = _only_node(tracer, start)
        reason = _why_no_cut(first, last)
        if reason:
            raise ValueError(f"{start!r} {reason} {end!r}")
        with graph.inserting_before(next(iter(graph.nodes))):
            rows = graph.placeholder("rows")
        first.replace_all_uses_with(rows)
    (whole,) = [node for node in graph.nodes if node.op == "output"]
    graph.erase_node(whole)
    graph.output(last)
    part = fx.GraphModule(network, graph).eval()
    graph.eliminate_dead_code()
    for node in [node for node in graph.nodes if node.op == "placeholder" and not node.users]:
        graph.erase_node(node)
    part.delete_all_unused_submodules()
    _protect_from_in_place(part, graph)
    part.recompile()
    return part


def cuts_before(network: nn.Module, layers: Mapping[str, str], end: str) -> list[str]:
    """The names of those ``layers`` (name to module path) that ``between`` can start at, for the layer at path ``end``."""
    tracer = PathTracer()
    tracer.trace(network.eval())
    last = _only_node(tracer, end)
    nodes = {name: tracer.nodes(path) for name, path in layers.items()}
    return [name for name, found in nodes.items() if len(found) == 1 and not _why_no_cut(found[0], last)]


def _only_node(tracer: PathTracer, path: str) -> fx.Node:
    nodes = tracer.nodes(path)
    if len(nodes) != 1:
        raise ValueError(f"module {path!r} gives {len(nodes)} tensors in one forward pass, not 1")
    return nodes[0]


def _why_no_cut(first: fx.Node, last: fx.Node) -> str:
    """Why the network cannot be started at ``first``, up to ``last``; empty if it can."""
    seen: set[fx.Node] = set()
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [] if node is first else node.all_input_nodes
    if first is last or first not in seen:
        return "is not before"
    around = any(node.op == "placeholder" for node in seen - {first})
    return "is passed by a branch that leads to" if around else ""


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
    tracer = PathTracer()
    graph = tracer.trace(network.eval())
    order = {node: i for i, node in enumerate(graph.nodes)}
    single = {path: nodes[0] for path, nodes in tracer.outputs.items() if len(nodes) == 1 and path}
    return sorted(single, key=lambda path: (order[single[path]], -path.count(".")))


def tensor_names(network: nn.Module) -> Iterator[str]:
    """Names of its parameters and buffers, those that no state dict holds included."""
    yield from (name for name, _ in network.named_parameters())
    yield from (name for name, _ in network.named_buffers())
