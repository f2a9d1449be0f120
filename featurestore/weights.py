"""Read checkpoint files without trusting them, and draw seeded random weights.

Every weight has its published state-dict key; what a file holds is compared with what the network needs
before anything is computed.
"""

import hashlib
import json
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from featurestore.errors import FeatureStoreError, listing

Shapes = Mapping[str, tuple[int, ...]]

_DRAW = 1 << 22  # values drawn at a time, to bound the float64 scratch


@dataclass(frozen=True)
class Weights:
    """Weights that fit a network. ``identity`` is ``seed:N`` or the file's sha256 (hex): what names a source.

    ``read(keys)`` gives float32 CPU tensors by state-dict key, only those asked for.
    """

    name: str
    identity: str
    read: Callable[[Iterable[str]], dict[str, torch.Tensor]]
    absent: frozenset[str] = frozenset()

    @property
    def random(self) -> bool:
        """Whether these are drawn numbers rather than a trained network's."""
        return self.identity.startswith("seed:")


def open_weights(spec: str, shapes: Shapes) -> Weights:
    """Weights from ``random:SEED`` or a ``.pth`` / ``.safetensors`` file (told apart by content), checked against ``shapes``.

    Raises FeatureStoreError for a missing file, an unreadable or unsafe one, and for missing, unexpected or
    differently shaped keys.
    """
    kind, _, seed = spec.partition(":")
    if kind == "random":
        if not seed.isdecimal():
            raise FeatureStoreError(f"--weights {spec!r}: the seed must be a whole number, such as random:0.")
        return Weights(f"random:{int(seed)}", f"seed:{int(seed)}", lambda keys: draw(int(seed), keys, shapes))
    path = Path(spec).expanduser()
    if not path.is_file():
        raise FeatureStoreError(
            f"there is no weights file {path}. Give --weights a .pth or .safetensors file, or random:SEED for "
            "seeded random weights (fit for trying things out, not for results)."
        )
    found, read = open_tensors(path)
    rename = _key_names(found, shapes)
    absent = _check_keys(path, {rename[key]: shape for key, shape in found.items()}, shapes)
    in_file = {ours: theirs for theirs, ours in rename.items()}

    def read_named(keys: Iterable[str]) -> dict[str, torch.Tensor]:
        return {key: read(in_file[key]).to(torch.float32) for key in keys}

    return Weights(path.name, _sha256(path), read_named, absent)


def draw(seed: int, keys: Iterable[str], shapes: Shapes) -> dict[str, torch.Tensor]:
    """Random float32 weights that depend on (seed, key, shape) alone, so on no machine, order or torch version.

    He-scaled normal weights, small normal biases, batch-norm statistics near the identity; drawn in float64 by
    ``numpy.random.default_rng(crc32("seed:key"))``, scaled, then cast.
    """
    return {key: torch.from_numpy(_draw_one(seed, key, shapes)) for key in keys}


def _draw_one(seed: int, key: str, shapes: Shapes) -> np.ndarray:
    shape = shapes[key]
    module, _, leaf = key.rpartition(".")
    rng = np.random.default_rng(zlib.crc32(f"{seed}:{key}".encode()))
    if leaf == "num_batches_tracked":
        return np.array(1, np.int64)
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        return rng.uniform(0.5, 1.5, shape).astype(np.float32)
    if leaf == "weight":
        std = math.sqrt(2 / math.prod(shape[1:]))
    else:
        batch_norm = f"{module}.running_mean" in shapes
        std = 0.1 if batch_norm else 0.05
    values = np.empty(math.prod(shape), np.float32)
    for start in range(0, values.size, _DRAW):
        stop = min(start + _DRAW, values.size)
        values[start:stop] = rng.standard_normal(stop - start) * std
    return values.reshape(shape)


def open_tensors(path: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    """Shapes by key of a ``.pth`` or ``.safetensors`` file (told apart by content), and a function that reads one tensor.

    FeatureStoreError for any other file, a damaged one, or one that holds more than tensors.
    """
    with path.open("rb") as file:
        head = file.read(16)
    if zipfile.is_zipfile(path) or head[:2] == b"\x80\x02":
        return _open_pth(path)
    if len(head) > 9 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] < path.stat().st_size:
        return _open_safetensors(path)
    raise FeatureStoreError(
        f"{path} is neither a PyTorch .pth nor a .safetensors file (it begins with {head[:8]!r}). "
        "If it was downloaded, check that it is complete."
    )


def _open_pth(path: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    try:
        # weights_only: a checkpoint is a stranger's pickle, and a pickle can run code.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise FeatureStoreError(
            f"{path} holds more than tensors and was not loaded, because such a file can run code: {reason} "
            "Save its state dict alone: torch.save(model.state_dict(), FILE)."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise FeatureStoreError(f"{path} is damaged or incomplete: {str(error).splitlines()[0]}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise FeatureStoreError(f"{path} is not a state dict (keys to tensors) but a {type(content).__name__}.")
    for key, value in content.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            # A few bytes, seen with stride 0, can pass for more numbers than there is memory.
            raise FeatureStoreError(
                f"{path} says that {key} has shape {tuple(value.shape)}, but does not hold as many numbers."
            )
    return {str(key): tuple(value.shape) for key, value in content.items()}, content.__getitem__


def _open_safetensors(path: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    try:
        file = safe_open(path, framework="pt")
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, json.JSONDecodeError, OSError) as error:
        raise FeatureStoreError(f"{path} is damaged or incomplete: {error}") from None
    return shapes, file.get_tensor


def _key_names(found: Shapes, shapes: Shapes) -> dict[str, str]:
    """File key to network key: itself, or with the ``features.`` prefix that conv-only files leave out."""
    prefixed = {key: f"features.{key}" for key in found}
    if found and not set(found) & set(shapes) and set(prefixed.values()) & set(shapes):
        return prefixed
    return {key: key for key in found}


def _check_keys(path: Path, found: Shapes, shapes: Shapes) -> frozenset[str]:
    """Refuse a file of another network; the keys of ``fc.`` may be absent as a whole (a conv-only file)."""
    missing = frozenset(key for key in shapes if key not in found)
    convolutions_only = bool(missing) and missing == {key for key in shapes if key.startswith("fc.")}
    expected = {key: shape for key, shape in shapes.items() if not (convolutions_only and key in missing)}
    problems = compare_keys(found, expected)
    if problems:
        raise FeatureStoreError(
            f"{path} is not a checkpoint of this backbone. {problems}. "
            "Check --backbone, or give --weights the file that belongs to it."
        )
    return missing


def compare_keys(found: Shapes, wanted: Shapes) -> str:
    """How a file's keys and shapes differ from those ``wanted``, by name; empty if they do not."""
    kinds = {
        "missing": [key for key in wanted if key not in found],
        "unexpected": [key for key in found if key not in wanted],
        "of another shape": [
            f"{key} {found[key]} (needed: {tuple(wanted[key])})"
            for key in wanted
            if key in found and found[key] != tuple(wanted[key])
        ],
    }
    parts = [f"{len(keys)} {what}: {listing(keys, 4)}" for what, keys in kinds.items() if keys]
    return f"Keys {'; '.join(parts)}" if parts else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
