"""Heads in files: ours (safetensors, which say what they are) and the published ``.pth`` (which do not).

A published checkpoint does not say which layer it was cut at (fc7, fc7-relu and fc7-dropout share all keys), so
the layer is always given.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from featurestore.checkpoints.fitting import compare_keys
from featurestore.checkpoints.reader import open_tensors
from featurestore.errors import FeatureStoreError
from featurestore.files import replacing
from featurestore.networks.registry import get_backbone
from featurestore.text import listing
from heads.models.triplet import BUILDERS, ConvDecision, FcDecision, Head, IdentityHead, TripletHead, build_head

FORMAT = "face-featurestore-head"
_CORE = ("vgg_core.",)  # the backbone's own weights, in checkpoints trained end to end and in multi-view ones


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file that is there whole or not at all. FeatureStoreError if it cannot be written (a full disk)."""
    try:
        with replacing(path) as partial:
            save_file({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, partial, metadata)
    except (OSError, SafetensorError) as error:
        raise FeatureStoreError(
            f"{path} could not be written: {error}. If the disk is full, free some space and run the same command again: "
            "it goes on from the last checkpoint."
        ) from None


def save_head(head: Head, path: Path, layer: str, **about: Any) -> None:
    """``head`` as safetensors with its architecture, its layer and ``about`` (anything JSON) as metadata."""
    document = {"layer": layer, "architecture": head.architecture, **about}
    metadata = {"format": FORMAT, "format_version": "1", "head": json.dumps(document, sort_keys=True)}
    write_tensors(path, head.state_dict(), metadata)


def load_head(
    path: str | os.PathLike,
    layer: str,
    shape: tuple[int, ...] | None = None,
    ignore_backbone: bool = False,
    faces: Sequence[str] | None = None,
) -> Head:
    """A trained head from our ``weights.safetensors`` or a published ``.pth``, in eval mode, float32, on the CPU.

    ``layer`` is the one whose rows it takes. ``shape`` of a row is needed only for layers that are not VGG-Face's and not
    in the file. A file with the backbone's weights in it (trained end to end, multi-view) needs ``ignore_backbone``,
    which says that the cached rows come from that very backbone. A published multi-view file does not name its
    ``faces``; without them they are called class-1, class-2 …. Raises FeatureStoreError for another layer, and for
    keys that are missing, unexpected or of another shape, by name. A checkpoint cannot run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FeatureStoreError(f"there is no checkpoint {path}.")
    ours = _read_metadata(path)
    file = open_tensors(path)
    found = file.shapes
    if ours is not None:
        if ours["layer"] != layer:
            raise FeatureStoreError(f"{path} was trained on layer {ours['layer']!r}, not on {layer!r}.")
        architecture = dict(ours["architecture"])
        trained_on = tuple(architecture.pop("shape"))
        if shape is not None and tuple(shape) != trained_on:
            raise FeatureStoreError(
                f"{path} takes rows of {trained_on}; those of {layer!r} given here are {tuple(shape)}."
            )
        try:
            head = build_head(architecture.pop("head"), trained_on, **architecture)
        except (TypeError, ValueError, RuntimeError) as error:
            raise FeatureStoreError(f"{path} says that it is a head, but not a possible one: {error}") from None
        names = {key: key for key in head.state_dict()}
    else:
        core = [key for key in found if key.startswith(_CORE)]
        if core and not ignore_backbone:
            raise FeatureStoreError(
                f"{path} holds its own backbone ({len(core)} keys, {core[0]} …): its head fits the features of that one. Cache "
                "layers from this file, then load the head with ignore_backbone=True."
            )
        found = {key: value for key, value in found.items() if key not in core}
        head = _published_head(path, found, tuple(shape) if shape else _layer_shape(layer), faces)
        names = published_keys(head, layer, earlier=any(key.startswith("vgg_core_fc8.") for key in found))
    problems = compare_keys(found, {theirs: tuple(head.state_dict()[key].shape) for key, theirs in names.items()})
    if problems:
        raise FeatureStoreError(
            f"{path} does not fit a head on layer {layer!r}. {problems}. Was it trained on another layer?"
        )
    state = {key: file.tensors[theirs].read().to(torch.float32) for key, theirs in names.items()}
    head = head.to_empty(device="cpu")
    for buffer in ("mean", "scale"):
        if hasattr(head, buffer) and buffer not in state:
            getattr(head, buffer).fill_(1.0 if buffer == "scale" else 0.0)
    head.load_state_dict(state, strict=False)
    return head.eval()


def export(head: Head, path: str | os.PathLike, layer: str) -> None:
    """Write ``head`` as a ``.pth`` state dict with the published keys, so that the published code loads it.

    The published heads take raw rows and name no faces, so the standardisation is folded into the first linear
    layer, and the order of an identity head's ``faces`` has to be kept by you. FeatureStoreError
    for heads that the published system does not have (similarity), and for layers of other networks.
    """
    state = {key: value.detach().cpu().clone() for key, value in head.state_dict().items()}
    names = published_keys(head, layer, earlier=str(head.architecture["head"]).startswith("fc8-"))
    for first in [key.removesuffix(".weight") for key in state if key.endswith("linear.weight")]:
        state[f"{first}.weight"] *= state["scale"]
        state[f"{first}.bias"] -= state[f"{first}.weight"] @ state["mean"]
    torch.save({theirs: state[key] for key, theirs in names.items()}, path)


def published_keys(head: Head, layer: str, earlier: bool = False) -> dict[str, str]:
    """Our state-dict keys to the published ones, which number a head's layers on from the block of ``layer``."""
    if isinstance(head, IdentityHead):
        return {f"linear.{leaf}": f"decision_layer.fc_d.{leaf}" for leaf in ("weight", "bias")}
    if not isinstance(head, TripletHead):
        raise FeatureStoreError(
            f"the published system has no {head.architecture.get('head')} head, so there are no keys to write it under. "
            "Its weights.safetensors can be loaded with load_head."
        )
    block = 7 if earlier else _block(layer)
    core = "vgg_core_fc8" if earlier else "vgg_core_bridge"
    parallel = len(head.bridges) == 3
    modules = {
        f"bridges.{i}.linear": f"{core}.{f'bridge{i + 1}.' if parallel else ''}fc{block + 1}"
        for i in range(len(head.bridges))
    }
    decision = head.decision
    if isinstance(decision, ConvDecision):
        places = [i for i, module in enumerate(decision) if isinstance(module, torch.nn.Conv2d)]
        for number, i in enumerate(places, start=1):
            last = number == len(places)
            modules[f"decision.{i}"] = (
                f"decision_block.conv_d_{block + 3}_1" if last else f"decision_block.conv_d_{block + 2}_{number}"
            )
    elif isinstance(decision, FcDecision) and decision.hidden is not None:
        modules |= {
            "decision.hidden": f"decision_block.fc_d_{block + 2}",
            "decision.last": f"decision_block.fc_d_{block + 3}",
        }
    else:
        modules["decision.last"] = f"decision_block.fc_d_{block + 2}"
    return {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in modules.items() for leaf in ("weight", "bias")}


def _published_head(
    path: Path, found: Mapping[str, tuple[int, ...]], shape: tuple[int, ...], faces: Sequence[str] | None
) -> Head:
    """The head that a published file is of, told by its keys."""
    if "decision_layer.fc_d.weight" in found:
        n = found["decision_layer.fc_d.weight"][0]
        if faces is not None and len(faces) != n:
            raise FeatureStoreError(f"{path} tells {n} faces apart; {len(faces)} names were given.")
        return build_head("identity", shape, faces=list(faces or (f"class-{i + 1}" for i in range(n))))
    conv = any(key.startswith("decision_block.conv_d_") for key in found)
    if any(key.startswith("vgg_core_fc8.") for key in found):
        return build_head("fc8-conv" if conv else "fc8-fc", shape)
    if any(key.startswith("vgg_core_bridge.") for key in found):
        parallel = any(key.startswith("vgg_core_bridge.bridge1.") for key in found)
        return build_head("conv" if conv else "fc", shape, parallel=parallel)
    raise FeatureStoreError(
        f"{path} is no checkpoint of a head: it has none of vgg_core_bridge.*, vgg_core_fc8.*, decision_layer.fc_d.*; its "
        f"keys are {listing(found, 4)}."
    )


def _read_metadata(path: Path) -> dict[str, Any] | None:
    """What our own file says of itself; None for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError):
        return None
    if metadata.get("format") != FORMAT:
        return None
    if metadata.get("format_version") != "1":
        raise FeatureStoreError(
            f"{path} is a head of format version {metadata.get('format_version')}; this program reads version 1."
        )
    try:
        document = json.loads(metadata["head"])
        architecture = document["architecture"]
        sound = architecture["head"] in BUILDERS and all(0 < int(side) < 1 << 31 for side in architecture["shape"])
        if sound and isinstance(document["layer"], str):
            return document
    except (KeyError, ValueError, TypeError):
        pass
    raise FeatureStoreError(f"{path} says that it is a head, but not which: its metadata is damaged.")


def _layer_shape(layer: str) -> tuple[int, ...]:
    from featurestore.networks.shapes import layer_shapes

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
