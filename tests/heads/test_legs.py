"""From photographs to logits in one module: the head's own logits on cached rows, gradients of pixels, what is refused."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from featurestore import FeatureStore, FeatureStoreError
from featurestore.caching.extractor import load_part
from featurestore.checkpoints.weights import open_weights
from featurestore.networks.registry import get_backbone
from featurestore.networks.shapes import layer_shapes, with_input_size
from featurestore.store.reader import Source
from heads import load_head
from heads.checkpoints import save_head
from heads.finetuning import FinetunedHead, NetworkPart
from heads.legs import Legs
from heads.models.base import Head
from heads.registry import draw_head
from tests.conftest import write_photographs
from tests.heads.conftest import cache
from tests.heads.tiny_network import HOOKED, NAME

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = ["block1", "block2", "descriptor"]
SPEC = with_input_size(get_backbone(NAME), 32)
SHAPES = layer_shapes(SPEC)
HEADS = [
    ("conv", "descriptor", {}),
    ("conv", "block2", {"parallel": True}),
    ("fc", "descriptor", {"parallel": True}),
    ("fc", "block2", {}),
    ("fc8-conv", "descriptor", {}),
    ("fc8-fc", "descriptor", {}),
    ("similarity", "block1", {"rank": 5, "measure": "cosine"}),
    ("similarity", "descriptor", {"rank": None, "measure": "dot"}),
    ("zero-shot", "descriptor", {"measure": "cosine"}),
    ("zero-shot", "block2", {"measure": "dot"}),
    ("identity", "block2", {"faces": ["a", "b", "c", "d", "e"]}),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six photographs, in folder/photographs."""
    folder = tmp_path_factory.mktemp("legs")
    cache(write_photographs(folder / "photographs", 3, 2), folder / "s.zarr", LAYERS)
    return folder / "s.zarr"


@pytest.fixture(scope="module")
def source(store: Path) -> Source:
    return FeatureStore.open(store).source()


def drawn(name: str, layer: str, options: dict, source: Source) -> Head:
    """A head with random numbers in all its weights, standardised to the rows."""
    torch.manual_seed(1)
    head = draw_head(name, SHAPES[layer], 0, **options).eval()
    for weight in (getattr(head, name, None) for name in ("up", "update")):
        if weight is not None:
            torch.nn.init.normal_(weight, std=0.1)
    if head.wants_statistics:
        rows = source.rows(layer).gather(range(source.n_items)).flatten(1)
        head.standardise(rows.mean(0), float(1 / rows.std()))
    return head


def examples_of(n_places: int) -> np.ndarray:
    """Four examples of six items; one shows an item twice."""
    return np.array([[0, 1, 2], [5, 3, 4], [2, 2, 0], [4, 1, 5]])[:, :n_places]


