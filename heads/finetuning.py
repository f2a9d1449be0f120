"""A head together with the last part of its backbone, trained end to end."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import fx, nn

from featurestore.caching.extractor import network_part
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import get_backbone, known_backbone
from featurestore.networks.shapes import layer_shapes, with_input_size
from featurestore.networks.spec import BackboneSpec
from featurestore.networks.tracing import extractor
from heads.models.base import Head

INPUT = "input"  # fine-tuned from the images on: the published end-to-end variant
CHUNK_BYTES = 1 << 30  # of what the part computes for the items that it takes at a time; their gradients take as much


@dataclass(frozen=True)
class NetworkPart:
    """Which part of which network: from the rows of layer ``start`` (or ``input``, its normalised images) to layer ``end``.

    ``size`` is the side of its images in pixels, ``classes`` how many the weights have, where that varies.
    """

    backbone: str
    start: str
    end: str
    size: int
    classes: int | None = None

    @classmethod
    def of(cls, spec: BackboneSpec, start: str, end: str, size: int) -> "NetworkPart":
        """That of a network with an input of ``size`` pixels."""
        return cls(spec.name, start, end, size, spec.classes)

    @property
    def first(self) -> str | None:
        """``start``, None for the images."""
        return None if self.start == INPUT else self.start

    def spec(self, trusted: str | None = None) -> BackboneSpec:
        """The network. Code of a user's own is imported only if it has the name ``trusted``; else FeatureStoreError."""
        spec = known_backbone(self.backbone) or (get_backbone(self.backbone) if self.backbone == trusted else None)
        if spec is None:
            raise FeatureStoreError(
                f"this head was fine-tuned with part of {self.backbone!r}, which is code outside of this program. "
                f"If you trust it, name it: `backbone` {self.backbone}"
            )
        spec = spec if self.classes is None or spec.classes is None else spec.with_classes(self.classes)
        return with_input_size(spec, self.size)


@dataclass(frozen=True)
class Block:
    """A module of the network with weights of its own: how many, and whether they are trained (``requires_grad``)."""

    name: str
    parameters: int
    trainable: bool


def blocks(spec: BackboneSpec, part: NetworkPart) -> list[Block]:
    """Those up to ``part.end``, in the order in which the network holds them."""
    whole = extractor(spec.build_meta(), {part.end: spec.layers[part.end]})
    trained = {name for name, _ in network_part(spec, part.first, part.end).named_parameters()}
    found = []
    for path, module in whole.named_modules():
        own = {f"{path}.{name}": weight.numel() for name, weight in module.named_parameters(recurse=False)}
        if own:
            found.append(Block(path, sum(own.values()), own.keys() <= trained))
    return found


def part_shape(spec: BackboneSpec, part: NetworkPart) -> tuple[int, ...]:
    """The shape of a row that the part takes: that of layer ``start``, or (3, size, size)."""
    return (3, part.size, part.size) if part.first is None else layer_shapes(spec, [part.start])[part.start]


class FinetunedHead(Head):
    """``head`` on the layer ``part.end`` behind ``backbone``, the part of the network that leads there; both are trained.

    It takes rows of ``part.start`` (n, *shape). The backbone stays in eval mode: batch norm keeps its statistics (its scale and
    shift are trained), and the backbone's own dropout is off. Standardisation is that of ``head``. Rows go through the backbone a
    few at a time, so memory does not grow with the batch.
    """

    def __init__(self, part: NetworkPart, spec: BackboneSpec, backbone: nn.Module, head: Head) -> None:
        super().__init__(part_shape(spec, part))
        self.part = part
        self.blocks = blocks(spec, part)
        self.backbone, self.head = backbone, head
        self.n_places = head.n_places
        self.architecture = head.architecture
        self._spec = spec

    @cached_property
    def chunk(self) -> int:
        """Rows in one pass through the backbone."""
        counted = _Counted(network_part(self._spec, self.part.first, self.part.end).to("meta"))
        with torch.no_grad():
            counted.run(torch.empty(2, *self.shape, device="meta"))
        return max(1, CHUNK_BYTES // max(1, counted.elements // 2 * 4))

    @property
    def low_precision(self) -> bool:
        """Whether the head's bridge multiplies in bfloat16; the backbone does not."""
        return self.head.low_precision

    @low_precision.setter
    def low_precision(self, low: bool) -> None:
        self.head.low_precision = low

    def backbone_parameters(self) -> list[nn.Parameter]:
        """See ``Head.backbone_parameters``."""
        return list(self.backbone.parameters())

    def train(self, mode: bool = True) -> "FinetunedHead":
        """The head alone: the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def layer_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of ``part.start`` (n, *shape) to rows of ``part.end``."""
        return torch.cat([self.backbone(few) for few in rows.split(self.chunk)])

    def forward(self, *rows: torch.Tensor) -> torch.Tensor:
        """Logits of one tensor of rows (n, *shape) for each place."""
        logits: torch.Tensor = self.head(*(self.backbone(each) for each in rows))
        return logits

    def logits(
        self, rows: torch.Tensor, examples: torch.Tensor, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """See ``Head.logits``."""
        return self.head.logits(self.layer_rows(rows), examples, generator)

    def penalty(self) -> torch.Tensor | None:
        """The head's own."""
        return self.head.penalty()

    def accumulate(
        self, rows: torch.Tensor, examples: torch.Tensor, labels: torch.Tensor, generator: torch.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``Head.accumulate``. More rows than ``chunk`` are computed twice: without gradient, then with it."""
        few_rows = rows.split(self.chunk)
        with torch.set_grad_enabled(len(few_rows) == 1):
            reached = self.layer_rows(rows)
        leaf = reached.detach().requires_grad_()
        loss, logits = self.head.accumulate(leaf, examples, labels, generator)
        gradient = cast(torch.Tensor, leaf.grad)
        for few, share in zip(few_rows, gradient.split(self.chunk), strict=True):
            (reached if len(few_rows) == 1 else self.backbone(few)).backward(share)
        return loss, logits


def unloaded_finetuned_head(part: NetworkPart, head: Head, trusted: str | None = None) -> FinetunedHead:
    """One whose part of the network has weights still to be loaded. ``trusted`` as for ``NetworkPart.spec``."""
    spec = part.spec(trusted)
    return FinetunedHead(part, spec, network_part(spec, part.first, part.end), head)


class _Counted(fx.Interpreter):
    """Counts the numbers that a forward pass computes."""

    elements = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor) and n.op != "output":
            self.elements += math.prod(result.shape)
        return result


def described_part(part: NetworkPart) -> dict[str, Any]:
    """As JSON."""
    return asdict(part)


def part_from_file(document: Mapping[str, Any]) -> NetworkPart:
    """The reverse; ValueError, KeyError or TypeError if it describes none."""
    part = NetworkPart(**document)
    texts = part.backbone, part.start, part.end
    classes = 1 if part.classes is None else part.classes
    if all(isinstance(each, str) for each in texts) and 0 < int(part.size) <= 4096 and 0 < int(classes) < 1 << 24:
        return part
    raise ValueError(f"{document!r} describes no part of a network")
