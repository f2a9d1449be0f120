"""Layers of a network that torch.fx cannot trace, by forward hooks that copy each output at the moment it is made."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from featurestore.errors import FeatureStoreError
from featurestore.networks.spec import INPUT_OF


class _Complete(BaseException):
    """The last layer asked for is there. No Exception, which a network's own ``except`` could hold back."""


class HookedNetwork(nn.Module):
    """Maps images to ``{name: output}`` for ``layers`` (name to module path); the forward ends after the last of them.

    ``network`` is put into eval mode and frozen, not copied. Outputs are copies: no later operation writes into them.
    Raises FeatureStoreError at a forward in which a layer's module runs twice before its end, not at all, or gives no tensor.
    """

    def __init__(self, network: nn.Module, layers: Mapping[str, str]) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.layers = dict(layers)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """One forward pass."""
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str, output: object) -> torch.Tensor | None:
            if name in kept:
                raise FeatureStoreError(
                    f"layer {name!r}: its module runs several times in one forward pass. Leave it out."
                )
            if not isinstance(output, torch.Tensor):
                raise FeatureStoreError(f"layer {name!r} gives {_described(output)}, not a tensor. Leave it out.")
            kept[name] = output.clone()
            if len(kept) == len(self.layers):
                raise _Complete
            # What comes after is computed from the copy where a gradient is wanted, so that layers have one, too.
            return kept[name].clone() if kept[name].requires_grad else None

        with _hooks(self.network, self.layers, keep), suppress(_Complete):
            self.network(images)
        absent = [name for name in self.layers if name not in kept]
        if absent:
            raise FeatureStoreError(
                f"layer {absent[0]!r} was not computed for these pictures: the network's forward passes its module by, for some "
                "inputs at least. Leave it out."
            )
        return {name: kept[name] for name in self.layers}


def record(
    network: nn.Module,
    layers: Mapping[str, str],
    images: torch.Tensor,
    copy: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> dict[str, list[torch.Tensor | str]]:
    """Each layer's outputs in one whole forward pass, in the order in which they are made; empty for one that is not run.

    What is no tensor is given as a description of its type. The slow way that cannot be wrong.
    """
    made: dict[str, list[torch.Tensor | str]] = {}

    def keep(name: str, output: object) -> torch.Tensor | None:
        made.setdefault(name, []).append(copy(output) if isinstance(output, torch.Tensor) else _described(output))
        return None

    with _hooks(network, layers, keep), torch.no_grad():
        network(images)
    return {**made, **{name: [] for name in layers if name not in made}}


@contextmanager
def _hooks(
    network: nn.Module, layers: Mapping[str, str], keep: Callable[[str, object], torch.Tensor | None]
) -> Iterator[None]:
    """``keep(name, output)`` is called for every output of the layers' modules, or input where the path says so.

    The tensor that it returns, if any, takes its place in the network.
    """
    modules = dict(network.named_modules())

    def attach(name: str, path: str) -> Any:
        if path.startswith(INPUT_OF):
            module = modules[path.removeprefix(INPUT_OF)]
            return module.register_forward_pre_hook(lambda _, inputs: keep(name, inputs[0] if inputs else None))
        return modules[path].register_forward_hook(lambda _, inputs, output: keep(name, output))

    handles = [attach(name, path) for name, path in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _described(output: object) -> str:
    return "nothing" if output is None else f"a value of type {type(output).__name__}"
