"""The heads by name, without torch: what a command lists and completes."""

HEADS: dict[str, str] = {
    "conv": "bridge and convolutions over the stacked pairs, as published",
    "fc": "bridge and linear layers, as published; its authors found that it does not converge",
    "fc8-conv": "the earlier published head: fc8 of 300 features, then conv; for vectors such as fc7-relu",
    "fc8-fc": "the earlier published head with linear layers 900, 300, 3",
    "similarity": "linear map; the face left out of the most similar pair is odd; indifferent to order",
    "zero-shot": "the same rule on raw activations; nothing is trained",
    "identity": "the multi-view head: which face is this? Needs no trials",
}
