"""A head's answers to examples."""

from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pandas as pd
import torch

from featurestore.errors import FeatureStoreError
from heads.features import Features
from heads.models.base import Head
from heads.scores import by_position

_EXAMPLES = 1024  # evaluated at a time


@dataclass(frozen=True)
class OrderAudit:
    """``positions`` as ``by_position``, over all six orders of every trial; ``consistent`` is the share of trials for which
    the same item is called odd in all six orders: 1 for an order-invariant head."""

    positions: pd.DataFrame
    consistent: float


def audit_order(head: Head, features: Features, items: np.ndarray, odd: np.ndarray) -> OrderAudit:
    """Ask a triplet head about every order of each trial; ``items`` (n, 3), ``odd`` (n,)."""
    orders = np.array(list(permutations(range(3))))
    places, answers, chosen = [], [], []
    for order in orders:
        predicted = evaluate(head, features, items[:, order]).argmax(axis=1)
        places.append((order == odd[:, None]).argmax(axis=1))
        answers.append(predicted)
        chosen.append(order[predicted])  # which of the three in the trial's own order
    same = (np.stack(chosen) == chosen[0]).all(axis=0)
    return OrderAudit(by_position(np.concatenate(places), np.concatenate(answers)), float(same.mean()))


def evaluate(head: Head, features: Features, items: np.ndarray) -> np.ndarray:
    """Logits (n, classes) float32 of examples (n, n_places), item numbers of ``features``. No dropout, no gradient.

    FeatureStoreError if any is NaN or infinite: its largest would be a place like any other.
    """
    logits = raw_logits(head, features, items)
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if len(bad):
        layer = features.parts[0].layer
        raise FeatureStoreError(
            f"the head's answers to {len(bad)} of {len(items)} examples are not finite numbers, so layer {layer.name!r} holds "
            f"NaN or infinite rows, or the head's weights do. Find such rows: pipelines/verify_store.py {layer.store}"
        )
    return logits


def raw_logits(head: Head, features: Features, items: np.ndarray) -> np.ndarray:
    """As ``evaluate``, whatever they are."""
    out = []
    with torch.no_grad():
        parts = torch.from_numpy(np.asarray(items)).split(_EXAMPLES)
        for rows, (_, examples) in features.gathered(part.unique(return_inverse=True) for part in parts):
            logits = head.logits(rows, examples.to(features.device))
            out.append(logits.float().cpu())
    return torch.cat(out).numpy()
