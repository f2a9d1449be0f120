"""What is drawn of a head is what it computes."""

from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from heads.describe import draw
from heads.registry import HEADS, build_head, draw_head
from heads.structure import LOGITS, structure

VECTOR, MAP = (4096,), (512, 7, 7)
OPTIONS = {"identity": {"faces": [f"face-{i}" for i in range(10)]}}
CASES = [(name, shape) for name in HEADS for shape in (VECTOR, MAP) if shape == VECTOR or not name.startswith("fc8")]
CASES = [*((name, shape, {}) for name, shape in CASES), *((name, MAP, {"parallel": True}) for name in ("conv", "fc"))]


@pytest.mark.parametrize(("name", "shape", "options"), CASES)
def test_every_weight_is_in_one_layer_and_every_input_reaches_the_logits(
    name: str, shape: tuple, options: dict
) -> None:
    head = build_head(name, shape, **options, **OPTIONS.get(name, {}))
    parts = structure(head)
    assert sum(layer.parameters for layer in parts.layers.values()) == sum(w.numel() for w in head.parameters())
    reached = set(parts.inputs)
    for source, target in parts.edges:  # in the order of the computation
        assert source in reached
        reached.add(target)
    assert reached == {*parts.inputs, *parts.layers, LOGITS}
    assert parts.classes == (10 if name == "identity" else 3)


def test_a_shared_bridge_is_one_layer_and_parallel_ones_are_three() -> None:
    shared, parallel = (structure(build_head("conv", MAP, parallel=each)) for each in (False, True))
    assert shared.layers["bridges.0.linear"].uses == 3
    assert shared.layers["bridges.0.linear"].then == ["ReLU", "Dropout"]
    assert shared.edges.count(("bridges.0.linear", "decision.0")) == 3
    assert [parallel.layers[f"bridges.{i}.linear"].uses for i in range(3)] == [1, 1, 1]
    assert [parallel.edges.count((f"bridges.{i}.linear", "decision.0")) for i in range(3)] == [1, 1, 1]


def test_shapes_are_those_of_the_computation() -> None:
    layers = structure(build_head("conv", VECTOR)).layers
    assert list(layers) == ["head", "bridges.0.linear", "decision.0", "decision.2", "decision.4", "decision.6"]
    assert [layers[f"decision.{i}"].shape_out for i in (0, 2, 4, 6)] == [
        (2, 3, 251),
        (2, 1, 152),
        (1, 1, 53),
        (1, 1, 3),
    ]
    assert layers["head"].tensors == {"mean": (4096,), "scale": ()}
    similarity = structure(build_head("similarity", VECTOR, rank=8)).layers["head"]
    assert similarity.tensors == {"scale": (), "down": (4096, 8), "up": (8, 4096), "log_factor": ()}
    assert similarity.then == ["normalised to length 1"]


def test_looking_changes_nothing() -> None:
    head = draw_head("fc", (400,), 0)
    rows = torch.randn(3, 2, 400)
    before = head.eval()(*rows)
    head.train()
    structure(head)
    assert head.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in head.modules())
    assert torch.equal(head.eval()(*rows), before)


@pytest.mark.parametrize(("name", "shape", "options"), CASES)
def test_a_drawing_fits_a_page(name: str, shape: tuple, options: dict, tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz")
    head = build_head(name, shape, **options, **OPTIONS.get(name, {}))
    picture = ElementTree.fromstring(draw(head, tmp_path / "head.svg").read_bytes())
    width, height = (float(picture.attrib[side].removesuffix("pt")) for side in ("width", "height"))
    assert height / width <= 297 / 210
    assert width < 1000  # points, at letters of 12: legible on a page
