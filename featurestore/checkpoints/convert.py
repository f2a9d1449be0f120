"""Any checkpoint of a known network, written as safetensors with its origin."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from featurestore.checkpoints.fitting import best_fit, looks_like
from featurestore.checkpoints.reader import open_tensors
from featurestore.checkpoints.weights import Weights, open_weights
from featurestore.errors import FeatureStoreError
from featurestore.files import replacing
from featurestore.networks.registry import BACKBONES
from featurestore.networks.spec import BackboneSpec
from featurestore.versions import library_versions


def recognise(path: Path) -> list[str]:
    """The face networks that a file's keys and shapes fit, whole or cut short at a known place.

    Those that share an architecture, such as resnet50_ft and resnet50_scratch, are listed together.
    FeatureStoreError if there is none.
    """
    file = open_tensors(path)
    fitting = [name for name, spec in BACKBONES.items() if not best_fit(file, spec).problems]
    if not fitting:
        raise FeatureStoreError(
            f"{path} is no checkpoint of {', '.join(BACKBONES)}. {looks_like(file)}"
            "If it belongs to another network, say which: `backbone` torchvision:NAME or my_module:build_model."
        )
    return fitting


def convert(path: Path, spec: BackboneSpec, out: Path, overwrite: bool = False) -> Weights:
    """Write ``path``'s weights of ``spec`` to ``out`` under the published keys, float32, and give them back as they were read.

    The file's metadata hold ``origin`` (its name), ``origin_sha256``, ``origin_layout``, ``backbone``, ``licence`` and
    ``library_versions``. Nothing is left of ``out`` if it cannot be finished. Raises FeatureStoreError for a file that does not
    fit, and for one that would be overwritten.
    """
    if out.suffix != ".safetensors":
        raise FeatureStoreError(f"`out` {out} has to end in .safetensors, which is what is written.")
    if out.resolve() == path.resolve():
        raise FeatureStoreError(f"{path} cannot be converted into itself. Choose another `out`.")
    if not path.is_file():
        raise FeatureStoreError(f"{path} is a folder, not a file." if path.is_dir() else f"there is no file {path}.")
    weights = open_weights(str(path), spec)
    if out.exists() and not overwrite:
        raise FeatureStoreError(f"{out} exists. Choose another `out`, or add `overwrite`.")
    metadata = {
        "origin": weights.name,
        "origin_sha256": weights.identity,
        "origin_layout": weights.layout,
        "backbone": weights.backbone.name,
        "licence": weights.backbone.licence,
        "library_versions": json.dumps(library_versions()),
    }
    if weights.notes:
        metadata["notes"] = "; ".join(weights.notes)
    # A copy of each: safetensors refuses tensors that share memory, as tied weights do.
    tensors = {
        key: value.clone(memory_format=torch.contiguous_format) for key, value in weights.read(weights.keys).items()
    }
    try:
        with replacing(out) as partial:
            save_file(tensors, partial, metadata)
    except (SafetensorError, OSError) as error:
        raise FeatureStoreError(f"{out} cannot be written: {error}") from None
    return weights
