"""the earlier published head: fc8 of 300 features, then conv; for vectors such as fc7-relu"""

from heads.models.conv import ConvDecision
from heads.models.triplet import TripletHead, require_vectors


def build(shape: tuple[int, ...]) -> TripletHead:
    """FeatureStoreError for rows that are no vectors."""
    return TripletHead(require_vectors(shape), ConvDecision)
