"""``.safetensors``, with its metadata."""

import json
import struct
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from featurestore.checkpoints.formats.base import MOST_TENSORS, Stored, TensorFile, damaged, refuse_many
from featurestore.errors import FeatureStoreError

_LONGEST_HEADER = 8 << 20  # bytes


def recognises(head: bytes, path: Path) -> bool:
    """A length of 8 bytes that the file can hold, and a JSON object."""
    return len(head) > 9 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] < path.stat().st_size


def open_file(path: Path) -> TensorFile:
    """Its tensors by name, and its metadata."""
    try:
        with path.open("rb") as content:
            (length,) = struct.unpack("<Q", content.read(8))
        if length > _LONGEST_HEADER:
            raise damaged(path, f"its header has {length:,} bytes, more than {MOST_TENSORS:,} tensors need")
        file = safe_open(path, framework="pt")
        refuse_many(path, len(file.keys()))
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = dict(file.metadata() or {})
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise damaged(path, error) from None

    def read(key: str) -> torch.Tensor:
        try:
            tensor: torch.Tensor = file.get_tensor(key)
        except SafetensorError as error:
            raise FeatureStoreError(f"{path}: {key} cannot be read: {error}.") from None
        if tuple(tensor.shape) != shapes[key]:
            raise FeatureStoreError(
                f"{path}: {key} is said to have the shape {shapes[key]}, but is read as {tuple(tensor.shape)}: its numbers of "
                f"type {tensor.dtype} are packed. Save it as float32."
            )
        return tensor

    tensors = {key: Stored(shape, partial(read, key)) for key, shape in shapes.items()}
    return TensorFile(path, "safetensors", tensors, metadata)
