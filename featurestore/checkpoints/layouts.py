"""Layouts of published checkpoints: the names of their tensors and the order of their axes.

``readings`` gives every way in which a file's names can be understood, as tensors under our state-dict keys; which one is
meant is seen by comparing shapes with the network (``featurestore.checkpoints.fitting``).
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from featurestore.checkpoints.formats.base import Stored, TensorFile
from featurestore.networks.vggface import BLOCKS, LINEAR
from featurestore.text import listing

Tensors = dict[str, Stored]
Understood = tuple[Tensors] | tuple[Tensors, tuple[str, ...]]  # under our keys, and notes

# Modules of torchvision's VGG16, in the order of our convolutions and linear layers.
_TORCHVISION_FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_TORCHVISION_CLASSIFIER = (0, 3, 6)

_CONVOLUTIONS = [f"{block}_{i}" for block, (n, _) in enumerate(BLOCKS, start=1) for i in range(1, n + 1)]
_MODULES = [*(f"features.conv_{name}" for name in _CONVOLUTIONS), *(f"fc.{name}" for name, _, _ in LINEAR)]
_HDF5_NAMES = {
    **{f"conv{name}": f"features.conv_{name}" for name in _CONVOLUTIONS},
    **{name: f"fc.{name}" for name, _, _ in LINEAR},
}
_HEAD = re.compile(r"(vgg_core_bridge|decision_block|decision_layer|vgg_core_fc8)\.")


@dataclass(frozen=True)
class Reading:
    """A file's tensors under our keys. ``layout`` is what people call it; ``notes`` say what was assumed."""

    layout: str
    tensors: Tensors
    notes: tuple[str, ...] = field(default=())


def readings(file: TensorFile) -> Iterator[Reading]:
    """Every layout that the file's names fit, the plainest first."""
    plain = file.tensors
    if plain and all(key.startswith("module.") for key in plain):  # saved from torch's DataParallel
        plain = {key.removeprefix("module."): stored for key, stored in plain.items()}
    yield Reading(f"{file.kind}, published keys", plain)
    for layout, understand in _LAYOUTS.items():
        reading = understand(plain)
        if reading:
            yield Reading(f"{file.kind}, {layout}", *reading)


def _convolutions_alone(tensors: Tensors) -> tuple[Tensors] | None:
    if not tensors or not all(re.fullmatch(r"conv_\d_\d\.(weight|bias)", key) for key in tensors):
        return None
    return ({f"features.{key}": stored for key, stored in tensors.items()},)


def _torchvision(tensors: Tensors) -> tuple[Tensors] | None:
    places = [
        *(f"features.{i}" for i in _TORCHVISION_FEATURES),
        *(f"classifier.{i}" for i in _TORCHVISION_CLASSIFIER),
    ]
    names = dict(zip(places, _MODULES, strict=True))
    parts = {key: key.rpartition(".") for key in tensors}
    if not parts or not all(module in names for module, _, _ in parts.values()):
        return None
    return ({f"{names[module]}.{leaf}": tensors[key] for key, (module, _, leaf) in parts.items()},)


def _trained_system(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]] | None:
    """VGG-Face within a system trained end to end (``vgg_core.vgg_core.``) or on many views (``vgg_core.``), and its head."""
    for prefix in ("vgg_core.vgg_core.", "vgg_core."):
        core = {key.removeprefix(prefix): stored for key, stored in tensors.items() if key.startswith(prefix)}
        rest = [key for key in tensors if not key.startswith(prefix)]
        if core and all(_HEAD.match(key) for key in rest):
            return core, (f"the backbone of a trained system; its head ({len(rest)} keys) is left out",)
    return None


def _network_order(tensors: Tensors) -> tuple[Tensors] | None:
    """Modules with weights, in network order: VGG-Face's convolutions, then its linear layers, from the first on.

    LuaTorch keeps a convolution's weight as a matrix, out × (in · y · x).
    """
    places = list(dict.fromkeys(key.rpartition(".")[0] for key in tensors))
    whole_or_cut = len(_CONVOLUTIONS) <= len(places) <= len(_MODULES)
    if not whole_or_cut or not all(re.fullmatch(r"[\w.]*\d", place) for place in places):
        return None
    named: Tensors = {}
    width_in = 3
    for place, module in zip(places, _MODULES, strict=False):
        weight, bias = tensors.get(f"{place}.weight"), tensors.get(f"{place}.bias")
        if weight is None or bias is None:
            return None
        if module.startswith("features."):
            width = weight.shape[0]
            if math.prod(weight.shape) != width * width_in * 9:
                return None
            weight = _changed(weight, (width, width_in, 3, 3), lambda values, shape: values.reshape(shape))
            width_in = width
        named[f"{module}.weight"], named[f"{module}.bias"] = weight, bias
    return (named,)


