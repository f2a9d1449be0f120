"""timm's networks: ``timm:NAME``, with the data configuration of their weights as the recipe."""

import math
from functools import partial
from typing import Any

from torch import nn

from featurestore.errors import FeatureStoreError
from featurestore.networks.capture import with_descriptor, with_layers
from featurestore.networks.spec import TIMM, BackboneSpec
from featurestore.photos.recipes import Recipe
from featurestore.text import near_matches


def timm_backbone(full: str) -> BackboneSpec:
    """``timm:resnet18`` with the configuration of its default weights, ``timm:resnet18.a1_in1k`` with that of those."""
    try:
        import timm
    except ImportError as error:
        raise FeatureStoreError(
            f"`backbone` {full} needs timm, which cannot be imported ({error}). Install it: pip install timm, or this package "
            "with its extra: face-featurestore[timm]."
        ) from None
    given = full.removeprefix(TIMM)
    name, _, tag = given.partition(".")
    if not timm.is_model(name):
        raise FeatureStoreError(
            f"timm {timm.__version__} has no network {name!r}. "
            + near_matches(name, timm.list_models(), "Python lists them: timm.list_models().")
        )
    tagged = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tagged:
        raise FeatureStoreError(f"timm's {name} has no weights {tag!r}. {near_matches(tag, tagged, 'It has none.')}")
    config = timm.get_pretrained_cfg(given)
    spec = BackboneSpec(
        name=full,
        layers={},
        recipes=tuple(_recipes(f"{TIMM}{name}" + (f".{config.tag}" if config.tag else ""), config)),
        licence=f"timm's {given}: {config.license or 'see the terms of its weights'}.",
        builder=partial(_build, given),
        classes=config.num_classes or None,
        elsewhere=f"timm's weights are downloaded manually, {config.hf_hub_id or config.url or 'where there are any'}: "
        "give `weights` their file (model.safetensors).",
    )
    return with_descriptor(with_layers(spec), config.classifier if isinstance(config.classifier, str) else "")


def _build(name: str, classes: int | None = None) -> nn.Module:
    import timm

    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
    return network


def _recipes(name: str, config: Any) -> list[Recipe]:
    """timm's transform for evaluation, at the size of training; none where a recipe cannot say it."""
    from timm.data import resolve_data_config

    data = resolve_data_config({}, pretrained_cfg=config.to_dict())
    (_, height, width), mode = data["input_size"], data["crop_mode"]
    short_side = math.floor(height / data["crop_pct"])
    squashed = mode == "squash" and short_side == height
    if height != width or data["interpolation"] not in ("bilinear", "bicubic") or not (mode == "center" or squashed):
        return []
    return [
        Recipe(
            name=name,
            size=height,
            resize="pil" if squashed else "pil-crop",
            channels="RGB",
            mean=tuple(255 * value for value in data["mean"]),
            scale=tuple(255 * value for value in data["std"]),
            short_side=None if squashed else short_side,
            interpolation=data["interpolation"],
            note=f"timm's data configuration of {name.removeprefix(TIMM)}",
        )
    ]
