"""PyTorch's ``.pth`` and ``.pt`` (zipped, and the older kind), and ``.safetensors``."""

import json
import pickle
import re
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from featurestore.errors import FeatureStoreError
from featurestore.tensor_files import Stored, TensorFile, damaged, runs_code

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # under which training scripts keep a state dict


def open_pth(path: Path) -> TensorFile:
    """A state dict, alone or in a training script's checkpoint. Code in it is never run."""
    try:
        # weights_only: a checkpoint is a stranger's pickle, and a pickle can run code.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise runs_code(path, _asked_for(str(error))) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise damaged(path, error) from None
    tensors = unwrap(path, content, torch.Tensor)
    for key, value in tensors.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            # A few bytes, seen with stride 0, can pass for more numbers than there is memory.
            raise FeatureStoreError(
                f"{path} says that {key} has shape {tuple(value.shape)}, but does not hold as many numbers."
            )
    return TensorFile(
        path, "PyTorch", {key: Stored(tuple(value.shape), partial(_itself, value)) for key, value in tensors.items()}
    )


def _asked_for(message: str) -> str:
    """Torch names what it refused in the middle of its advice to load the file all the same."""
    named = re.search(r"GLOBAL ([\w.]+)|global ([\w.]+)", message)
    return f"it asks for {named[1] or named[2]}." if named else "it is no plain pickle of tensors."


def _itself(value: torch.Tensor) -> torch.Tensor:
    return value.detach()


def unwrap(path: Path, content: Any, kind: type) -> dict[str, Any]:
    """Names to values of ``kind``, out of a state dict or the checkpoint around one."""
    if isinstance(content, dict):
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not all(isinstance(value, kind) for value in content.values()):
        raise FeatureStoreError(f"{path} is not a state dict (keys to tensors) but a {type(content).__name__}.")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def open_safetensors(path: Path) -> TensorFile:
    """Safetensors, with its metadata."""
    try:
        file = safe_open(path, framework="pt")
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
        metadata = dict(file.metadata() or {})
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise damaged(path, error) from None
    tensors = {key: Stored(shape, partial(file.get_tensor, key)) for key, shape in shapes.items()}
    return TensorFile(path, "safetensors", tensors, metadata)
