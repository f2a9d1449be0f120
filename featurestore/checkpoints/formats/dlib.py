"""dlib's ``.dat``: its face recognition network, ``dlib_face_recognition_resnet_model_v1.dat``.

The file describes the network layer by layer, and this network is the only one that is read: whatever decides a size is
compared with what ``networks.dlib_resnet_v1`` has, to the last byte, so that nothing in the file chooses how much is read or
how deep. Numbers stay in the mapped file until they are read.

An integer is a byte with its length (1 … 8; 0x80 for negative), then its magnitude, little endian. A real number is two
integers, mantissa and binary exponent. A tensor is four sizes and its float32 numbers.
"""

import math
import mmap
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from featurestore.checkpoints.formats.base import Stored, TensorFile, damaged
from featurestore.errors import FeatureStoreError
from featurestore.networks.dlib_resnet_v1 import BLOCKS, DESCRIPTOR, MEAN_RGB, SIZE, STEM_WIDTH, ResidualBlock

FILE = "dlib_face_recognition_resnet_model_v1.dat"
_VERSION_1 = b"\x01\x01"
_NETWORK = b"loss_"  # begins the name of a network's loss, with which a network's file begins
_NEGATIVE, _MOST_BYTES = 0x80, 8  # of an integer
_MOST_LETTERS = 64  # of a layer's name
_MOST_EXPONENT = 1000  # of a real number; 32000 … 32002 stand for what is not finite
_MOST_DIFFERENCE = 1e-4  # of the means from the recipe's, which the file has as float32

# Versions of a network's layers, the output's end first: layers with 2, marks of where a shortcut begins and ends with 1.
_PLAIN = (2, 2, 2, 2, 2, 2, 2, 1)
_HALVING = (2, 2, 2, 1, 1, 2, 2, 2, 2, 2, 1)
_VERSIONS = (
    *(2, 2),
    *(version for block in reversed(BLOCKS.values()) for version in (_HALVING if block.halves else _PLAIN)),
    *(2, 2, 2, 3),
)


class _Another(Exception):
    """The file holds something else of dlib's; the message says what."""


class _Reader:
    """Values from the file, one after the other; ValueError for what cannot be one."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.at = 0

    def take(self, n: int) -> bytes:
        if n > len(self.content) - self.at:
            raise ValueError(f"it ends at byte {len(self.content)}, in the middle of something")
        self.at += n
        return self.content[self.at - n : self.at]

    def integer(self) -> int:
        (control,) = self.take(1)
        n = control & ~_NEGATIVE
        if not 1 <= n <= _MOST_BYTES:
            raise ValueError(f"an integer of {n} bytes at byte {self.at - 1}")
        magnitude = self.take(n)
        negative = bool(control & _NEGATIVE)
        if not magnitude[-1] and (n > 1 or negative):
            raise ValueError(f"an integer with leading zeros, or a negative zero, at byte {self.at - n - 1}")
        value = int.from_bytes(magnitude, "little")
        return -value if negative else value

    def real(self) -> float:
        mantissa, exponent = self.integer(), self.integer()
        if abs(exponent) > _MOST_EXPONENT or abs(mantissa) >> 53:
            raise ValueError(f"a real number {mantissa} · 2^{exponent} before byte {self.at}")
        return math.ldexp(mantissa, exponent)

    def text(self) -> str:
        length = self.integer()
        if not 0 <= length <= _MOST_LETTERS:
            raise ValueError(f"a name of {length} letters before byte {self.at}")
        return self.take(length).decode("latin1")

    def name(self, wanted: str) -> None:
        found = self.text()
        if found != wanted:
            raise _Another(f"a network in which {found!r} is where that one has {wanted!r}")

    def integers(self, *wanted: int, what: str) -> None:
        found = tuple(self.integer() for _ in wanted)
        if found != wanted:
            raise ValueError(f"{what} {found}, not {wanted}, before byte {self.at}")

    def alias(self, *sizes: int) -> None:
        """The sizes of a part of a tensor."""
        self.integers(1, *sizes, what="a part of the sizes")

    def numbers(self, count: int) -> np.ndarray:
        """A tensor of ``count`` numbers along its first axis: float32, within the mapped file."""
        self.integers(2, count, 1, 1, 1, what="a tensor of the sizes")
        return self._floats(count)

    def matrix(self, rows: int, columns: int) -> np.ndarray:
        self.integers(2, rows, columns, 1, 1, what="a tensor of the sizes")
        return self._floats(rows * columns).reshape(rows, columns)

    def _floats(self, count: int) -> np.ndarray:
        if 4 * count > len(self.content) - self.at:
            raise ValueError(f"it ends at byte {len(self.content)}, in the middle of {count} numbers")
        values = np.frombuffer(self.content, "<f4", count, self.at)
        if not np.isfinite(values).all():
            raise ValueError(f"numbers that are NaN or infinite, from byte {self.at} on")
        self.at += 4 * count
        return values

    def end_of_layer(self) -> None:
        """What training leaves behind: three flags, and three tensors, which are empty."""
        flags = self.take(3)
        if not set(flags) <= set(b"01"):
            raise ValueError(f"the flags {flags!r} before byte {self.at}")
        for _ in range(3):
            self.integers(2, 0, 0, 0, 0, what="a tensor of the sizes")


def recognises(head: bytes, path: Path) -> bool:
    """A network with its loss; or the landmarks of a shape predictor (a matrix, whose sizes dlib negates)."""
    return head.startswith(_VERSION_1) and (_is_network(head) or _is_landmarks(head))


def _is_network(head: bytes) -> bool:
    return head[2:3] == b"\x01" and head[4:].startswith(_NETWORK)


def _is_landmarks(head: bytes) -> bool:
    return head[2:3] == b"\x81" and head[4:6] == b"\x81\x01"


def open_file(path: Path) -> TensorFile:
    """The network's weights, under the keys of ``networks.dlib_resnet_v1``."""
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if _is_landmarks(content[:6]):
            raise _Another("the landmarks of a shape predictor")
        tensors = dict(_network(_Reader(content)))
    except _Another as error:
        raise FeatureStoreError(
            f"{path} is a file of dlib's, but not its face recognition network: it holds {error}. "
            f"The network's file is {FILE}."
        ) from None
    except ValueError as error:
        raise damaged(path, error) from None
    return TensorFile(path, "dlib", tensors)


