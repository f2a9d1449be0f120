"""Named tensors out of checkpoint files that a stranger may have made, told apart by their content.

``open_tensors`` finds names and shapes and runs nothing that is in the file; a tensor's numbers are read when it is asked for.
"""

import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from featurestore.errors import FeatureStoreError

LEGACY_PTH = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")  # torch's magic number, pickled: files from before torch 1.6


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, and how to read it (on the CPU, in the file's own dtype)."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class TensorFile:
    """A file's tensors by the names that it gives them, in its order. ``kind`` is the format's name for people."""

    path: Path
    kind: str
    tensors: dict[str, Stored]
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: stored.shape for name, stored in self.tensors.items()}


def open_tensors(path: Path) -> TensorFile:
    """The tensors of a ``.pth``, ``.safetensors``, LuaTorch ``.t7``, HDF5 or VGGFace2 ``.pkl`` file, whatever it is called.

    FeatureStoreError for any other file, a damaged one, or one that holds more than tensors.
    """
    from featurestore.checkpoints.formats import hdf5, luatorch, pickles, pytorch  # each knows one library

    if not path.is_file():
        raise FeatureStoreError(f"{path} is a folder, not a file." if path.is_dir() else f"there is no file {path}.")
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"\x89HDF\r\n\x1a\n"):
        return hdf5.open_hdf5(path)
    if zipfile.is_zipfile(path) or head.startswith(LEGACY_PTH):
        return pytorch.open_pth(path)
    if head[:1] == b"\x80" or head[:1] in (b"(", b"}", b"c"):
        return pickles.open_pickle(path)
    if len(head) >= 8 and struct.unpack("<ii", head[:8]) in luatorch.BEGINNINGS:
        return luatorch.open_luatorch(path)
    if len(head) > 9 and head[8:9] == b"{" and 2 <= struct.unpack("<Q", head[:8])[0] < path.stat().st_size:
        return pytorch.open_safetensors(path)
    if not head:
        raise FeatureStoreError(f"{path} is empty (0 bytes). Fetch it again.")
    raise FeatureStoreError(
        f"{path} is no weights file that is known here{_guess(head)}. It begins with the bytes {head[:8].hex(' ')}. "
        "Known are PyTorch .pth, .safetensors, LuaTorch .t7 (binary), HDF5 and VGGFace2's .pkl. If it was downloaded, check "
        "that it is complete."
    )


def _guess(head: bytes) -> str:
    guesses = {
        b"\x1f\x8b": ": it looks like an archive that has to be unpacked first",
        b"MATLAB": ": it looks like a MATLAB file",
        b"<": ": it looks like a web page",
        b"4\n": ": it looks like a LuaTorch file in ASCII; save it in binary",
    }
    return next((guess for start, guess in guesses.items() if head.startswith(start)), "")


def damaged(path: Path, reason: object) -> FeatureStoreError:
    """The error for a file that ends early or contradicts itself."""
    first = (str(reason).splitlines() or [""])[0]
    return FeatureStoreError(f"{path} is damaged or incomplete: {first.rstrip('.')}. Fetch it again.")


def runs_code(path: Path, what: str) -> FeatureStoreError:
    """The error for a file that holds more than numbers."""
    return FeatureStoreError(
        f"{path} holds more than tensors and was not loaded, because such a file can run code: {what} "
        "Save its state dict alone: torch.save(model.state_dict(), FILE)."
    )
