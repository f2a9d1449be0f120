"""Heads against the published implementation's numbers, against plain torch modules, and against their own definition."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from featurestore import FeatureStoreError
from featurestore.checkpoints.seeded import draw_weights
from heads.checkpoints import load_head
from heads.models.banded import convolve
from heads.models.base import Head
from heads.models.similarity import SimilarityHead
from heads.published import export
from heads.registry import HEADS, build_head, draw_head
from tests.heads.published import Earlier, Published

SHAPES = {"maxp_5_3": (512, 7, 7), "fc7-relu": (4096,)}


def relative(ours: torch.Tensor | np.ndarray, theirs: torch.Tensor | np.ndarray) -> float:
    a, b = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, np.float64) for x in (ours, theirs))
    return 0.0 if not a.any() and not b.any() else float(np.abs(a - b).max() / np.abs(b).max())


def some_rows(shape: tuple[int, ...], n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, *shape), generator=generator).clamp_min(0)


def some_triplets(n: int, items: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    triplets = np.stack([rng.choice(items, 3, replace=False) for _ in range(n)])
    return torch.from_numpy(triplets), torch.from_numpy(rng.integers(0, 3, n))


@pytest.mark.parametrize("layer", SHAPES)
def test_logits_loss_and_gradients_equal_the_published_implementation(parity: Path, tmp_path: Path, layer: str) -> None:
    about = json.loads((parity / "heads.json").read_text())[f"frozen/conv/{layer}/shared"]
    shapes = {key: tuple(shape) for key, shape in about["keys"]}
    seed = {key: about["seed_bridge" if "bridge" in key else "seed_decision"] for key in shapes}
    torch.save({key: draw_weights(seed[key], [key], shapes)[key] for key in shapes}, tmp_path / "published.pth")
    head = load_head(tmp_path / "published.pth", layer=layer)
    rng = np.random.default_rng(zlib.crc32(f"triplets:{layer}".encode()))
    x = torch.from_numpy(np.maximum(rng.standard_normal((3, 8, head.n_features)), 0).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 3, 8))
    expected = np.load(parity / "expected.npz")
    prefix = f"head/frozen/conv/{layer}/shared|"
    assert np.array_equal(labels.numpy(), expected[prefix + "labels"])

    rows, triplets = x.flatten(0, 1), torch.arange(24).view(3, 8).t()
    fast = head.logits(rows, triplets)
    loss, _ = head.accumulate(rows, triplets, labels, generator=None)
    for logits in (fast, head(*x)):
        assert relative(logits, expected[prefix + "logits"]) < 1e-5
    assert relative(loss, expected[prefix + "loss"]) < 1e-5
    export(head, tmp_path / "again.pth", layer)  # the published names of our parameters, in file order
    gradients = dict(zip(torch.load(tmp_path / "again.pth"), (p.grad for p in head.parameters()), strict=True))
    order = about["param_names_in_grad_norms_order"]
    norms = {key: float(gradients[key].norm(dtype=torch.float64)) for key in order}
    for key, norm in zip(order, expected[prefix + "grad_norms"], strict=True):
        if key != order[-1]:  # the last bias moves all logits alike
            assert abs(norms[key] - norm) / norm < 5e-5, key
    for key in about["three_params"]:
        assert relative(gradients[key].flatten()[:16], expected[f"{prefix}grad16|{key}"]) < 5e-5


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("conv", [True, False])
@pytest.mark.parametrize(
    ("layer", "block", "shape"), [("maxp_1_2", 1, (4, 6, 5)), ("fc6-relu", 6, (4096,)), ("fc7", 7, (4096,))]
)
def test_one_step_on_distinct_items_equals_the_plain_step(
    tmp_path: Path, layer: str, block: int, shape: tuple[int, ...], conv: bool, parallel: bool
) -> None:
    """Plain: each triplet's three rows through their bridges, in the published modules. Dropout off."""
    drawn = draw_head("conv" if conv else "fc", shape, seed=3, parallel=parallel)
    export(drawn, tmp_path / "ours.pth", layer)
    theirs = Published(block, int(np.prod(shape)), conv, parallel).eval()
    theirs.load_state_dict(torch.load(tmp_path / "ours.pth"), strict=True)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours = load_head(tmp_path / "theirs.pth", layer, shape)
    rows, (triplets, labels) = some_rows(shape, 12), some_triplets(70, 12)
    wanted = F.cross_entropy(theirs(*(rows[triplets[:, k]] for k in range(3))), labels)
    wanted.backward()
    loss, logits = ours.accumulate(rows, triplets, labels, generator=None)
    assert relative(loss, wanted) < 1e-5
    assert relative(ours(*(rows[triplets[:, k]] for k in range(3))), logits) < 1e-5
    # Gradients layer by layer, weight and bias together: a bias that moves all logits alike has none but rounding.
    layers = [layer_gradients(head) for head in (ours, theirs)]
    assert len(layers[0]) >= 2
    for mine, other in zip(*layers, strict=True):
        assert other.any()
        assert relative(mine, other) < 1e-5


