"""The network's own answer: which of the classes that it was trained on it takes each photograph for."""

import os

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.keys import KEY
from featurestore.photos.identities import class_names
from featurestore.store.reader import FeatureStore, Source
from featurestore.text import listing

CLASSIFIERS = ("fc8", "fc", "logits")  # of VGG-Face, VGGFace2's and torchvision's ResNets, FaceNet
_BLOCK = 1024  # items at a time


def answers_table(
    store: FeatureStore,
    labels: str | os.PathLike[str] | None = None,
    layer: str | None = None,
    source: str | None = None,
    top: int = 5,
) -> pd.DataFrame:
    """The ``top`` most probable classes of every item, the most probable first, from the network's last layer.

    ``layer`` holds a number for each class; without it ``fc8``, ``fc`` or ``logits`` of the source. ``labels`` names the classes,
    see ``photos.identities.class_names``; without it they are called by their number, from 0.

    Columns: face_id, view, rank (from 1), class (from 0), identity (``Class_ID``, or the name), label, probability (softmax over
    all classes), right (whether the identity is the face; missing where the face is none of the classes). Items that the layer
    has no row of are left out. Raises FeatureStoreError for a source without such a layer, and for labels of another number of
    classes.
    """
    found = source_with_classes(store, layer, source)
    name = layer or next(name for name in CLASSIFIERS if name in found.layers)
    shape = found.layer(name).shape
    if len(shape) != 1:
        raise FeatureStoreError(
            f"layer {name!r} has a map of {'×'.join(map(str, shape))} for each item, not a number for each class. "
            "Choose another `layer`."
        )
    n_classes = shape[0]
    top = min(top, n_classes)
    numbers = pd.Series(range(n_classes)).astype(str)
    known = class_names(labels, n_classes) if labels else pd.DataFrame({"identity": numbers, "label": numbers})
    rows = found.rows(name)
    items = np.flatnonzero(rows.present)
    classes, probabilities = np.empty((len(items), top), np.int64), np.empty((len(items), top))
    for start in range(0, len(items), _BLOCK):
        block = slice(start, start + _BLOCK)
        values = rows.gather(items[block]).double()
        best = values.topk(top, dim=1).indices  # of the values themselves: small probabilities are all zero
        classes[block], probabilities[block] = best.numpy(), values.softmax(1).gather(1, best).numpy()
    table = found.keys[np.repeat(items, top)].to_frame(index=False)
    flat = classes.ravel()
    identity = known["identity"].to_numpy(object)[flat]
    right = pd.Series(table["face_id"] == identity, dtype="boolean").where(table["face_id"].isin(known["identity"]))
    columns = {
        "rank": np.tile(np.arange(1, top + 1), len(items)),
        "class": flat,
        "identity": identity,
        "label": known["label"].to_numpy(object)[flat],
        "probability": probabilities.ravel(),
        "right": right,
    }
    return table.assign(**columns)


def right_within(table: pd.DataFrame, rank: int) -> pd.Series:
    """Of an ``answers_table``, bool per item (face_id, view) whose face is a class: whether it is among the first ``rank``."""
    asked = table[table["right"].notna()]
    right = asked["right"].astype(bool) & (asked["rank"] <= rank)
    return right.groupby([asked[name] for name in KEY], sort=False).any()


def source_with_classes(store: FeatureStore, layer: str | None = None, source: str | None = None) -> Source:
    """The source asked for, or the only one with a layer of ``CLASSIFIERS``; errors as ``answers_table``."""
    if source is not None or layer is not None:
        found = store.source(source, [layer] if layer else ())
    else:
        having = [each for each in store.sources.values() if each.layers.keys() & set(CLASSIFIERS)]
        if len(having) > 1:
            names = listing(each.name for each in having)
            raise FeatureStoreError(
                f"{len(having)} sources of {store.path} hold the answers of a network, so say which: `source`, one of {names}."
            )
        found = having[0] if having else store.source()
    if layer is None and not found.layers.keys() & set(CLASSIFIERS):
        raise FeatureStoreError(
            f"{found.name} holds none of {', '.join(CLASSIFIERS)}, but {listing(found.layers)}. Add the layer that holds a "
            "number for each class with pipelines/cache_layers.py, or name it: `layer`."
        )
    return found
