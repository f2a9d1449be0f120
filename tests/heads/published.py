"""The published heads as their authors wrote them down (facts: key names, sizes, order), in plain torch modules.

What the tests compare with: nothing here is shared with ``heads``.
"""

from collections import OrderedDict

import torch
from torch import nn

DROPOUT = 0.5


def bridge(block: int, n_features: int) -> nn.ModuleDict:
    name, width = f"fc{block + 1}", 4096 if block <= 5 else 300
    return nn.ModuleDict(
        OrderedDict(
            {name: nn.Linear(n_features, width), f"{name}-relu": nn.ReLU(), f"{name}-dropout": nn.Dropout(DROPOUT)}
        )
    )


def conv_decision(block: int) -> nn.ModuleDict:
    a, b = block + 2, block + 3
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if block <= 5:
        layers[f"conv_d_{a}_1"] = nn.Conv2d(1, 2, (2, 50), stride=(2, 1))
        layers[f"relu_d_{a}_1"] = nn.ReLU()
        layers[f"conv_d_{a}_2"] = nn.Conv2d(2, 2, (3, 100), stride=(1, 2))
        layers[f"relu_d_{a}_2"] = nn.ReLU()
        layers[f"conv_d_{a}_3"] = nn.Conv2d(2, 1, (1, 100), stride=2)
        layers[f"relu_d_{a}_3"] = nn.ReLU()
        layers[f"conv_d_{a}_4"] = nn.Conv2d(1, 1, (1, 100), stride=3)
        layers[f"relu_d_{a}_4"] = nn.ReLU()
        layers[f"conv_d_{a}_5"] = nn.Conv2d(1, 1, (1, 80), stride=3)
        layers[f"relu_d_{a}_5"] = nn.ReLU()
        layers[f"conv_d_{b}_1"] = nn.Conv2d(1, 1, (1, 65))
    else:
        layers[f"conv_d_{a}_1"] = nn.Conv2d(1, 2, (2, 50), stride=(2, 1))
        layers[f"relu_d_{a}_1"] = nn.ReLU()
        layers[f"conv_d_{a}_2"] = nn.Conv2d(2, 2, (3, 100))
        layers[f"relu_d_{a}_2"] = nn.ReLU()
        layers[f"conv_d_{a}_3"] = nn.Conv2d(2, 1, (1, 100))
        layers[f"relu_d_{a}_3"] = nn.ReLU()
        layers[f"conv_d_{b}_1"] = nn.Conv2d(1, 1, (1, 51))
    return nn.ModuleDict(layers)


def fc_decision(block: int) -> nn.ModuleDict:
    a, b = f"fc_d_{block + 2}", f"fc_d_{block + 3}"
    if block > 5:
        return nn.ModuleDict({a: nn.Linear(900, 3)})
    return nn.ModuleDict(
        OrderedDict(
            {
                a: nn.Linear(12288, 1024),
                f"{a}-relu": nn.ReLU(),
                f"{a}-dropout": nn.Dropout(DROPOUT),
                b: nn.Linear(1024, 3),
            }
        )
    )


class Published(nn.Module):
    """The frozen-core head cut at a layer of ``block``."""

    def __init__(self, block: int, n_features: int, conv: bool, parallel: bool) -> None:
        super().__init__()
        if parallel:
            self.vgg_core_bridge = nn.ModuleDict({f"bridge{i}": bridge(block, n_features) for i in (1, 2, 3)})
        else:
            self.vgg_core_bridge = bridge(block, n_features)
        self.parallel, self.conv = parallel, conv
        self.decision_block = conv_decision(block) if conv else fc_decision(block)

    def forward(self, *three: torch.Tensor) -> torch.Tensor:
        items = []
        for i, x in enumerate(three, start=1):
            x = x.flatten(1)
            for layer in (self.vgg_core_bridge[f"bridge{i}"] if self.parallel else self.vgg_core_bridge).values():
                x = layer(x)
            items.append(x)
        x1, x2, x3 = items
        x = torch.stack((x1, x2, x1, x3, x2, x3), 1)[:, None] if self.conv else torch.cat(items, 1)
        for layer in self.decision_block.values():
            x = layer(x)
        return x.flatten(1)


class Earlier(nn.Module):
    """The head before that: fc8 of 300 on fc7-relu, then conv, or linear layers 900, 300, 3."""

    def __init__(self, conv: bool) -> None:
        super().__init__()
        self.vgg_core_fc8 = nn.ModuleDict({"fc8": nn.Linear(4096, 300)})
        self.conv = conv
        self.decision_block = (
            conv_decision(7)
            if conv
            else nn.ModuleDict(
                OrderedDict(
                    {
                        "fc_d_9": nn.Linear(900, 300),
                        "fc_d_9-relu": nn.ReLU(),
                        "fc_d_9-dropout": nn.Dropout(DROPOUT),
                        "fc_d_10": nn.Linear(300, 3),
                    }
                )
            )
        )

    def forward(self, *three: torch.Tensor) -> torch.Tensor:
        x1, x2, x3 = (torch.relu(self.vgg_core_fc8["fc8"](x)) for x in three)
        x = torch.stack((x1, x2, x1, x3, x2, x3), 1)[:, None] if self.conv else torch.cat((x1, x2, x3), 1)
        for layer in self.decision_block.values():
            x = layer(x)
        return x.flatten(1)
