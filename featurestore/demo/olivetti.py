"""The Olivetti faces as files: 400 real photographs of 40 people, fetched by scikit-learn."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from featurestore.errors import FeatureStoreError

N_IMAGES = 400


def fetch_olivetti(folder: Path, progress: Callable[[int], object] = lambda n: None) -> None:
    """Write ``s1/1.png`` … ``s40/10.png``, 64 × 64 grey, into ``folder``; photographs that are there stay as they are.

    The photographs were taken at AT&T Laboratories Cambridge from 1992 to 1994 and may not be passed on with this software.
    scikit-learn downloads them and compares their sha256. Raises FeatureStoreError without scikit-learn or a network.
    """
    paths = [folder / f"s{i // 10 + 1}" / f"{i % 10 + 1}.png" for i in range(N_IMAGES)]
    if all(path.exists() for path in paths):
        return
    try:
        from sklearn.datasets import fetch_olivetti_faces
    except ImportError as error:
        raise FeatureStoreError(
            f"fetching the Olivetti faces needs scikit-learn ({error}): pip install 'face-featurestore[trained]'."
        ) from None
    try:
        # No pickle of an earlier download is ever opened; that it tries again is not for the user to read.
        with tempfile.TemporaryDirectory() as cache, warnings.catch_warnings(action="ignore", category=UserWarning):
            images = fetch_olivetti_faces(data_home=cache).images
    except (OSError, ValueError) as error:
        raise FeatureStoreError(
            f"the Olivetti faces could not be fetched: {error}. Use photographs of your own instead, as person/photograph.jpg."
        ) from None
    for path, image in zip(paths, images, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.rint(image * 255).astype(np.uint8))
        progress(1)
