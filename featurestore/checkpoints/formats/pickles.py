"""Pickled dicts of NumPy arrays, as VGGFace2's networks were published, without running what a pickle can run.

See ``featurestore.safe_pickle`` for how.
"""

import pickle
from functools import partial
from pathlib import Path

import numpy as np
import torch

from featurestore import safe_pickle
from featurestore.checkpoints.formats import pytorch, safetensors
from featurestore.checkpoints.formats.base import Stored, TensorFile, damaged, runs_code, unwrap
from featurestore.errors import FeatureStoreError
from featurestore.safe_pickle import Array, Refused


def recognises(head: bytes, path: Path) -> bool:
    """A pickle of any protocol, unless it is torch's or begins a safetensors file, whose length may look like one."""
    binary = head[:1] == b"\x80" and head[1:2] <= bytes([pickle.HIGHEST_PROTOCOL])
    text = head[:1] in (b"(", b"}", b"c")
    return (binary or text) and not pytorch.recognises(head, path) and not safetensors.recognises(head, path)


def open_file(path: Path) -> TensorFile:
    """A pickled dict of names to arrays, of any pickle protocol and of Python 2 or 3.

    FeatureStoreError, and nothing run, if the pickle asks for anything that an array does not need.
    """
    content = path.read_bytes()
    try:
        arrays = unwrap(path, safe_pickle.load(content, safe_pickle.array_stand_ins()), Array)
        for array in arrays.values():
            array.check()
    except Refused as error:
        raise runs_code(path, f"{error}.") from None
    except FeatureStoreError:
        raise
    except Exception as error:  # a damaged pickle raises anything
        raise damaged(path, error) from None
    return TensorFile(
        path, "pickle", {key: Stored(array.shape, partial(_tensor, array)) for key, array in arrays.items()}
    )


def _tensor(array: Array) -> torch.Tensor:
    values = array.numpy()
    return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="C"))