def _network(reader: _Reader) -> Iterator[tuple[str, Stored]]:
    reader.integers(1, what="the version")
    reader.name("loss_metric_2")
    reader.real(), reader.real()  # the margin and the distance that it was trained with
    reader.integers(*_VERSIONS, what="versions of layers")
    _input(reader)
    yield from _convolution(reader, "stem.conv", STEM_WIDTH, 3, side=7, stride=2, padding=0, innermost=True)
    yield from _affine(reader, "stem.affine", STEM_WIDTH)
    _layer(reader, "relu_")
    _layer(reader, "max_pool_2", 3, 3, 2, 2, 0, 0)
    for name, block in BLOCKS.items():
        yield from _block(reader, name, block)
    _layer(reader, "avg_pool_2", 0, 0, 1, 1, 0, 0)
    width = block.width
    reader.name("fc_2")
    reader.integers(DESCRIPTOR, width, what="a linear layer's sizes")
    weights = reader.matrix(width, DESCRIPTOR).T
    reader.alias(width, DESCRIPTOR, 1, 1)
    reader.alias(0, 0, 0, 0)
    reader.integers(1, what="a linear layer's kind")  # it has no bias
    _multipliers(reader)
    reader.end_of_layer()
    yield "descriptor.weight", _stored(weights, (DESCRIPTOR, width))
    if reader.at != len(reader.content):
        raise ValueError(f"{len(reader.content) - reader.at} bytes more than the network has")


def _input(reader: _Reader) -> None:
    reader.name("input_rgb_image_sized")
    means = tuple(reader.real() for _ in range(3))
    if any(abs(mean - wanted) > _MOST_DIFFERENCE for mean, wanted in zip(means, MEAN_RGB, strict=True)):
        raise ValueError(f"the means of red, green and blue are {means}, not {MEAN_RGB}")
    reader.integers(SIZE, SIZE, what="an input of the sizes")


def _block(reader: _Reader, name: str, block: ResidualBlock) -> Iterator[tuple[str, Stored]]:
    stride, padding = (2, 0) if block.halves else (1, 1)
    yield from _convolution(
        reader, f"{name}.conv1", block.width, block.width_in, side=3, stride=stride, padding=padding
    )
    yield from _affine(reader, f"{name}.affine1", block.width)
    _layer(reader, "relu_")
    yield from _convolution(reader, f"{name}.conv2", block.width, block.width, side=3, stride=1, padding=1)
    yield from _affine(reader, f"{name}.affine2", block.width)
    if block.halves:
        _layer(reader, "avg_pool_2", 2, 2, 2, 2, 0, 0)
    _layer(reader, "add_prev_")
    _layer(reader, "relu_")


def _convolution(
    reader: _Reader, key: str, out: int, width_in: int, side: int, stride: int, padding: int, innermost: bool = False
) -> Iterator[tuple[str, Stored]]:
    reader.name("con_4")
    shape = (out, width_in, side, side)
    n = math.prod(shape)
    values = reader.numbers(n + out)
    reader.integers(out, side, side, stride, stride, padding, padding, what="a convolution of")
    reader.alias(*shape)
    reader.alias(1, out, 1, 1)
    _multipliers(reader)
    reader.end_of_layer()
    if innermost:
        reader.integers(1, what="the number of inputs")
    yield f"{key}.weight", _stored(values[:n], shape)
    yield f"{key}.bias", _stored(values[n:], (out,))


def _affine(reader: _Reader, key: str, width: int) -> Iterator[tuple[str, Stored]]:
    reader.name("affine_")
    values = reader.numbers(2 * width)
    reader.alias(1, width, 1, 1)
    reader.alias(1, width, 1, 1)
    reader.integers(0, what="an affine layer's kind")  # a number for each channel
    reader.end_of_layer()
    yield f"{key}.weight", _stored(values[:width], (width,))
    yield f"{key}.bias", _stored(values[width:], (width,))


def _layer(reader: _Reader, name: str, *fields: int) -> None:
    """A layer without weights."""
    reader.name(name)
    reader.integers(*fields, what=f"{name} of")
    reader.end_of_layer()


def _multipliers(reader: _Reader) -> None:
    """Four factors that training uses."""
    for _ in range(4):
        reader.real()


def _stored(values: np.ndarray, shape: tuple[int, ...]) -> Stored:
    return Stored(shape, partial(_tensor, values, shape))


def _tensor(values: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(
        np.array(values.reshape(shape), np.float32, order="C")
    )  # a copy: the file is mapped read-only
