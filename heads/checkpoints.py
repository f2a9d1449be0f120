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
from safetensors import SafetensorError
from safetensors.torch import save_file

from featurestore.checkpoints.fitting import compare_keys
from featurestore.checkpoints.formats.base import Stored
from featurestore.checkpoints.reader import open_tensors
from featurestore.errors import FeatureStoreError
from featurestore.files import replacing
from heads.finetuning import FinetunedHead, described_part, part_from_file, unloaded_finetuned_head
from heads.models.base import Head
from heads.published import head_tensors, published_head
from heads.registry import HEADS, build_head, options_from_file, stored_options

FORMAT = "face-featurestore-head"
_MOST_AXES = 8  # of a row


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A safetensors file that is there whole or not at all. FeatureStoreError if it cannot be written (a full disk)."""
    try:
        with replacing(path) as partial:
            save_file({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, partial, metadata)
    except (OSError, SafetensorError) as error:
        raise FeatureStoreError(
            f"{path} could not be written: {error}. If the disk is full, free some space and run the same command again: "
            "it resumes from the last checkpoint."
        ) from None


def save_head(head: Head, path: Path, layer: str, **about: Any) -> None:
    """``head`` as safetensors with its architecture, its layer and ``about`` (anything JSON) as metadata.

    Of a fine-tuned one with the part of the backbone, too, and which it is.
    """
    document = {"layer": layer, "architecture": stored_options(head.architecture), **about}
    if isinstance(head, FinetunedHead):
        document["finetuned"] = described_part(head.part)
    metadata = {"format": FORMAT, "format_version": "1", "head": json.dumps(document, sort_keys=True)}
    write_tensors(path, head.state_dict(), metadata)


def load_head(
    path: str | os.PathLike[str],
    layer: str,
    shape: tuple[int, ...] | None = None,
    ignore_backbone: bool = False,
    faces: Sequence[str] | None = None,
    backbone: str | None = None,
) -> Head:
    """A trained head from our ``weights.safetensors`` or a published ``.pth``, in eval mode, float32, on the CPU.

    ``layer`` is the one whose rows it takes. ``shape`` of a row is needed only for layers that are not VGG-Face's and not
    in the file. A file with the backbone's weights in it (trained end to end, multi-view) needs ``ignore_backbone``,
    which says that the cached rows come from that very backbone. A published multi-view file does not name its
    ``faces``; without them they are called class-1, class-2 …. A fine-tuned run's head is given alone for its own ``layer``
    with ``ignore_backbone``, or for the layer that it was fine-tuned from (or ``input``) with its part of the network, of which
    ``backbone`` names one of your own, whose code is then imported. Raises FeatureStoreError for another layer, and for
    keys that are missing, unexpected or of another shape, by name. A checkpoint cannot run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FeatureStoreError(f"there is no checkpoint {path}.")
    file = open_tensors(path)
    document, tensors = _described(path, file.metadata), file.tensors
    if document is not None:
        if "finetuned" in document:
            head, tensors = _finetuned_head(path, document, tensors, layer, ignore_backbone, backbone)
        else:
            head = _described_head(path, document, layer, shape)
        head.trained_on = {"layer": layer, "sources": [] if ignore_backbone else document.get("sources", [])}
        names = {key: key for key in head.state_dict()}
    else:
        tensors = head_tensors(path, tensors, ignore_backbone)
        head, names = published_head(path, tensors, layer, shape, faces)
    found = {key: stored.shape for key, stored in tensors.items()}
    problems = compare_keys(found, {theirs: tuple(head.state_dict()[key].shape) for key, theirs in names.items()})
    if problems:
        raise FeatureStoreError(
            f"{path} does not fit a head on layer {layer!r}. {problems}. Was it trained on another layer?"
        )
    return _with_weights(head, {key: tensors[theirs] for key, theirs in names.items()})


def _described_head(path: Path, document: dict[str, Any], layer: str, shape: tuple[int, ...] | None) -> Head:
    """The head that our own file says it is of."""
    if document["layer"] != layer:
        raise FeatureStoreError(f"{path} was trained on layer {document['layer']!r}, not on {layer!r}.")
    options = dict(document["architecture"])
    trained_on = tuple(options.pop("shape"))
    if shape is not None and tuple(shape) != trained_on:
        raise FeatureStoreError(f"{path} takes rows of {trained_on}; those of {layer!r} given here are {tuple(shape)}.")
    try:
        return build_head(options.pop("head"), trained_on, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise FeatureStoreError(f"{path} says that it is a head, but not a possible one: {error}") from None


def _finetuned_head(
    path: Path,
    document: dict[str, Any],
    tensors: Mapping[str, Stored],
    layer: str,
    ignore_backbone: bool,
    backbone: str | None,
) -> tuple[Head, dict[str, Stored]]:
    """A fine-tuned head with its part of the network, or alone, and the tensors that it needs."""
    try:
        part = part_from_file(document["finetuned"])
    except (KeyError, ValueError, TypeError, OverflowError):
        raise FeatureStoreError(f"{path} says that it is fine-tuned, but not how: its metadata is damaged.") from None
    if layer not in (part.start, part.end):
        raise FeatureStoreError(
            f"{path} was fine-tuned from {part.start!r} on layer {part.end!r}; it takes no rows of {layer!r}."
        )
    inner = _described_head(path, document, part.end, None)
    if layer == part.start:
        return unloaded_finetuned_head(part, inner, backbone), dict(tensors)
    if not ignore_backbone:
        raise FeatureStoreError(
            f"{path} was fine-tuned, so its head fits the rows of {layer!r} that its own backbone gives. Cache these with "
            f"`weights` {path.parent}, then load it with `ignore_backbone`=True; or load it with its part of the network, for "
            f"rows of {part.start!r}: `layer`={part.start!r}."
        )
    return inner, {key.removeprefix("head."): stored for key, stored in tensors.items() if key.startswith("head.")}


def _with_weights(head: Head, tensors: Mapping[str, Stored]) -> Head:
    """``head`` with weights in place; a published one takes rows as they are, so its standardisation does nothing."""
    head = head.to_empty(device="cpu")
    for buffer, neutral in (("mean", 0.0), ("scale", 1.0)):
        if not isinstance(head, FinetunedHead) and hasattr(head, buffer) and buffer not in tensors:
            getattr(head, buffer).fill_(neutral)
    head.load_state_dict({key: stored.read().to(torch.float32) for key, stored in tensors.items()}, strict=False)
    return head.eval()


def _described(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """What our own file says of itself; None for any other file."""
    if metadata.get("format") != FORMAT:
        return None
    if metadata.get("format_version") != "1":
        raise FeatureStoreError(
            f"{path} is a head of format version {metadata.get('format_version')}; this program reads version 1."
        )
    try:
        document: dict[str, Any] = json.loads(metadata["head"])
        architecture = document["architecture"] = options_from_file(document["architecture"])
        shape = architecture["shape"]
        sound = isinstance(shape, list) and all(type(side) is int and 0 < side < 1 << 31 for side in shape)
        sound = sound and len(shape) <= _MOST_AXES and architecture["head"] in HEADS
        if sound and isinstance(document["layer"], str):
            return document
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        pass
    raise FeatureStoreError(f"{path} says that it is a head, but not which: its metadata is damaged.")
