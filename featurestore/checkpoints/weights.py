"""The weights of a network: read from a checkpoint that fits it, or drawn from a seed.

Every weight has its published state-dict key; what a file holds is compared with what the network needs
before anything is computed.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from featurestore.checkpoints.fitting import COUNTER, best_fit, looks_like
from featurestore.checkpoints.packaged import PACKAGED, packaged_file
from featurestore.checkpoints.reader import open_tensors
from featurestore.checkpoints.seeded import draw_weights
from featurestore.errors import FeatureStoreError
from featurestore.files import sha256_of
from featurestore.networks.digests import state_digest
from featurestore.networks.spec import TORCHVISION, BackboneSpec

BUILT = "built"  # ``weights``: those that the user's own function gives its network
BUILT_BY = "built by "  # begins the name of such weights
TUNED = "backbone.safetensors"  # the whole network in the folder of a run that fine-tuned it
TUNED_FROM = "finetuned"  # its metadata: JSON with ``weights``, what it was tuned from and by which run, and ``random``
_MOST_DIGITS = 18  # of a seed
_LONGEST_NAME = 400


@dataclass(frozen=True)
class Weights:
    """Weights that fit ``backbone``. ``identity`` is ``seed:N`` or the file's sha256 (hex): what names a source.

    ``read(keys)`` gives CPU tensors by state-dict key, only those asked for: float32, or integers as they are. ``keys`` are
    those that it can give, ``absent`` those that a file which was cut short does not hold. ``layout`` says how a
    file was understood, ``notes`` what the user should know of it. ``random_start``: fine-tuned from drawn numbers.
    """

    name: str
    identity: str
    backbone: BackboneSpec
    read: Callable[[Iterable[str]], dict[str, torch.Tensor]]
    keys: frozenset[str]
    absent: frozenset[str] = frozenset()
    layout: str = ""
    notes: tuple[str, ...] = ()
    random_start: bool = False

    @property
    def random(self) -> bool:
        """Whether these are drawn numbers rather than a trained network's."""
        return self.identity.startswith("seed:")

    @property
    def described(self) -> str:
        """The name; random ones are called so."""
        return f"{self.name} (random numbers, not a trained network)" if self.random else self.name

    @property
    def licence(self) -> str:
        """The network's, which drawn numbers do not have."""
        if self.random or self.random_start:
            return f"none: {'' if self.random else 'fine-tuned from '}seeded random weights"
        return self.backbone.licence

    def put_into(self, network: nn.Module, assign: bool = False) -> None:
        """Fill the parameters and buffers that these weights have; ``assign`` replaces them, as meta tensors need it."""
        network.load_state_dict(
            self.read([key for key in network.state_dict() if key in self.keys]), strict=False, assign=assign
        )


def open_weights(given: str, spec: BackboneSpec) -> Weights:
    """Weights from ``random:SEED``, ``built``, ``packaged``, a checkpoint file or a fine-tuned run, checked against the network.

    ``packaged`` is the file of an installed Python package; see ``packaged_file``. A run is given by its folder. A file's format
    and layout are recognised by content; see ``formats`` and ``layouts``. Raises FeatureStoreError for a missing file, an
    unreadable or unsafe one, and for missing, unexpected or differently shaped keys.
    """
    kind, _, seed = given.partition(":")
    if kind == "random":
        if not seed.isdecimal() or len(seed) > _MOST_DIGITS:
            raise FeatureStoreError(f"`weights` {given!r}: the seed must be a whole number, such as random:0.")
        return _random(int(seed), spec)
    if given == BUILT:
        return _built(spec)
    if given == PACKAGED:
        return _from_file(packaged_file(spec), spec)
    path = Path(given).expanduser()
    if (path / TUNED).is_file():
        path = path / TUNED
    if path.is_dir():
        what = " of a run that did not fine-tune the network" if (path / "config.json").is_file() else ""
        raise FeatureStoreError(
            f"`weights` {path} is a folder{what}. Give a file in it, or the folder of a fine-tuned run."
        )
    if not path.is_file():
        raise FeatureStoreError(
            f"there is no weights file {path}. Give `weights` a checkpoint, download to fetch the published one, or "
            "random:SEED for seeded random weights (for trying the software out, not for results)."
        )
    return _from_file(path, spec)


def _random(seed: int, spec: BackboneSpec) -> Weights:
    state = spec.build_meta().state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    # Whole numbers are tables, such as the places of a window's pixels, that the constructor makes.
    drawn = [key for key, value in state.items() if value.is_floating_point() or key.endswith(COUNTER)]
    return Weights(
        f"random:{seed}",
        f"seed:{seed}",
        spec,
        lambda keys: draw_weights(seed, keys, shapes, spec.gains),
        frozenset(drawn),
    )


def _built(spec: BackboneSpec) -> Weights:
    if not spec.imported:
        raise FeatureStoreError(
            f"`weights` {BUILT} is for networks of your own (my_module:build_model), whose function sets them; {spec.name} "
            "is not one."
        )
    state = spec.build().state_dict()
    digest = state_digest(state)
    if state_digest(spec.build().state_dict()) != digest:
        raise FeatureStoreError(
            f"{spec.name} returns different weights at each call, so its rows could not be reproduced. Let it load "
            "its weights (or call torch.manual_seed), or give `weights` FILE or random:SEED."
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
            "Check `backbone`, or give `weights` the file that belongs to it."
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
        if values.is_floating_point() != state[key].is_floating_point() and not key.endswith(COUNTER):
            raise FeatureStoreError(f"{path}: {key} holds {values.dtype}, the network has {state[key].dtype}.")
        return _as_used(values)

    name, random_start = _tuned_from(path, file.metadata)
    return Weights(
        name,
        digest,
        fit.spec,
        read,
        frozenset(state.keys() - fit.absent),
        fit.absent,
        fit.reading.layout,
        file.notes + fit.reading.notes + _notes(spec, fit.spec),
        random_start,
    )


def _tuned_from(path: Path, metadata: Mapping[str, str]) -> tuple[str, bool]:
    """The weights' name, which for a fine-tuned network says from what, and whether that was drawn numbers."""
    try:
        about = json.loads(metadata[TUNED_FROM])
        name, random = about["weights"], about["random"]
        if isinstance(name, str) and isinstance(random, bool) and name.isprintable():
            return name[:_LONGEST_NAME], random
    except (KeyError, ValueError, TypeError, RecursionError):
        pass
    return path.name, False


def _refuse_other_transforms(path: Path, digest: str, spec: BackboneSpec) -> None:
    """torchvision's weights of one network differ in how pictures are made their input, and the files look alike."""
    own, *others = spec.files or [""]
    known = [name for name in others if spec.files[name].sha256 and digest.startswith(spec.files[name].sha256)]
    if spec.name.startswith(TORCHVISION) and known:
        network = spec.name.partition("@")[0]
        raise FeatureStoreError(
            f"{path} is torchvision's {known[0]}, which has transforms of its own, not those of {own}. "
            f"Say so: `backbone` {network}@{known[0]}"
        )


def _as_used(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float32) if values.is_floating_point() else values


def _notes(asked: BackboneSpec, found: BackboneSpec) -> tuple[str, ...]:
    if asked.classes == found.classes:
        return ()
    return (f"{found.classifier} has {found.classes} classes in this file, not {asked.classes}",)
