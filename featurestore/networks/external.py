"""Networks that this project did not write: torchvision's, and the user's own."""

import importlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torchvision
from torch import nn
from torchvision.models import WeightsEnum, get_model, get_model_weights, list_models

from featurestore.errors import FeatureStoreError
from featurestore.networks.capture import with_descriptor, with_layers
from featurestore.networks.spec import TORCHVISION, BackboneSpec, PublishedFile
from featurestore.photos.recipes import Recipe
from featurestore.text import near_matches


def in_torchvision(name: str) -> bool:
    """Whether torchvision has a classifier of that name."""
    return name.partition("@")[0] in list_models(module=torchvision.models)


def torchvision_backbone(full: str) -> BackboneSpec:
    """``torchvision:resnet50`` with the transforms of its default weights, ``torchvision:resnet50@IMAGENET1K_V1`` with those."""
    name, _, chosen = full.removeprefix(TORCHVISION).partition("@")
    names = list_models(module=torchvision.models)  # those that classify; detectors give no single tensor
    if name not in names:
        raise FeatureStoreError(
            f"torchvision {torchvision.__version__} has no classifier {name!r}. "
            + near_matches(name, names, "They are listed in its documentation, such as torchvision:convnext_tiny.")
        )
    entries = get_model_weights(name)
    if chosen and chosen not in entries.__members__:
        raise FeatureStoreError(f"{name} has no weights {chosen!r}. {near_matches(chosen, entries.__members__)}")
    entry = entries[chosen] if chosen else entries.DEFAULT
    spec = BackboneSpec(
        name=TORCHVISION + name + ("" if entry is entries.DEFAULT else f"@{entry.name}"),
        layers={},
        recipes=(_recipe(name, entry),),
        licence=f"torchvision's {entry}: {entry.meta.get('license') or 'see the terms of the data it was trained on'}.",
        builder=partial(_build, name, **_as_published(name, entry)),
        classes=len(entry.meta["categories"]),
        files={other.name: _file(other) for other in sorted(entries, key=lambda other: other is not entry)},
    )
    spec = with_layers(spec)
    modules = dict(spec.build_meta().named_modules())
    linear = [path for path in spec.layers if isinstance(modules[path], nn.Linear)]
    return with_descriptor(spec, linear[-1] if linear else "")


def _build(name: str, classes: int, **arguments: Any) -> nn.Module:
    network: nn.Module = get_model(name, weights=None, num_classes=classes, **arguments)
    return network


def _file(entry: WeightsEnum) -> PublishedFile:
    return PublishedFile(entry.url, sha256=Path(entry.url).stem.rpartition("-")[2])  # its first digits end the name


def _as_published(name: str, entry: WeightsEnum) -> dict[str, Any]:
    """Arguments that torchvision itself sets where it loads its weights, and which are no part of them."""
    if name in ("googlenet", "inception_v3"):
        return {"transform_input": True, "aux_logits": True, "init_weights": False}
    if name.startswith("vit_"):
        return {"image_size": min(entry.meta["min_size"])}
    return {}


def _recipe(name: str, entry: WeightsEnum) -> Recipe:
    """The weights' own transforms; torchvision works on 0 … 1 and we on 0 … 255, so that last digits may differ."""
    preset = entry.transforms()
    ((short_side,), (size,)) = preset.resize_size, preset.crop_size
    return Recipe(
        name=f"{TORCHVISION}{name}@{entry.name}",
        size=size,
        resize="pil-crop",
        channels="RGB",
        mean=tuple(255 * value for value in preset.mean),
        scale=tuple(255 * value for value in preset.std),
        short_side=short_side,
        interpolation=preset.interpolation.value,
        note=f"the transforms of torchvision's {entry}",
    )


def imported_backbone(full: str) -> BackboneSpec:
    """``my_module:build_model``: a function of the user's, without arguments, that returns the network.

    The module is looked for in the current folder, too.
    """
    module_name, _, attribute = full.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise FeatureStoreError(
                f"`backbone` {full}: {module_name} needs {error.name}, which is missing."
            ) from error
        raise FeatureStoreError(
            f"`backbone` {full}: there is no module {module_name!r}. Give its name without folder and ending "
            "(my_net:build_model), and cd to the folder of my_net.py, or put that on PYTHONPATH."
        ) from None
    except Exception as error:  # anything may go wrong in a module that is not ours
        raise FeatureStoreError(f"`backbone` {full}: importing {module_name} failed: {error!r}.") from error
    build = getattr(module, attribute, None)
    if not callable(build):
        there = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise FeatureStoreError(
            f"`backbone` {full}: {module_name} has no function {attribute!r}. {near_matches(attribute, there)}"
        )
    spec = BackboneSpec(
        name=full,
        layers={},
        recipes=(),
        licence="a network of the user's own: see the terms of its weights.",
        builder=partial(_call, full, build),
        imported=True,
    )
    return with_layers(spec)


def _call(full: str, build: Any) -> nn.Module:
    try:
        network = build()
    except Exception as error:
        raise FeatureStoreError(
            f"`backbone` {full}: {type(error).__name__}: {error}. It is called without arguments."
        ) from error
    if not isinstance(network, nn.Module):
        raise FeatureStoreError(
            f"`backbone` {full} returned an object of type {type(network).__name__}, not a torch.nn.Module."
        )
    return network
