"""the same rule on raw activations; nothing is trained"""

from heads.models.similarity import SimilarityHead


def build(shape: tuple[int, ...], measure: str = "cosine") -> SimilarityHead:
    """``measure`` is ``cosine`` or ``dot``."""
    return SimilarityHead(shape, rank=0, measure=measure)
