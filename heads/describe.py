"""What a head looks like: tables, a summary, a drawing."""

import os
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import get_backbone
from heads.models.base import Head
from heads.registry import build_head


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
    """The head's modules with output shapes and parameter counts for ``n`` examples, by torchinfo."""
    import torchinfo

    info = torchinfo.summary(
        head,
        input_data=_inputs(head, n),
        col_names=("input_size", "output_size", "kernel_size", "num_params"),
        row_settings=("var_names", "depth"),
        device=_device(head),
        verbose=0,
        mode="eval",
    )
    return str(info)


def draw(head: Head, path: str | os.PathLike[str]) -> Path:
    """A drawing of the head, SVG or PNG by the file's ending, traced by torchview and laid out by Graphviz.

    FeatureStoreError for another ending, or if these two are not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in (".svg", ".png"):
        raise FeatureStoreError(f"a head is drawn as .svg or .png, not as {path.name!r}.")
    try:
        import pygraphviz
        import torchview
    except ImportError as error:
        raise FeatureStoreError(
            f"drawing needs torchview and pygraphviz ({error}): pip install 'face-featurestore[draw]'."
        ) from None

    graph = torchview.draw_graph(
        head,
        input_data=_inputs(head, 1),
        device=_device(head),
        expand_nested=True,
        graph_dir="TB",
        graph_name=str(head.architecture.get("head", "head")),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing = pygraphviz.AGraph(graph.visual_graph.source)
    drawing.draw(str(path), prog="dot")
    return path


def _inputs(head: Head, n: int) -> list[torch.Tensor]:
    return [torch.zeros((n, *head.shape), device=_device(head)) for _ in range(head.n_places)]


def _device(head: Head) -> str:
    tensor = next(iter(head.state_dict().values()), None)
    return str(tensor.device.type) if tensor is not None else "cpu"


def _parameters(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
