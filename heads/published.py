"""The published heads' ``.pth`` files: their keys, the heads they are of, and writing one."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from featurestore.caching.extractor import refuse_absent
from featurestore.checkpoints.formats.base import Stored
from featurestore.checkpoints.weights import open_weights
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import get_backbone
from featurestore.networks.shapes import layer_shapes
from featurestore.networks.tracing import extractor
from featurestore.text import listing
from heads.finetuning import FinetunedHead
from heads.models.base import Head
from heads.models.triplet import TripletHead
from heads.registry import build_head

_BACKBONE = "vgg_core."  # begins the backbone's own weights, in checkpoints trained end to end and in multi-view ones
_EARLIER = "vgg_core_fc8."  # begins those of the earlier system's bridge


def export(head: Head, path: str | os.PathLike[str], layer: str, core: str | os.PathLike[str] | None = None) -> None:
    """Write ``head`` as a ``.pth`` state dict with the published keys, so that the published code loads it.

    The published heads take raw rows and name no faces, so the standardisation is folded into the first linear
    layer, and the order of an identity head's ``faces`` has to be kept by you. FeatureStoreError
    for heads that the published system does not have (similarity), and for layers of other networks.

    With ``core``, the folder of a fine-tuned run or a checkpoint of VGG-Face, the file holds the backbone up to ``layer`` as
    well, as those trained end to end and the multi-view ones do. Of a fine-tuned ``head`` its own part is written over it.
    """
    tuned: Mapping[str, torch.Tensor] = {}
    if isinstance(head, FinetunedHead):
        if layer != head.part.end:
            raise FeatureStoreError(f"this head was fine-tuned on layer {head.part.end!r}, not on {layer!r}.")
        tuned = head.backbone.state_dict()
        head = head.head
    backbone = {} if core is None else _core(str(core), layer, tuned, is_triplet=isinstance(head, TripletHead))
    state = {key: value.detach().cpu().clone() for key, value in head.state_dict().items()}
    names = published_keys(head, layer, earlier=str(head.architecture["head"]).startswith("fc8-"))
    for first in [key.removesuffix(".weight") for key in state if key.endswith("linear.weight")]:
        state[f"{first}.weight"] *= state["scale"]
        state[f"{first}.bias"] -= state[f"{first}.weight"] @ state["mean"]
    torch.save({**backbone, **{theirs: state[key] for key, theirs in names.items()}}, path)


def _core(core: str, layer: str, tuned: Mapping[str, torch.Tensor], is_triplet: bool) -> dict[str, torch.Tensor]:
    """VGG-Face's weights under the published keys: all convolutions, and the linear layers up to ``layer``."""
    spec = get_backbone("vggface")
    (layer,) = spec.check_layers([layer])
    weights = open_weights(core, spec)
    refuse_absent(weights.backbone, [layer], weights)
    needed = set(extractor(spec.build_meta(), {layer: spec.layers[layer]}).state_dict())
    keys = [key for key in weights.backbone.weight_shapes() if key.startswith("features.") or key in needed]
    state = {**weights.read(keys), **{key: values.detach().cpu() for key, values in tuned.items()}}
    prefix = _BACKBONE * 2 if is_triplet else _BACKBONE
    return {prefix + key: state[key].clone(memory_format=torch.contiguous_format) for key in keys}


def published_keys(head: Head, layer: str, earlier: bool = False) -> dict[str, str]:
    """Our state-dict keys to the published ones, which number a head's layers on from the block of ``layer``."""
    block = 0
    if isinstance(head, TripletHead):
        block = 7 if earlier else _block(layer)
    modules = head.published_modules(block, earlier)
    return {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in modules.items() for leaf in ("weight", "bias")}


def head_tensors(path: Path, tensors: Mapping[str, Stored], ignore_backbone: bool) -> dict[str, Stored]:
    """A file's tensors without its backbone's; FeatureStoreError if it holds one and that is not said to be known."""
    backbone = [key for key in tensors if key.startswith(_BACKBONE)]
    if backbone and not ignore_backbone:
        raise FeatureStoreError(
            f"{path} holds its own backbone ({len(backbone)} keys, {backbone[0]} …): its head fits the features of that one. "
            "Cache layers from this file, then load the head with `ignore_backbone`=True."
        )
    return {key: stored for key, stored in tensors.items() if key not in backbone}


def published_head(
    path: Path,
    tensors: Mapping[str, Stored],
    layer: str,
    shape: tuple[int, ...] | None,
    faces: Sequence[str] | None,
) -> tuple[Head, dict[str, str]]:
    """The head that a published file is of, on rows of ``layer``, and our keys to the file's."""
    found = {key: stored.shape for key, stored in tensors.items()}
    head = _recognised_head(path, found, tuple(shape) if shape else _layer_shape(layer), faces)
    return head, published_keys(head, layer, earlier=any(key.startswith(_EARLIER) for key in found))


def _recognised_head(
    path: Path, found: Mapping[str, tuple[int, ...]], shape: tuple[int, ...], faces: Sequence[str] | None
) -> Head:
    """The head that a published file is of, recognised by its keys."""
    if "decision_layer.fc_d.weight" in found:
        n = found["decision_layer.fc_d.weight"][0]
        if faces is not None and len(faces) != n:
            raise FeatureStoreError(f"{path} has {n} classes; {len(faces)} faces were named.")
        return build_head("identity", shape, faces=list(faces or (f"class-{i + 1}" for i in range(n))))
    conv = any(key.startswith("decision_block.conv_d_") for key in found)
    if any(key.startswith(_EARLIER) for key in found):
        return build_head("fc8-conv" if conv else "fc8-fc", shape)
    if any(key.startswith("vgg_core_bridge.") for key in found):
        parallel = any(key.startswith("vgg_core_bridge.bridge1.") for key in found)
        return build_head("conv" if conv else "fc", shape, parallel=parallel)
    raise FeatureStoreError(
        f"{path} is no checkpoint of a head: it has none of vgg_core_bridge.*, vgg_core_fc8.*, decision_layer.fc_d.*; its "
        f"keys are {listing(found, 4)}."
    )


def _layer_shape(layer: str) -> tuple[int, ...]:
    backbone = get_backbone("vggface")
    backbone.check_layers([layer])
    return layer_shapes(backbone)[layer]


def _block(layer: str) -> int:
    """The published number of a VGG-Face layer's block: 1 … 5 for convolutions, then 6 and 7 for fc6 and fc7."""
    backbone = get_backbone("vggface")
    backbone.check_layers([layer])
    if layer in ("fc8", "descriptor"):
        raise FeatureStoreError(f"the published system has no head on {layer}, so there are no keys for one.")
    block = 1
    for name in backbone.layers:
        if name == layer or name.startswith("fc"):
            break
        block += name.startswith("maxp_")
    if layer.startswith("fc"):
        return 6 if layer.startswith("fc6") else 7
    return block
