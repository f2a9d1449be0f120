"""The weights of a network: read from a checkpoint that fits it, or drawn from a seed.

Every weight has its published state-dict key; what a file holds is compared with what the network needs
before anything is computed.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from featurestore.checkpoints.formats.base import TensorFile, open_tensors
from featurestore.checkpoints.layouts import Reading, readings
from featurestore.errors import FeatureStoreError
from featurestore.files import sha256_of
from featurestore.networks.digests import state_digest
from featurestore.networks.registry import BACKBONES, get_backbone
from featurestore.networks.spec import TORCHVISION, BackboneSpec, Gains, Shapes
from featurestore.text import listing

_DRAW = 1 << 22  # values drawn at a time, to bound the float64 scratch
_COUNTER = "num_batches_tracked"  # kept by batch norm, used by nobody in eval mode, and left out of some files
BUILT = "built"  # --weights: those that the user's own function gives its network
BUILT_BY = "built by "  # begins the name of such weights
_MOST_DIGITS = 18  # of a seed
_MOST_CLASSES = 1 << 20
_ALSO_KNOWN = ("torchvision:vgg16", "torchvision:resnet50")  # for which a file is easily taken


@dataclass(frozen=True)
class Weights:
    """Weights that fit ``backbone``. ``identity`` is ``seed:N`` or the file's sha256 (hex): what names a source.

    ``read(keys)`` gives CPU tensors by state-dict key, only those asked for: float32, or integers as they are. ``keys`` are
    those that it can give, ``absent`` those that a file which was cut short does not hold. ``layout`` says how a
    file was understood, ``notes`` what the user should know of it.
    """

    name: str
    identity: str
    backbone: BackboneSpec
    read: Callable[[Iterable[str]], dict[str, torch.Tensor]]
    keys: frozenset[str]
    absent: frozenset[str] = frozenset()
    layout: str = ""
    notes: tuple[str, ...] = ()

    @property
    def random(self) -> bool:
        """Whether these are drawn numbers rather than a trained network's."""
        return self.identity.startswith("seed:")


def open_weights(given: str, spec: BackboneSpec) -> Weights:
    """Weights from ``random:SEED``, ``built`` or a checkpoint file, checked against the network.

    A file's format and layout are told by its content; see ``tensor_files`` and ``layouts``. Raises FeatureStoreError for a
    missing file, an unreadable or unsafe one, and for missing, unexpected or differently shaped keys.
    """
    kind, _, seed = given.partition(":")
    if kind == "random":
        if not seed.isdecimal() or len(seed) > _MOST_DIGITS:
            raise FeatureStoreError(f"--weights {given!r}: the seed must be a whole number, such as random:0.")
        return _random(int(seed), spec)
    if given == BUILT:
        return _built(spec)
    path = Path(given).expanduser()
    if path.is_dir():
        raise FeatureStoreError(f"--weights {path} is a folder. Give a file in it.")
    if not path.is_file():
        raise FeatureStoreError(
            f"there is no weights file {path}. Give --weights a checkpoint, download to fetch the published one, or "
            "random:SEED for seeded random weights (fit for trying things out, not for results)."
        )
    return _from_file(path, spec)


def _random(seed: int, spec: BackboneSpec) -> Weights:
    state = spec.build_meta().state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    # Whole numbers are tables, such as the places of a window's pixels, that the constructor makes.
    drawn = [key for key, value in state.items() if value.is_floating_point() or key.endswith(_COUNTER)]
    return Weights(
        f"random:{seed}", f"seed:{seed}", spec, lambda keys: draw(seed, keys, shapes, spec.gains), frozenset(drawn)
    )


def _built(spec: BackboneSpec) -> Weights:
    if not spec.imported:
        raise FeatureStoreError(
            f"--weights {BUILT} is for networks of your own (my_module:build_model), which bring theirs; {spec.name} does not."
        )
    state = spec.build().state_dict()
    digest = state_digest(state)
    if state_digest(spec.build().state_dict()) != digest:
        raise FeatureStoreError(
            f"{spec.name} returns other numbers each time it is called, so its rows could never be computed again. Let it load "
            "its weights (or call torch.manual_seed), or give --weights FILE or random:SEED."
        )
    return Weights(
        BUILT_BY + spec.name,
        digest,
        spec,
        lambda keys: {key: _as_used(state[key].detach().cpu()) for key in keys},
        frozenset(state),
    )


