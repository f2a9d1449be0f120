"""What a network is made of: its layers with shapes and parameters, and a drawing. No weights are read or made."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import get_backbone, get_recipe
from featurestore.networks.spec import BackboneSpec
from featurestore.text import human_bytes

if TYPE_CHECKING:
    from torch import nn

_FONT = {"fontname": "Helvetica", "fontsize": 12}


@dataclass(frozen=True)
class LayerSummary:
    """A layer: shape of one image's output, and parameters of its module, those of the modules within it included."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class BackboneSummary:
    """A network's ``layers``, in the order of computation, and how many ``parameters`` it has in all.

    Layers contain one another (a stage its blocks), so that theirs do not add up to the total. ``size`` is the side of the
    input in pixels, ``recipe`` the preprocessing.
    """

    name: str
    layers: tuple[LayerSummary, ...]
    parameters: int
    size: int
    recipe: str

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers) if self.layers else 0
        width = max(width, len("layer"))
        lines = [f"{'layer':<{width}} {'shape':<14} bytes per image (float32) {'parameters':>13}"]
        sizes = [4 * math.prod(layer.shape) for layer in self.layers]
        shown = [("×".join(map(str, layer.shape)), layer.parameters or "") for layer in self.layers]
        rows = [(layer.name, *each) for layer, each in zip(self.layers, shown, strict=True)]
        rows.append((f"{len(self.layers)} layers", "", self.parameters))
        for (name, shape, parameters), nbytes in zip(rows, [*sizes, sum(sizes)], strict=True):
            count = f"{parameters:,}" if parameters else ""
            lines.append(f"{name:<{width}} {shape:<14} {nbytes:>13,}  {human_bytes(nbytes):>10} {count:>13}".rstrip())
        lines.append(f"\nInput: {self.size} × {self.size} pixels, recipe {self.recipe}.")
        return "\n".join(lines)


def backbone_summary(backbone: str, recipe: str | None = None) -> BackboneSummary:
    """The layers of the network of that name with ``recipe`` (its own by default); see ``registry.get_backbone``.

    Raises FeatureStoreError for an unknown network or recipe, and for a recipe of another size.
    """
    from featurestore.networks.shapes import layer_shapes, with_input_size

    spec = get_backbone(backbone)
    chosen = get_recipe(recipe) if recipe else spec.default_recipe()
    spec = with_input_size(spec, chosen.size)
    network = spec.build_meta()
    modules = dict(network.named_modules())
    layers = [
        LayerSummary(name, _kind(modules.get(spec.layers[name])), shape, _parameters(modules.get(spec.layers[name])))
        for name, shape in layer_shapes(spec).items()
    ]
    return BackboneSummary(spec.name, tuple(layers), _parameters(network), spec.input_size or chosen.size, chosen.name)


def draw_backbone(backbone: str, path: str | os.PathLike[str], recipe: str | None = None) -> Path:
    """A drawing of the network's layers with shapes and parameters, SVG or PNG by the file's ending, by Graphviz.

    Layers whose output is one tensor (a stage and its last block) share a box. An arrow leads from a layer to those that use
    its output, or what operations without a name make of it. Raises FeatureStoreError as ``backbone_summary``, for another
    ending, for a network that torch.fx cannot trace, and if Graphviz is not installed.
    """
    graph = new_graph(path, "a network")
    summary = backbone_summary(backbone, recipe)
    spec = get_backbone(backbone)
    by_name = {layer.name: layer for layer in summary.layers}
    graph.graph_attr["label"] = f"{summary.name}: {summary.parameters:,} parameters\n "
    graph.add_node("input", label=f"input\n{times((3, summary.size, summary.size))}", fillcolor="white")
    boxes, edges = _boxes(spec, list(by_name))
    for box, names in boxes.items():
        layers = [by_name[name] for name in names]
        counts = f"; {layers[-1].parameters:,} parameters" if layers[-1].parameters else ""
        kinds = ", ".join(dict.fromkeys(layer.kind for layer in layers))
        graph.add_node(box, label=f"{' = '.join(names)}: {kinds}\n{times(layers[0].shape)}{counts}")
    for source, target in edges:
        graph.add_edge(source, target)
    return write_graph(graph, path)


def _boxes(spec: BackboneSpec, names: list[str]) -> tuple[dict[str, list[str]], list[tuple[str, str]]]:
    """Layers by the tensor that they name (its first name, ``input`` for the pictures), and the edges between those."""
    from featurestore.networks.tracing import PathTracer

    tracer = PathTracer()
    try:
        graph = tracer.trace(spec.build_meta().eval())
    except Exception as error:  # torch.fx raises many types, and the network may be the user's
        raise FeatureStoreError(f"{spec.name} cannot be traced by torch.fx, so it cannot be drawn: {error}.") from error
    named: dict[Any, list[str]] = {}
    for name in names:
        for node in tracer.outputs.get(spec.layers[name], [])[:1]:
            named.setdefault(node, []).append(name)
    made: dict[Any, dict[str, None]] = {}  # the layers that a node's value comes from
    edges: dict[tuple[str, str], None] = {}
    for node in graph.nodes:
        sources = dict.fromkeys(source for given in node.all_input_nodes for source in made[given])
        made[node] = dict.fromkeys(["input"]) if node.op == "placeholder" else sources
        if node in named:
            box = named[node][0]
            edges |= {(source, box): None for source in sources}
            made[node] = {box: None}
    return {each[0]: each for each in named.values()}, list(edges)


def new_graph(path: str | os.PathLike[str], what: str) -> Any:
    """An empty graph in the style of all drawings; FeatureStoreError if Graphviz, or the ending of ``path``, is not there."""
    if Path(path).suffix.lower() not in (".svg", ".png"):
        raise FeatureStoreError(f"{what} is drawn as .svg or .png, not as {Path(path).name!r}.")
    try:
        import pygraphviz
    except ImportError as error:
        raise FeatureStoreError(f"drawing needs pygraphviz ({error}): pip install 'face-featurestore[draw]'.") from None
    graph = pygraphviz.AGraph(directed=True, strict=False, labelloc="t", ranksep=0.2, **_FONT)
    graph.node_attr.update(
        shape="box", margin="0.15,0.04", style="filled,rounded", fillcolor="#e8eef7", color="#5b7083", **_FONT
    )
    graph.edge_attr.update(color="#5b7083", arrowsize=0.6)
    return graph


def write_graph(graph: Any, path: str | os.PathLike[str]) -> Path:
    """The graph laid out and written."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    graph.draw(str(path), prog="dot")
    return path


def times(shape: tuple[int, ...]) -> str:
    """``512×7×7``."""
    return "×".join(f"{n:,}" for n in shape)


def _kind(module: "nn.Module | None") -> str:
    return "" if module is None else type(module).__name__


def _parameters(module: "nn.Module | None") -> int:
    return 0 if module is None else sum(weight.numel() for weight in module.parameters())
