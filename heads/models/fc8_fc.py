"""the earlier published head with linear layers 900, 300, 3"""

from heads.models.fc import FcDecision
from heads.models.triplet import TripletHead, require_vectors


def build(shape: tuple[int, ...]) -> TripletHead:
    """FeatureStoreError for rows that are no vectors."""
    return TripletHead(require_vectors(shape), lambda width: FcDecision(width, hidden=300))