def layer_gradients(head: torch.nn.Module) -> list[torch.Tensor]:
    modules = [module for module in head.modules() if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)]
    return [torch.cat([module.weight.grad.flatten(), module.bias.grad]) for module in modules]


@pytest.mark.parametrize("conv", [True, False])
def test_the_earlier_head_loads_and_equals_its_definition(tmp_path: Path, conv: bool) -> None:
    theirs = Earlier(conv).eval()
    torch.save(theirs.state_dict(), tmp_path / "earlier.pth")
    ours = load_head(tmp_path / "earlier.pth", "fc7-relu")
    three = some_rows((3, 4096), 5).unbind(1)
    assert relative(ours(*three), theirs(*three)) < 1e-5


@pytest.mark.parametrize(
    ("taps", "stride", "block", "length"),
    [(50, 1, 64, 256), (100, 2, 32, 300), (7, 3, 8, 40), (5, 1, 50, 9), (5, 1, None, 9), (7, 3, None, 41)],
)
def test_banded_convolution_equals_torch(taps: int, stride: int, block: int | None, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    signals = torch.randn((3, length, 2), generator=generator, requires_grad=True)
    kernel = torch.randn((4, taps, 2), generator=generator, requires_grad=True)
    bias = torch.randn(4, generator=generator, requires_grad=True)
    plain = F.conv1d(signals.transpose(1, 2), kernel.permute(0, 2, 1), bias, stride).transpose(1, 2)
    ours = convolve(signals, kernel, bias, stride, length, block)[:, : plain.shape[1]]
    weight = torch.randn(plain.shape, generator=generator)
    wanted = torch.autograd.grad((plain * weight).sum(), (signals, kernel, bias))
    found = torch.autograd.grad((ours * weight).sum(), (signals, kernel, bias))
    assert relative(ours, plain) < 1e-5
    assert all(relative(a, b) < 1e-5 for a, b in zip(found, wanted, strict=True))


def test_dropout_is_drawn_for_every_place_of_every_triplet() -> None:
    """Gathering one item to many places must not give them one mask; half of what is seen is zero, the rest doubled."""
    head = draw_head("conv", (20,), seed=0)
    seen = []
    head.decision.fast = lambda bridged, generator: seen.append(bridged) or bridged[:, :, :3].sum(0)  # type: ignore[method-assign]
    rows = torch.ones(1, 20)
    triplets = torch.zeros((200, 3), dtype=torch.int64)
    head.logits(rows, triplets, torch.Generator().manual_seed(0))
    head.logits(rows, triplets)
    dropped, plain = seen
    active = plain[0, 0] > 0
    ratio = (dropped / plain)[:, :, active]
    assert set(ratio.unique().tolist()) == {0.0, 2.0}
    assert abs(float((ratio == 0).float().mean()) - 0.5) < 0.01
    assert len({tuple(row.tolist()) for row in ratio.flatten(0, 1)}) > 590  # of 600


@pytest.mark.parametrize("measure", ["cosine", "dot"])
@pytest.mark.parametrize("rank", [0, 5, None])
@pytest.mark.parametrize("n", [4, 300])
def test_the_similarity_head_equals_its_definition(rank: int | None, measure: str, n: int) -> None:
    """Out of all products or pair by pair, with the gradient of the plain formula."""
    head = draw_head("similarity", (4, 3, 2), seed=1, rank=rank, measure=measure)
    assert isinstance(head, SimilarityHead)
    head.scale.fill_(0.3)
    with torch.no_grad():
        for weight in head.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    rows, (triplets, labels) = some_rows((4, 3, 2), 40), some_triplets(n, 40)
    plain = head(*(rows[triplets[:, k]] for k in range(3)))
    assert relative(head.logits(rows, triplets), plain) < 1e-5
    if rank == 0:
        return
    loss = F.cross_entropy(plain, labels) + head.l2 * update(head).square().sum()
    wanted = torch.autograd.grad(loss, list(head.parameters()))
    value, _ = head.accumulate(rows, triplets, labels, None)
    assert relative(value, loss) < 1e-5
    for weight, gradient in zip(head.parameters(), wanted, strict=True):
        assert relative(weight.grad, gradient) < 1e-4


def update(head: SimilarityHead) -> torch.Tensor:
    return head.update if head.rank is None else head.down @ head.up


def test_similarity_does_not_care_about_order_and_starts_at_zero_shot() -> None:
    rows, (triplets, _) = some_rows((30,), 20), some_triplets(50, 20)
    head = draw_head("similarity", (30,), seed=0, rank=4)
    raw = draw_head("zero-shot", (30,), seed=0)
    assert torch.equal(head.logits(rows, triplets), raw.logits(rows, triplets))
    head.standardise(rows.mean(0), 1 / float((rows - rows.mean(0)).square().mean().sqrt()))
    assert float(head.scaled(rows).square().sum(1).mean()) == pytest.approx(1, rel=1e-5)
    assert relative(head.logits(rows, triplets), raw.logits(rows, triplets)) < 1e-5
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        head.up.normal_()
    assert relative(head.logits(rows, triplets[:, order]), head.logits(rows, triplets)[:, order]) < 1e-5


def test_zero_shot_is_the_face_left_out_of_the_most_similar_pair() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    assert draw_head("zero-shot", (2,), 0).logits(rows, torch.tensor([[0, 1, 2], [2, 0, 1]])).argmax(1).tolist() == [
        2,
        0,
    ]


@pytest.mark.parametrize("name", ["conv", "fc", "similarity"])
def test_initial_weights_depend_on_the_seed_alone(name: str) -> None:
    torch.manual_seed(1)
    first = draw_head(name, (400,), seed=5).state_dict()
    torch.manual_seed(2)
    second, other = draw_head(name, (400,), seed=5).state_dict(), draw_head(name, (400,), seed=6).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_sizes_come_from_the_shape() -> None:
    parameters = {
        name: sum(p.numel() for p in build_head("conv", shape).parameters()) for name, shape in SHAPES.items()
    }
    assert parameters == {"maxp_5_3": 102_766_397, "fc7-relu": 1_230_757}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_head("cov", (4,)), "Did you mean conv?"),
        (lambda: build_head("similarity", (512, 7, 7), rank=None), "Give a rank"),
        (lambda: build_head("similarity", (4,), rank=-1), "1 or more"),
        (lambda: build_head("fc8-conv", (512, 7, 7)), "not rows of shape"),
    ],
)
def test_impossible_heads_are_refused(build, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        build()


@pytest.mark.parametrize("name", list(HEADS))
def test_every_head_that_is_listed_can_be_built(name: str) -> None:
    options = {"faces": ["a", "b"]} if name == "identity" else {}
    head = build_head(name, (40,) if name.startswith("fc8") else (300,), **options)
    assert head.architecture["head"] == name
    assert HEADS[name]  # says what it is


def test_every_head_says_what_it_was_made_of() -> None:
    head: Head = build_head("conv", (512, 7, 7), parallel=True)
    again = build_head(**{("name" if k == "head" else k): v for k, v in head.architecture.items()})
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in head.state_dict().items()}


