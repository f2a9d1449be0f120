"""An activation-caching feature store for face networks: pay for the backbone once, read it as memory maps."""

import sys
from typing import TYPE_CHECKING, Any

from featurestore.errors import FeatureStoreError

if sys.platform not in ("linux", "darwin"):
    raise ImportError(
        f"face-featurestore runs on Linux and macOS, not on {sys.platform}: its rows are memory-mapped side by side, which "
        "this system cannot do. On Windows use WSL 2."
    )

if TYPE_CHECKING:
    from featurestore.caching.activations import activations
    from featurestore.queries.answers import answers_table
    from featurestore.queries.identification import identification_table
    from featurestore.store.reader import FeatureStore, Source

__all__ = ["FeatureStore", "FeatureStoreError", "Source", "activations", "answers_table", "identification_table"]


def __getattr__(name: str) -> Any:
    """Load pandas only for those who open a store: commands print their help without it."""
    if name == "answers_table":
        from featurestore.queries.answers import answers_table

        return answers_table
    if name == "identification_table":
        from featurestore.queries.identification import identification_table

        return identification_table
    if name == "activations":
        from featurestore.caching.activations import activations

        return activations
    if name in __all__:
        from featurestore.store import reader

        return getattr(reader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
