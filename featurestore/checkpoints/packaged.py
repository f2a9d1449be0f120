"""Weights that come with an installed Python package, whose file is found without importing the package."""

import importlib.util
from pathlib import Path

from featurestore.errors import FeatureStoreError
from featurestore.files import sha256_of
from featurestore.networks.registry import BACKBONES
from featurestore.networks.spec import BackboneSpec, PackagedFile

PACKAGED = "packaged"  # ``weights``: those of an installed package


def packaged_file(spec: BackboneSpec) -> Path:
    """The file of a network's weights in the package that holds it, its sha256 compared.

    FeatureStoreError if no package holds weights of this network, if it is not installed, or if its file is another one.
    """
    packaged = spec.packaged
    if packaged is None:
        having = ", ".join(name for name, other in BACKBONES.items() if other.packaged)
        raise FeatureStoreError(
            f"no Python package holds weights of {spec.name}; one holds those of {having}. Give `weights` a FILE."
        )
    path = _find(packaged)
    if path is None:
        raise FeatureStoreError(
            f"the weights of {spec.name} come with the Python package {packaged.package}, which is not installed here. "
            f"Install it: pip install {packaged.package} (the extra named trained has it), or give `weights` the FILE "
            f"{Path(packaged.path).name}."
        )
    digest = sha256_of(path)
    if digest != packaged.sha256:
        raise FeatureStoreError(
            f"{path} has the sha256 {digest[:16]}…, not {packaged.sha256[:16]}…: it was changed or damaged. Uninstall "
            f"{packaged.package} and install it anew, or give `weights` a FILE."
        )
    return path


def _find(packaged: PackagedFile) -> Path | None:
    """Where the file is; None if the package is not installed, or has no such file.

    Nothing of the package is run: the ``__init__`` of an old one may fail where its files are as good as ever.
    """
    found = importlib.util.find_spec(packaged.package)
    folders = (found and found.submodule_search_locations) or ()
    return next((path for folder in folders if (path := Path(folder, packaged.path)).is_file()), None)