def pixels_of(legs: Legs, examples: np.ndarray) -> torch.Tensor:
    return legs.pixels(examples.ravel()).view(len(examples), *legs.shape)


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference, over the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(("name", "layer", "options"), HEADS)
def test_logits_and_gradients(source: Source, name: str, layer: str, options: dict) -> None:
    """Those of the head on cached rows; and in double precision what a nudge of all pixels changes."""
    head = drawn(name, layer, options, source)
    examples = examples_of(head.n_places)
    with torch.no_grad():
        wanted = head.logits(source.rows(layer).gather(range(6)), torch.from_numpy(examples))
        legs = Legs(source, head, layer, backbone=NAME)
        pixels = pixels_of(legs, examples)
        assert pixels.shape == (4, head.n_places, 32, 32, 3)
        assert off(legs(pixels), wanted) < 1e-5
    assert legs.check(examples.ravel()) < 1e-5

    legs = legs.double()
    exact = legs.inputs(pixels[:2]).double().requires_grad_()
    chosen = torch.randn(2, wanted.shape[1], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((legs.run(exact).logits * chosen).sum(), exact)
    with torch.no_grad():
        direction = torch.randn_like(exact)
        values = [(legs.run(exact + step * direction).logits * chosen).sum() for step in (1e-6, -1e-6)]
    assert float((values[0] - values[1]) / 2e-6) == pytest.approx(float((gradient * direction).sum()), rel=1e-4)


def test_the_gradient_of_pixels_goes_through_the_recipe(source: Source) -> None:
    """Pixels are divided by 128, so their gradient is the inputs' by 128; channels stay where they are."""
    legs = Legs(source, drawn("conv", "descriptor", {}, source), "descriptor", backbone=NAME)
    pixels = pixels_of(legs, examples_of(3)).float().requires_grad_()
    inputs = legs.inputs(pixels.detach()).requires_grad_()
    (wanted,) = torch.autograd.grad(legs.run(inputs).logits[:, 0].sum(), inputs)
    (found,) = torch.autograd.grad(legs(pixels)[:, 0].sum(), pixels)
    assert float(found.abs().max()) > 0
    assert off(found, wanted.permute(0, 1, 3, 4, 2) / 128) < 1e-5


def test_without_a_head(source: Source) -> None:
    """The layer's values as logits, and the cosine of two rows."""
    rows = source.rows("descriptor").gather(range(6))
    classes, alike = (Legs(source, head, "descriptor", backbone=NAME) for head in ("classes", "similarity"))
    with torch.no_grad():
        assert off(classes(pixels_of(classes, examples_of(1))), rows[[0, 5, 2, 4]]) < 1e-5
        found = alike(pixels_of(alike, examples_of(2)))
    one, other = rows[[0, 5, 2, 4]].numpy(), rows[[1, 3, 2, 1]].numpy()
    wanted = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    assert found.shape == (4, 1)
    assert np.allclose(found[:, 0], wanted, atol=1e-5)


def test_a_network_captured_by_hooks_gives_what_a_traced_one_does(source: Source, tmp_path: Path) -> None:
    """Logits and the gradients of maps: hooks keep copies, through which the gradient still goes."""
    assert get_backbone(HOOKED).hooks
    cache(photographs_of(source), tmp_path / "h.zarr", ["descriptor"], backbone=HOOKED)
    hooked = FeatureStore.open(tmp_path / "h.zarr").source()
    found = []
    for each, backbone in ((source, NAME), (hooked, HOOKED)):
        legs = Legs(each, drawn("conv", "descriptor", {}, source), "descriptor", maps="block1", backbone=backbone)
        passed = legs.run(legs.inputs(pixels_of(legs, examples_of(3))).requires_grad_())
        assert passed.maps.shape == (12, *SHAPES["block1"])
        (gradient,) = torch.autograd.grad(passed.logits[:, 1].sum(), passed.maps)
        found.append((passed.logits.detach(), passed.maps.detach(), gradient))
    assert float(found[0][2].abs().max()) > 0
    assert all(off(one, other) < 1e-5 for one, other in zip(found[1], found[0], strict=True))


def photographs_of(source: Source) -> Path:
    return Path(source.items["path"].iloc[0]).parents[1]


def test_a_fine_tuned_head_brings_its_part_of_the_network(source: Source, tmp_path: Path) -> None:
    """Its own logits on rows of the layer that it begins at; rows are still compared with the network as it was."""
    part = NetworkPart.of(SPEC, "block1", "descriptor", 32)
    network = load_part(SPEC, "block1", "descriptor", open_weights("random:0", SPEC))
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    tuned = FinetunedHead(part, SPEC, network, drawn("conv", "descriptor", {}, source))
    save_head(tuned, tmp_path / "weights.safetensors", "descriptor", sources=[source.name])
    head = load_head(tmp_path / "weights.safetensors", "block1", backbone=NAME)
    legs = Legs(source, head, backbone=NAME)
    assert legs.layer.name == "descriptor"
    examples = examples_of(3)
    frozen = Legs(source, head.head, "descriptor", backbone=NAME)
    with torch.no_grad():
        wanted = head.logits(source.rows("block1").gather(range(6)), torch.from_numpy(examples))
        pixels = pixels_of(legs, examples)
        assert off(legs(pixels), wanted) < 1e-5
        assert off(frozen(pixels), wanted) > 1e-2
        assert legs.check(examples.ravel()) < 1e-5
        assert off(legs(pixels), wanted) < 1e-5  # the tuned weights are back


def test_what_a_head_was_trained_on_is_asked(source: Source, tmp_path: Path) -> None:
    head = draw_head("fc", (24,), 0)
    save_head(head, tmp_path / "other.safetensors", "descriptor", sources=["other-source"])
    other = load_head(tmp_path / "other.safetensors", "descriptor")
    with pytest.raises(FeatureStoreError, match=f"was trained on other-source, not on {source.name}"):
        Legs(source, other, backbone=NAME)
    save_head(head, tmp_path / "own.safetensors", "descriptor", sources=[source.name])
    own = load_head(tmp_path / "own.safetensors", "descriptor")
    assert Legs(source, own, backbone=NAME).layer.name == "descriptor"
    with pytest.raises(FeatureStoreError, match="was trained on layer 'descriptor', not on 'block2'"):
        Legs(source, own, "block2", backbone=NAME)
    with pytest.raises(FeatureStoreError, match=r"which layer does the head take.*`layer`"):
        Legs(source, head, backbone=NAME)
    with pytest.raises(FeatureStoreError, match=r"takes rows of \(25,\); those of 'descriptor' are \(24,\)"):
        Legs(source, draw_head("fc", (25,), 0), "descriptor", backbone=NAME)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": None}, "code outside of this program.*`backbone` tests.heads.tiny_network:build"),
        ({"weights": "random:1"}, "random:1 is not the weights of"),
        ({"layer": "pool"}, "layer 'pool' is not in .*--layers pool"),
        ({"layer": "block1", "maps": "block2"}, "'block2' comes after 'block1', where the head is.*: block1"),
        ({"maps": "flatten"}, r"'flatten' gives \(32,\), not maps \(channel, y, x\). The last that does: block2"),
        ({"maps": "block9"}, "block9"),
    ],
)
def test_what_is_no_part_of_the_network_is_refused(source: Source, options: dict, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        Legs(source, "classes", **{"layer": "descriptor", "backbone": NAME, **options})


def test_a_row_of_another_network_is_found(store: Path, tmp_path: Path) -> None:
    """A shard of a second store whose network has other weights, in the place of one of ours: sound by its checksums."""
    shutil.copytree(store, tmp_path / "s.zarr")
    cache(store.parent / "photographs", tmp_path / "other.zarr", ["descriptor"], weights="random:1")
    ours, theirs = (next((tmp_path / name).glob("*/descriptor/c/1/*")) for name in ("s.zarr", "other.zarr"))
    shutil.copyfile(theirs, ours)
    source = FeatureStore.open(tmp_path / "s.zarr").source()
    legs = Legs(source, "classes", "descriptor", backbone=NAME)
    told = []
    assert legs.check(np.array([0, 3]), told.append) < 1e-5
    assert sum(told) == 2
    face, _ = source.keys[4]
    with pytest.raises(
        FeatureStoreError, match=f"'descriptor' of .*{face}.*differs from the cached row.*verify_store.py .*s.zarr"
    ):
        legs.check(np.array([0, 4]))


def test_photographs_that_are_gone_or_changed_are_said(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "photographs", 2, 2)
    cache(images, tmp_path / "s.zarr", ["descriptor"])
    legs = Legs(FeatureStore.open(tmp_path / "s.zarr").source(), "classes", "descriptor", backbone=NAME)
    cv2.imwrite(str(images / "f1" / "2.png"), 255 - cv2.imread(str(images / "f1" / "2.png")))
    (images / "f2" / "1.png").unlink()
    for ask in (legs.pixels, legs.check):
        with pytest.raises(FeatureStoreError, match=r"f1/2.png: the photograph changed.*put it back.*`where`"):
            ask(np.array([0, 1]))
        with pytest.raises(FeatureStoreError, match=r"f2/1.png: No such file.*put it back"):
            ask(np.array([0, 2, 3]))
    assert legs.pixels(np.array([3, 0, 3])).shape == (3, 32, 32, 3)


def test_pixels_are_in_the_order_asked(source: Source) -> None:
    legs = Legs(source, "classes", "descriptor", backbone=NAME)
    one_by_one = [legs.pixels(np.array([item])) for item in (4, 1, 4, 0)]
    assert torch.equal(legs.pixels(np.array([4, 1, 4, 0])), torch.cat(one_by_one))
    assert len(np.unique(torch.stack(one_by_one).flatten(1), axis=0)) == 3
