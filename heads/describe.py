"""What a head looks like: tables, a summary, a drawing."""

import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import get_backbone
from featurestore.networks.summary import new_graph, times, write_graph
from heads.finetuning import FinetunedHead
from heads.models.base import Head
from heads.registry import HEADS, build_head
from heads.structure import LOGITS, Layer, structure


def layer_table(shapes: Mapping[str, tuple[int, ...]] | None = None) -> pd.DataFrame:
    """Every layer with the heads that fit it: shape of a row, features, KiB per item, width of the bridge, parameters.

    ``shapes`` by layer, such as ``{name: layer.shape for name, layer in store.layers.items()}``; VGG-Face's without.
    """
    if shapes is None:
        from featurestore.networks.shapes import layer_shapes  # builds a network, without storage

        shapes = layer_shapes(get_backbone("vggface"))
    rows = []
    for name, shape in shapes.items():
        conv, fc, similarity = (build_head(kind, shape) for kind in ("conv", "fc", "similarity"))
        rows.append(
            {
                "layer": name,
                "shape": "×".join(map(str, shape)),
                "features": conv.n_features,
                "KiB per item": conv.n_features * 4 / 1024,
                "bridge": 4096 if len(shape) > 1 else 300,
                "conv": _parameters(conv),
                "fc": _parameters(fc),
                "similarity (rank 64)": _parameters(similarity),
            }
        )
    return pd.DataFrame(rows).set_index("layer")


def summary(head: Head, n: int = 1) -> str:
    """The head's modules with output shapes, parameter counts and what is trained, for ``n`` examples, by torchinfo.

    Of a fine-tuned one also each block of the network up to its layer, trainable or frozen (``requires_grad``).
    """
    import torchinfo

    info = torchinfo.summary(
        head,
        input_data=_inputs(head, n),
        col_names=("input_size", "output_size", "kernel_size", "num_params", "trainable"),
        row_settings=("var_names", "depth"),
        device=_device(head),
        verbose=0,
        mode="eval",
    )
    return f"{info}\n{_blocks_text(head)}" if isinstance(head, FinetunedHead) else str(info)


def _blocks_text(head: FinetunedHead) -> str:
    """Every block of the network up to the head's layer."""
    table = pd.DataFrame(
        {
            "block": [block.name for block in head.blocks],
            "parameters": [f"{block.parameters:,}" for block in head.blocks],
            "requires_grad": [block.trainable for block in head.blocks],
        }
    )
    title = f"{head.part.backbone} up to {head.part.end}, fine-tuned from {head.part.start}:"
    return f"{title}\n{table.to_string(index=False)}"


def draw(head: Head, path: str | os.PathLike[str]) -> Path:
    """A drawing of the head's layers with their shapes and parameters, SVG or PNG by the file's ending, by Graphviz.

    FeatureStoreError for what is no head, for another ending, or if Graphviz is not installed.
    """
    if not isinstance(head, Head):
        raise FeatureStoreError(
            f"{type(head).__name__} is no head, which is what is drawn here. A backbone is drawn by its name: "
            "featurestore.draw_backbone('vggface', 'vggface.svg')."
        )
    graph = new_graph(path, "a head")
    parts = structure(head)
    name = head.architecture.get("head", type(head).__name__)
    graph.graph_attr["label"] = (
        f"{name} on {times(head.shape)}: {_parameters(head):,} parameters\n{HEADS.get(name, '')}\n "
    )
    for each in parts.inputs:
        graph.add_node(each, label=f"{each}\n{times(head.shape)}", fillcolor="white")
    for each, layer in parts.layers.items():
        graph.add_node(each, label=f"{each}: {', '.join([layer.kind, *layer.then])}\n{_facts(layer, parts.inputs)}")
    graph.add_node(LOGITS, label=f"logits\n{parts.classes}", fillcolor="white")
    for number, (source, target) in enumerate(parts.edges):
        graph.add_edge(source, target, key=number)
    return write_graph(graph, path)


def _facts(layer: Layer, inputs: list[str]) -> str:
    """The second line of a layer: shapes, parameters, who shares it."""
    shapes = f"{times(layer.shape_in)} → {times(layer.shape_out)}" if layer.shape_out else ""
    kept = ", ".join(f"{name} {times(shape)}".strip() for name, shape in layer.tensors.items()) if not shapes else ""
    numbers = f"{layer.parameters:,} parameters" if layer.parameters else "not trained"
    shared = f"shared by {', '.join(inputs)}" if layer.uses == len(inputs) > 1 and layer.parameters else ""
    return "; ".join(filter(None, (shapes, kept, numbers, shared)))


def _inputs(head: Head, n: int) -> list[torch.Tensor]:
    return [torch.zeros((n, *head.shape), device=_device(head)) for _ in range(head.n_places)]


def _device(head: Head) -> str:
    tensor = next(iter(head.state_dict().values()), None)
    return str(tensor.device.type) if tensor is not None else "cpu"


def _parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
