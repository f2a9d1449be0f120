"""Figures of results for papers: matrices, sheets of photographs, curves, maps of relevance."""

from typing import TYPE_CHECKING

from featurestore.discovery import exported

if TYPE_CHECKING:
    from featurestore.figures.canvas import check_ending
    from featurestore.figures.curves import draw_invariance, draw_roc, draw_rsa
    from featurestore.figures.explanations import draw_deletion, draw_mean_maps, draw_regions, draw_trial
    from featurestore.figures.matrices import clustered_order, draw_layer_matrix, draw_rdm
    from featurestore.figures.sheets import draw_neighbours

_WHERE = {
    "check_ending": "canvas",
    "clustered_order": "matrices",
    "draw_deletion": "explanations",
    "draw_invariance": "curves",
    "draw_layer_matrix": "matrices",
    "draw_mean_maps": "explanations",
    "draw_neighbours": "sheets",
    "draw_rdm": "matrices",
    "draw_regions": "explanations",
    "draw_roc": "curves",
    "draw_rsa": "curves",
    "draw_trial": "explanations",
}
__all__ = [
    "check_ending",
    "clustered_order",
    "draw_deletion",
    "draw_invariance",
    "draw_layer_matrix",
    "draw_mean_maps",
    "draw_neighbours",
    "draw_rdm",
    "draw_regions",
    "draw_roc",
    "draw_rsa",
    "draw_trial",
]
__getattr__ = exported(__name__, _WHERE)
