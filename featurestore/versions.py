"""Versions of the libraries on which the last digits of an activation depend."""

import importlib.metadata
import platform
from contextlib import suppress

_RECORDED = ("torch", "torchvision", "numpy", "pillow", "opencv-python-headless", "face-featurestore")


def library_versions() -> dict[str, str]:
    """By package name, and ``python``; packages that are not installed are left out."""
    versions = {"python": platform.python_version()}
    for name in _RECORDED:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
