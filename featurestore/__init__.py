"""An activation-caching feature store for face networks: pay for the backbone once, read it as memory maps."""

import sys
from typing import TYPE_CHECKING

from featurestore.discovery import exported
from featurestore.errors import FeatureStoreError

if sys.platform not in ("linux", "darwin"):
    raise ImportError(
        f"face-featurestore runs on Linux and macOS, not on {sys.platform}: its rows are memory-mapped side by side, which "
        "this system cannot do. On Windows use WSL 2."
    )

if TYPE_CHECKING:
    from featurestore.caching.activations import activations
    from featurestore.networks.summary import backbone_summary, draw_backbone
    from featurestore.queries.answers import answers_table
    from featurestore.queries.identification import identification_table
    from featurestore.store.reader import FeatureStore, Source

_WHERE = {
    "FeatureStore": "store.reader",
    "Source": "store.reader",
    "activations": "caching.activations",
    "answers_table": "queries.answers",
    "backbone_summary": "networks.summary",
    "draw_backbone": "networks.summary",
    "identification_table": "queries.identification",
}
__all__ = [
    "FeatureStore",
    "FeatureStoreError",
    "Source",
    "activations",
    "answers_table",
    "backbone_summary",
    "draw_backbone",
    "identification_table",
]
__getattr__ = exported(__name__, _WHERE)