def _hdf5(tensors: Tensors) -> tuple[Tensors, tuple[str, ...]] | None:
    """Datasets ``conv1_1_w … fc8_b``, with or without the group ``data``; the order of axes is inferred from shapes.

    A convolution is out × in × y × x, y × x × in × out or y × in × x × out; where the first one, with 3 channels, fits several,
    the others decide. A square linear layer is taken to have the order of the other ones. The input of fc6 is taken to be
    flattened channel, y, x, or y, x, channel where that is the order of the convolutions' axes.
    """
    found = {key.rpartition("/")[2]: stored for key, stored in tensors.items()}
    if len(found) != len(tensors) or not all(
        re.fullmatch(r"\w+_[wb]", key) and key[:-2] in _HDF5_NAMES for key in found
    ):
        return None
    names = [name for name in _HDF5_NAMES if f"{name}_w" in found]
    possible = {name: _axis_orders(found, name) for name in names}
    if not all(possible.values()):
        return None
    orders: dict[str, str] = {}
    notes = []
    for kind in ((True, 4), (False, 4), (False, 2)):  # each is written by one line of whatever wrote the file
        group = [name for name in names if (name.startswith("conv"), len(found[f"{name}_w"].shape)) == kind]
        shared = [order for order in _AXES if all(order in possible[name] for name in group)]
        orders |= {name: shared[0] if shared else possible[name][0] for name in group}
        if group and len(shared) > 1:
            notes.append(f"{listing(group)} may have the axes {' or '.join(shared)}; {shared[0]} is taken")
    convolutions = {order for name, order in orders.items() if name.startswith("conv")}
    spatial_first = convolutions == {"y x in out"}
    channels = math.prod(found["conv5_3_b"].shape) if spatial_first and "conv5_3_b" in found else 0
    named: Tensors = {}
    for name in names:
        module, bias = _HDF5_NAMES[name], found[f"{name}_b"]
        named[f"{module}.bias"] = _changed(bias, (math.prod(bias.shape),), lambda values, shape: values.reshape(shape))
        named[f"{module}.weight"] = _hdf5_weight(name, _AXES[orders[name]](found[f"{name}_w"]), channels)
    if "fc6_w" in found and len(found["fc6_w"].shape) == 2:
        flattened = "y, x, channel" if spatial_first else "channel, y, x"
        why = "" if convolutions == {"y in x out"} else ", the order of the file's convolutions"
        notes.append(f"fc6 is taken to be flattened in {flattened} order{why}")
    return named, tuple(notes)


def _hdf5_weight(name: str, weight: Stored, channels: int) -> Stored:
    """A weight with our order of axes; ``channels`` of the last map if pictures were flattened y, x, channel, else 0."""
    if name.startswith("fc") and len(weight.shape) == 4:
        return _flat(weight)
    return _channels_first(weight, channels) if name == "fc6" and channels else weight


def _axis_orders(found: Tensors, name: str) -> list[str]:
    """Those that a weight's axes may have, from its shape and the length of its bias."""
    shape = found[f"{name}_w"].shape
    width = math.prod(found[f"{name}_b"].shape) if f"{name}_b" in found else -1
    if len(shape) == 4:
        fits = {
            "out in y x": shape[0] == width and shape[2] == shape[3],
            "y x in out": shape[3] == width and shape[0] == shape[1],
            "y in x out": shape[3] == width and shape[0] == shape[2],
        }
    else:
        two = len(shape) == 2
        fits = {"out in": two and shape[0] == width, "in out": two and shape[1] == width}
    return [order for order, does in fits.items() if does]


def _changed(
    stored: Stored, shape: tuple[int, ...], change: Callable[[torch.Tensor, tuple[int, ...]], torch.Tensor]
) -> Stored:
    if stored.shape == shape:
        return stored
    return Stored(shape, lambda: change(stored.read(), shape).contiguous())


def _permuted(stored: Stored, axes: Sequence[int]) -> Stored:
    shape = tuple(stored.shape[axis] for axis in axes)
    return Stored(shape, lambda: stored.read().permute(*axes).contiguous())


_AXES: dict[str, Callable[[Stored], Stored]] = {
    "out in y x": lambda stored: stored,
    "y x in out": partial(_permuted, axes=(3, 2, 0, 1)),
    "y in x out": partial(_permuted, axes=(3, 1, 0, 2)),
    "out in": lambda stored: stored,
    "in out": partial(_permuted, axes=(1, 0)),
}


def _flat(stored: Stored) -> Stored:
    """A linear layer that was kept as a convolution over the whole map."""
    out, *rest = stored.shape
    return _changed(stored, (out, math.prod(rest)), lambda values, shape: values.reshape(shape))


def _channels_first(stored: Stored, channels: int) -> Stored:
    """Weights (out, y · x · channel) to (out, channel · y · x)."""
    out, width_in = stored.shape
    side = math.isqrt(width_in // channels)
    if side * side * channels != width_in:
        return stored  # no square map: comparing shapes will say so

    def change() -> torch.Tensor:
        maps = stored.read().reshape(out, side, side, channels)
        return maps.permute(0, 3, 1, 2).reshape(out, width_in).contiguous()

    return Stored(stored.shape, change)


_LAYOUTS: dict[str, Callable[[Tensors], Understood | None]] = {
    "convolutions alone": _convolutions_alone,
    "torchvision's VGG16 keys": _torchvision,
    "a trained system": _trained_system,
    "modules in network order": _network_order,
    "conv1_1_w … fc8_b": _hdf5,
}
