"""A checkpoint held against a network: which of its readings fits, what is missing, and which network it looks like."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from featurestore.checkpoints.formats.base import TensorFile
from featurestore.checkpoints.layouts import Reading, readings
from featurestore.networks.registry import BACKBONES, get_backbone
from featurestore.networks.spec import BackboneSpec, Shapes
from featurestore.text import listing

COUNTER = "num_batches_tracked"  # batch norm's; without effect in eval mode, and missing from some files
_MOST_CLASSES = 1 << 20
_ALSO_KNOWN = ("torchvision:vgg16", "torchvision:resnet50")  # whose files are often mistaken for a face network's


@dataclass(frozen=True)
class Fit:
    """A reading of a file held against a network: ``problems`` is empty if it fits.

    ``spec`` has as many classes as the file, ``absent`` are the keys that it lacks because it was cut short.
    """

    reading: Reading
    spec: BackboneSpec
    absent: frozenset[str]
    problems: str


def best_fit(file: TensorFile, spec: BackboneSpec) -> Fit:
    """The reading of a file that fits a network, or is closest to fitting."""
    fits = [_fit(reading, spec) for reading in readings(file)]
    return min(fits, key=lambda fit: (bool(fit.problems), -_share(fit.reading, fit.spec)))


def _fit(reading: Reading, spec: BackboneSpec) -> Fit:
    found = {key: stored.shape for key, stored in reading.tensors.items()}
    spec = _with_classes_of(found, spec)
    wanted = spec.weight_shapes()
    missing = {key for key in wanted if key not in found and not key.endswith(COUNTER)}
    absent = _cut_short(missing, wanted, spec)
    return Fit(
        reading,
        spec,
        absent,
        compare_keys(found, {key: shape for key, shape in wanted.items() if key in found or key in missing - absent}),
    )


def _with_classes_of(found: Mapping[str, tuple[int, ...]], spec: BackboneSpec) -> BackboneSpec:
    """The network with as many classes as the file, where that is what published files differ in."""
    shape = found.get(f"{spec.classifier}.weight", ())
    vary = spec.classifier and spec.classes is not None
    return spec.with_classes(shape[0]) if vary and len(shape) in (2, 4) and 0 < shape[0] < _MOST_CLASSES else spec


def _cut_short(missing: set[str], wanted: Shapes, spec: BackboneSpec) -> frozenset[str]:
    """The missing keys, if they are all of the network's end from one of ``spec.ends`` on; else none."""
    for n in range(1, len(spec.ends) + 1):
        if missing == {key for key in wanted if key.startswith(spec.ends[:n])}:
            return frozenset(missing)
    return frozenset()


def looks_like(file: TensorFile) -> str:
    """Which known network's keys and shapes a file has, as a sentence; empty if it is like none of them."""
    shares = {
        name: max(_share(reading, get_backbone(name)) for reading in readings(file))
        for name in [*BACKBONES, *_ALSO_KNOWN]
    }
    best = max(shares.values())
    if best < 0.5:
        return ""
    names = " or ".join(name for name, share in shares.items() if share == best)
    return f"It looks like {names} ({math.floor(100 * best)} % of the keys and shapes agree). "


def _share(reading: Reading, spec: BackboneSpec) -> float:
    found = {key: stored.shape for key, stored in reading.tensors.items() if not key.endswith(COUNTER)}
    wanted = {key: shape for key, shape in spec.weight_shapes().items() if not key.endswith(COUNTER)}
    same = sum(found.get(key) == shape for key, shape in wanted.items())
    return same / len(found.keys() | wanted.keys())


def compare_keys(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> str:
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
    return f"Keys: {'; '.join(parts)}" if parts else ""
