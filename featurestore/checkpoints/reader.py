"""Named tensors out of untrusted checkpoint files, whose format is recognised by content.

A format is a module of ``checkpoints.formats`` that defines ``recognises`` and ``open_file``; it is discovered automatically.
"""

from pathlib import Path

from featurestore.checkpoints import formats
from featurestore.checkpoints.formats.base import TensorFile, refuse_many
from featurestore.discovery import load_modules
from featurestore.errors import FeatureStoreError

_HEAD = 16  # bytes


def open_tensors(path: Path) -> TensorFile:
    """The tensors of a ``.pth``, ``.safetensors``, LuaTorch ``.t7``, HDF5, VGGFace2 ``.pkl`` or dlib ``.dat`` file, by content.

    Names and shapes are read and nothing in the file is run; a tensor's numbers are read when it is asked for.
    FeatureStoreError for any other file, a damaged one, or one that holds more than tensors, or more of them than any network.
    """
    if not path.is_file():
        raise FeatureStoreError(f"{path} is a folder, not a file." if path.is_dir() else f"there is no file {path}.")
    if not path.stat().st_size:  # as what the system shows as a file is, too
        raise FeatureStoreError(f"{path} is empty (0 bytes). Fetch it again.")
    with path.open("rb") as file:
        head = file.read(_HEAD)
    for format in load_modules(formats, "recognises"):
        if format.recognises(head, path):
            opened: TensorFile = format.open_file(path)
            refuse_many(path, len(opened.tensors))
            return opened
    raise FeatureStoreError(
        f"{path} is no weights file that is known here{_guess(head)}. It begins with the bytes {head[:8].hex(' ')}. "
        "Known are PyTorch .pth, .safetensors, LuaTorch .t7 (binary), HDF5, VGGFace2's .pkl and dlib's .dat. If it was "
        "downloaded, check that it is complete."
    )


def _guess(head: bytes) -> str:
    guesses = {
        b"\x1f\x8b": ": it looks like an archive that has to be unpacked first",
        b"MATLAB": ": it looks like a MATLAB file",
        b"<": ": it looks like a web page",
        b"4\n": ": it looks like a LuaTorch file in ASCII; save it in binary",
    }
    return next((guess for start, guess in guesses.items() if head.startswith(start)), "")