def _from_file(path: Path, spec: BackboneSpec) -> Weights:
    file = open_tensors(path)
    fit = best_fit(file, spec)
    if fit.problems:
        raise FeatureStoreError(
            f"{path} ({file.kind}) is not a checkpoint of {spec.name}. {fit.problems}. {looks_like(file)}"
            "Check --backbone, or give --weights the file that belongs to it."
        )
    tensors = fit.reading.tensors
    digest = sha256_of(path)
    _refuse_other_transforms(path, digest, spec)

    state = fit.spec.build_meta().state_dict()

    def read(keys: Iterable[str]) -> dict[str, torch.Tensor]:
        # A counter that is left out of the file has no effect in eval mode.
        return {key: read_one(key) if key in tensors else torch.tensor(0) for key in keys}

    def read_one(key: str) -> torch.Tensor:
        values = tensors[key].read()
        if values.is_floating_point() != state[key].is_floating_point() and not key.endswith(_COUNTER):
            raise FeatureStoreError(f"{path}: {key} holds {values.dtype}, the network has {state[key].dtype}.")
        return _as_used(values)

    return Weights(
        path.name,
        digest,
        fit.spec,
        read,
        frozenset(state.keys() - fit.absent),
        fit.absent,
        fit.reading.layout,
        fit.reading.notes + _notes(spec, fit.spec),
    )


def _refuse_other_transforms(path: Path, digest: str, spec: BackboneSpec) -> None:
    """torchvision's weights of one network differ in how pictures are made their input, and the files look alike."""
    own, *others = spec.files or [""]
    known = [name for name in others if spec.files[name].sha256 and digest.startswith(spec.files[name].sha256)]
    if spec.name.startswith(TORCHVISION) and known:
        network = spec.name.partition("@")[0]
        raise FeatureStoreError(
            f"{path} is torchvision's {known[0]}, which has transforms of its own, not those of {own}. "
            f"Say so: --backbone {network}@{known[0]}"
        )


def _as_used(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float32) if values.is_floating_point() else values


def _notes(asked: BackboneSpec, found: BackboneSpec) -> tuple[str, ...]:
    if asked.classes == found.classes:
        return ()
    return (f"{found.classifier} has {found.classes} classes in this file, not {asked.classes}",)


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
    """The reading of a file that fits a network, or comes nearest."""
    fits = [_fit(reading, spec) for reading in readings(file)]
    return min(fits, key=lambda fit: (bool(fit.problems), -_share(fit.reading, fit.spec)))


def _fit(reading: Reading, spec: BackboneSpec) -> Fit:
    found = {key: stored.shape for key, stored in reading.tensors.items()}
    spec = _with_classes_of(found, spec)
    wanted = spec.weight_shapes()
    missing = {key for key in wanted if key not in found and not key.endswith(_COUNTER)}
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
    return spec.with_classes(shape[0]) if spec.classifier and len(shape) == 2 and 0 < shape[0] < _MOST_CLASSES else spec


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
    found = {key: stored.shape for key, stored in reading.tensors.items() if not key.endswith(_COUNTER)}
    wanted = {key: shape for key, shape in spec.weight_shapes().items() if not key.endswith(_COUNTER)}
    same = sum(found.get(key) == shape for key, shape in wanted.items())
    return same / len(found.keys() | wanted.keys())


def draw(
    seed: int, keys: Iterable[str], shapes: Mapping[str, tuple[int, ...]], gains: Gains = ()
) -> dict[str, torch.Tensor]:
    """Random float32 weights that depend on (seed, key, shape) alone, so on no machine, order or torch version.

    He-scaled normal weights, small normal biases, batch-norm statistics near the identity; drawn in float64 by
    ``numpy.random.default_rng(crc32("seed:key"))``, scaled (also by the first of ``gains`` whose expression is the key's),
    then cast.
    """
    return {key: torch.from_numpy(_draw_one(seed, key, shapes, _gain(key, gains))) for key in keys}


def _gain(key: str, gains: Gains) -> float:
    return next((factor for expression, factor in gains if re.fullmatch(expression, key)), 1.0)


def _draw_one(seed: int, key: str, shapes: Mapping[str, tuple[int, ...]], gain: float) -> np.ndarray:
    shape = shapes[key]
    module, _, leaf = key.rpartition(".")
    rng = np.random.default_rng(zlib.crc32(f"{seed}:{key}".encode()))
    if leaf == "num_batches_tracked":
        return np.array(1, np.int64)
    if leaf == "running_var" or (leaf == "weight" and len(shape) == 1):
        return (rng.uniform(0.5, 1.5, shape) * gain).astype(np.float32)
    if leaf == "weight":
        std = math.sqrt(2 / math.prod(shape[1:])) * gain
    else:
        batch_norm = f"{module}.running_mean" in shapes
        std = (0.1 if batch_norm else 0.05) * gain
    values = np.empty(math.prod(shape), np.float32)
    for start in range(0, values.size, _DRAW):
        stop = min(start + _DRAW, values.size)
        values[start:stop] = rng.standard_normal(stop - start) * std
    return values.reshape(shape)


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
