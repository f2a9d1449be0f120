"""PyTorch's ``.pth`` and ``.pt``: zipped, and the kind from before torch 1.6."""

import mmap
import pickle
import struct
import zipfile
from functools import partial
from pathlib import Path

import torch

from featurestore.checkpoints.formats import inert
from featurestore.checkpoints.formats.base import Stored, TensorFile, damaged, runs_code, unwrap
from featurestore.errors import FeatureStoreError
from featurestore.pickle_nesting import refuse_nesting
from featurestore.text import listing

LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # torch's magic number, pickled
_LEGACY_PICKLES = 5  # that number, the version, the machine, the content, and the names of the numbers that follow


def recognises(head: bytes, path: Path) -> bool:
    """A zip archive, or torch's magic number."""
    return head.startswith(LEGACY) or _is_zip(path)


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except (zipfile.BadZipFile, struct.error):  # a damaged end
        return True


def open_file(path: Path) -> TensorFile:
    """A state dict, alone or in a training script's checkpoint. Code in it is never run.

    Objects of other classes beside the state dict are passed over, and ``notes`` names them.
    """
    _refuse_bombs(path)
    content, others = _load(path)
    try:
        tensors = unwrap(path, content, torch.Tensor)
    except FeatureStoreError:
        if others:  # among the weights, or instead of them
            raise runs_code(path, f"it asks for {listing(others, 3)}.") from None
        raise
    for key, value in tensors.items():
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise FeatureStoreError(f"{path}: {key} is not a plain tensor with numbers. Save it as one.")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            # A few bytes, seen with stride 0, can pass for more numbers than there is memory.
            raise FeatureStoreError(
                f"{path} says that {key} has shape {tuple(value.shape)}, but does not hold as many numbers."
            )
    notes = (f"objects beside the weights were not read: {listing(others, 3)}",) if others else ()
    stored = {key: Stored(tuple(value.shape), partial(_itself, value)) for key, value in tensors.items()}
    return TensorFile(path, "PyTorch", stored, notes=notes)


def _load(path: Path) -> tuple[object, list[str]]:
    """What the file holds, and the names of what stays inert in it: classes and functions that tensors do not need."""
    mapped = _is_zip(path)
    try:
        try:
            # weights_only: a checkpoint is an untrusted pickle, and a pickle can run code.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), []
        except pickle.UnpicklingError:
            return inert.load(path, mapped)
    except Exception as error:  # a damaged pickle raises anything, also where memory for it is not to be had
        raise damaged(path, error) from None


def _refuse_bombs(path: Path) -> None:
    """A small file may ask for much memory: by packed entries, which torch never writes, or for a bytearray of any length.

    Or for much time, or the end of the process: by tuples of tuples.
    """
    if _is_zip(path):
        _refuse_packed(path)
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"bytearray") >= 0:
            raise runs_code(path, "it asks for bytearray.")
        try:
            for _ in range(_LEGACY_PICKLES):
                refuse_nesting(content)
        except Exception as error:  # a damaged pickle raises anything
            raise damaged(path, error) from None


def _refuse_packed(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as packed:
            entries = packed.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise FeatureStoreError(f"{path} is a packed archive and not a PyTorch file. Unpack it first.")
            for entry in entries:
                if entry.filename.lower().endswith(".pkl"):  # torch finds DATA.PKL too
                    content = packed.read(entry)
                    if b"bytearray" in content:
                        raise runs_code(path, "it asks for bytearray.")
                    refuse_nesting(content)
    except FeatureStoreError:
        raise
    except Exception as error:  # a damaged archive or pickle raises anything
        raise damaged(path, error) from None


def _itself(value: torch.Tensor) -> torch.Tensor:
    return value.detach()
