"""Questions to a store's layers, answered in blocks on Dask, within a memory cap."""

from typing import TYPE_CHECKING

from featurestore.discovery import exported

if TYPE_CHECKING:
    from featurestore.queries.answers import answers_table
    from featurestore.queries.dissimilarity import rdm
    from featurestore.queries.identification import identification_table
    from featurestore.queries.layer_comparison import compare_layers
    from featurestore.queries.layer_statistics import mean, statistics
    from featurestore.queries.nearest import neighbours
    from featurestore.queries.similarity_analysis import rsa
    from featurestore.queries.units import unit_statistics, units_with_trait
    from featurestore.queries.verification import verify_faces
    from featurestore.queries.view_invariance import invariance

_WHERE = {
    "answers_table": "answers",
    "compare_layers": "layer_comparison",
    "identification_table": "identification",
    "invariance": "view_invariance",
    "mean": "layer_statistics",
    "neighbours": "nearest",
    "rdm": "dissimilarity",
    "rsa": "similarity_analysis",
    "statistics": "layer_statistics",
    "unit_statistics": "units",
    "units_with_trait": "units",
    "verify_faces": "verification",
}
__all__ = [
    "answers_table",
    "compare_layers",
    "identification_table",
    "invariance",
    "mean",
    "neighbours",
    "rdm",
    "rsa",
    "statistics",
    "unit_statistics",
    "units_with_trait",
    "verify_faces",
]
__getattr__ = exported(__name__, _WHERE)