@pytest.mark.parametrize("shape", ["[Infinity]", "[NaN]", "[1e400, 7]", "[true]", "[" * 5000 + "]" * 5000])
def test_a_shape_in_a_file_that_is_none(tmp_path: Path, shape: str) -> None:
    refused(tmp_path, f'{{"layer": "fc7", "architecture": {{"head": "similarity", "shape": {shape}}}}}')


def test_an_architecture_in_a_file_that_is_none(tmp_path: Path) -> None:
    refused(tmp_path, '{"layer": "fc7", "architecture": "similarity"}')


def refused(tmp_path: Path, about: str) -> None:
    metadata = {"format": "face-featurestore-head", "format_version": "1", "head": about}
    save_file({"x": torch.zeros(1)}, tmp_path / "w.safetensors", metadata)
    with pytest.raises(FeatureStoreError, match=r"w\.safetensors says that it is a head, but not which"):
        load_head(tmp_path / "w.safetensors", "fc7")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("similarity", {}),
        ("similarity", {"measure": "cosine"}),
        ("similarity", {"rank": None}),
        ("conv", {}),
        ("conv", {"parallel": True}),
        ("fc", {}),
        ("identity", {"faces": ["a", "b", "c"]}),
    ],
)
def test_gradients_are_the_same_bits_each_time(kind: str, options: dict) -> None:
    """On several threads: a step repeated by a resumed run, or the same run by another person, has to give the same weights."""
    numbers = torch.Generator().manual_seed(1)
    rows = torch.randn(300, 512, generator=numbers)
    head = draw_head(kind, (512,), 0, **options)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=numbers) * 0.01)
    examples = torch.randint(0, 300, (256, head.n_places), generator=numbers)
    labels = torch.randint(0, 3, (256,), generator=numbers)
    seen = []
    for _ in range(12):
        head.zero_grad()
        head.accumulate(rows, examples, labels, torch.Generator().manual_seed(0))
        seen.append([weight.grad.clone() for weight in head.parameters() if weight.grad is not None])
    assert all(torch.equal(a, b) for again in seen[1:] for a, b in zip(seen[0], again, strict=True))
