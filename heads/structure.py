"""What a head is made of: its layers, and what goes from which to which in one forward."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from heads.models.base import Head, StandardisedHead

LOGITS = "logits"
_STEPS = {
    "relu": "ReLU",
    "dropout": "Dropout",
    "normalize": "normalised to length 1",
}  # functions that a reader looks for


@dataclass
class Layer:
    """A module with weights, or the tensors that a head (or a part of it) keeps itself; shapes are without the batch.

    ``uses`` counts how often one example goes through it: 3 for a bridge that three items share. ``then`` names what is
    done to its result without weights.
    """

    kind: str
    shape_in: tuple[int, ...] = ()
    shape_out: tuple[int, ...] = ()
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    parameters: int = 0
    uses: int = 0
    then: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Structure:
    """``inputs`` (``x1`` …), ``layers`` by name in the order of computation, and ``edges`` between them and to ``LOGITS``.

    An edge stands there once for each tensor: three from a shared bridge. ``classes`` is the number of logits.
    """

    inputs: list[str]
    layers: dict[str, Layer]
    edges: list[tuple[str, str]]
    classes: int


def structure(head: Head) -> Structure:
    """Run ``head`` once on rows of zeros, on its own device, and follow the tensors from layer to layer."""
    device = next((tensor.device for tensor in head.state_dict().values()), torch.device("cpu"))
    inputs = {f"x{i + 1}": torch.zeros((1, *head.shape), device=device) for i in range(head.n_places)}
    trace = _Trace(head, inputs)
    training = head.training
    head.eval()
    with ExitStack() as stack:
        stack.callback(head.train, training)
        for name, module in head.named_modules():
            if module is not head and not list(module.children()):
                for hook in (
                    module.register_forward_pre_hook(trace.enter),
                    module.register_forward_hook(partial(trace.leave, name)),
                ):
                    stack.callback(hook.remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(trace)
        logits = head(*inputs.values())
    trace.join(trace.origin([logits]), LOGITS, 0)
    edges = [(source, target) for (source, _), (target, _) in trace.edges]
    return Structure(list(inputs), trace.layers, edges, logits.shape[1])


_Origin = frozenset[tuple[str, int]]  # layers or inputs, and which of their uses


class _Trace(TorchFunctionMode):
    """Follows tensors through a forward: from which use of which layer each one comes."""

    def __init__(self, head: Head, inputs: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.layers: dict[str, Layer] = {}
        self.edges: dict[tuple[tuple[str, int], tuple[str, int]], None] = {}
        self._in_module = False
        # The tensors stay beside their origins: the id of one that is freed would be given to another.
        self._origins = {id(rows): (rows, frozenset({(name, 0)})) for name, rows in inputs.items()}
        self._kept: dict[int, tuple[str, str, str]] = {}  # tensors of the head itself and of parts that have modules
        for path, module in head.named_modules():
            if module is head or list(module.children()):
                standardises = module is head and isinstance(head, StandardisedHead)
                kind = "(x − mean) × scale" if standardises else type(module).__name__
                kept = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
                self._kept |= {id(tensor): (path or "head", kind, name) for name, tensor in kept}

    def origin(self, tensors: list[torch.Tensor]) -> _Origin:
        """Where they come from, together."""
        return frozenset[tuple[str, int]]().union(
            *(self._origins.get(id(each), (each, frozenset()))[1] for each in tensors)
        )

    def join(self, origin: _Origin, name: str, use: int) -> _Origin:
        """Edges from ``origin`` to a use of layer ``name``, which is the origin of what comes out."""
        self.edges |= {(source, (name, use)): None for source in sorted(origin)}
        return frozenset({(name, use)})

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = list(_tensors(result))
        if self._in_module or not made:
            return result
        given = list(_tensors([args, kwargs]))
        origin = self.origin(given)
        for tensor in given:
            if id(tensor) in self._kept:
                origin = self._with_kept(tensor, origin)
        if getattr(func, "__name__", "") in _STEPS:
            self._then(origin, _STEPS[func.__name__])
        self._origins |= {id(tensor): (tensor, origin) for tensor in made}
        return result

    def _with_kept(self, tensor: torch.Tensor, origin: _Origin) -> _Origin:
        name, kind, key = self._kept[id(tensor)]
        layer = self.layers.setdefault(name, Layer(kind))
        if key not in layer.tensors:
            layer.tensors[key] = tuple(tensor.shape)
            layer.parameters += tensor.numel() if isinstance(tensor, nn.Parameter) else 0
        if {source for source, _ in origin} <= {name}:
            return origin  # it is in this layer already
        layer.uses += 1
        return self.join(frozenset(pair for pair in origin if pair[0] != name), name, layer.uses)

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before a module's forward: what it does inside is not looked at."""
        self._in_module = True

    def leave(self, name: str, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """After it: with weights it is a layer, without them a step after the one before."""
        self._in_module = False
        origin = self.origin(list(_tensors(inputs)))
        weights = {key: tuple(weight.shape) for key, weight in module.named_parameters()}
        if weights:
            layer = self.layers.setdefault(name, Layer(_kind(module), tensors=weights))
            layer.shape_in, layer.shape_out = tuple(inputs[0].shape[1:]), tuple(output.shape[1:])
            layer.parameters = sum(weight.numel() for weight in module.parameters())
            layer.uses += 1
            origin = self.join(origin, name, layer.uses)
        else:
            self._then(origin, type(module).__name__)
        self._origins[id(output)] = output, origin

    def _then(self, origin: _Origin, step: str) -> None:
        for name, _ in sorted(origin):
            if name in self.layers and step not in self.layers[name].then:
                self.layers[name].then.append(step)


def _kind(module: nn.Module) -> str:
    """As it prints, but for a linear layer, of which the shapes say all."""
    return "Linear" if isinstance(module, nn.Linear) else str(module)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    """Those in tuples, lists and dictionaries, however deep."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))
