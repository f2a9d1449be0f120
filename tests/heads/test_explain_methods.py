"""Attribution methods against zennit, captum, formulas written as loops, and networks rewritten by hand."""

from collections import OrderedDict
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from featurestore import FeatureStore, FeatureStoreError
from featurestore.checkpoints.weights import open_weights
from featurestore.networks.parts import Affine
from featurestore.networks.registry import get_backbone
from featurestore.networks.shapes import with_input_size
from heads.explain.methods import METHODS, Trial
from heads.explain.relevance import Rule, Rules
from heads.legs import Legs
from heads.registry import draw_head
from tests.conftest import write_photographs
from tests.heads.conftest import cache
from tests.heads.tiny_network import NAME, build

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN, FUNCTIONAL = f"{__name__}:build_plain", f"{__name__}:build_functional"
RULES: list[tuple[Rule, Rule]] = [
    ("gamma", "epsilon"),
    ("epsilon", "epsilon"),
    ("gamma", "gamma"),
    ("alpha-beta", "epsilon"),
]
BY_RULES = dict(zip(("lrp", "lrp-epsilon", "lrp-gamma", "lrp-alpha-beta"), RULES, strict=True))


def build_plain() -> nn.Module:
    """(n, 3, 32, 32) to (n, 6): what zennit takes without being told more."""
    modules = OrderedDict(conv1=nn.Conv2d(3, 6, 5, 2), relu1=nn.ReLU(), pool1=nn.MaxPool2d(2), conv2=nn.Conv2d(6, 8, 3))
    modules |= {"relu2": nn.ReLU(), "flatten": nn.Flatten(), "fc1": nn.Linear(200, 20), "relu3": nn.ReLU()}
    return nn.Sequential(modules | {"fc2": nn.Linear(20, 6)})


class FunctionalReLU(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x, inplace=True)


def build_functional() -> nn.Module:
    """The tiny network with functions for ReLU modules."""
    network = build()
    for path, module in list(network.named_modules()):
        if isinstance(module, nn.ReLU):
            network.set_submodule(path, FunctionalReLU())
    return network


@pytest.fixture(scope="module")
def legs_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Legs]:
    """Legs of a network on four photographs; ``head`` on its last layer."""
    folder = tmp_path_factory.mktemp("methods")
    images = write_photographs(folder / "photographs", 4, 1)

    def make(backbone: str, head: object = "classes", **options) -> Legs:
        layer = "fc2" if backbone == PLAIN else "descriptor"
        store = folder / f"{backbone.rpartition(':')[2]}.zarr"
        if not store.exists():
            cache(images, store, [layer], backbone=backbone)
        return Legs(FeatureStore.open(store).source(), head, layer, backbone=backbone, **options)

    return make


def trial_of(legs: Legs, choice: int = 1, **options) -> Trial:
    return Trial(legs, legs.pixels(np.arange(legs.n_places)), choice, **options)


def network_of(name: str, builder: Callable[[], nn.Module]) -> nn.Module:
    """It, as torch builds it, with the weights that the source was made with; no ReLU writes into its input."""
    network = builder()
    open_weights("random:0", with_input_size(get_backbone(name), 32)).put_into(network)
    for module in network.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return network.eval()


def odd_one_head() -> nn.Module:
    head = draw_head("similarity", (24,), 0, rank=4)
    nn.init.normal_(head.up, std=0.3, generator=torch.Generator().manual_seed(2))
    return head


def same(found: torch.Tensor, wanted: torch.Tensor | np.ndarray, most: float = 1e-4) -> None:
    """Equal up to ``most`` of the largest value; and not zero everywhere."""
    wanted = torch.as_tensor(wanted)
    assert found.shape == wanted.shape
    assert float(wanted.abs().max()) > 0
    assert float((found - wanted).abs().max() / wanted.abs().max()) < most


# LRP


@pytest.mark.parametrize("explained", ["logit", "margin"])
@pytest.mark.parametrize("name", BY_RULES)
def test_lrp_is_that_of_zennit(legs_of: Callable[..., Legs], name: str, explained: str) -> None:
    """z-B at the pixels, between black and white; of a margin both logits are explained."""
    pytest.importorskip("zennit")
    from zennit.attribution import Gradient
    from zennit.composites import SpecialFirstLayerMapComposite
    from zennit.rules import AlphaBeta, Epsilon, Gamma, Pass, ZBox
    from zennit.types import Activation, Convolution, Linear

    trial = trial_of(legs_of(PLAIN), 2, explained=explained)
    network, x = network_of(PLAIN, build_plain), trial.inputs()[0].detach()
    rules = {"gamma": Gamma(0.25, stabilizer=1e-6), "epsilon": Epsilon(1e-6), "alpha-beta": AlphaBeta(2, 1)}
    maps, vectors = (rules[rule] for rule in BY_RULES[name])
    low, high = (torch.full_like(x, (grey - 127.5) / 128) for grey in (0, 255))
    composite = SpecialFirstLayerMapComposite(
        [(Activation, Pass()), (Convolution, maps), (Linear, vectors)], [(Convolution, ZBox(low, high))]
    )
    with torch.no_grad():
        logits = network(x)[0]
    shares = F.one_hot(torch.tensor(2), 6).float()
    if explained == "margin":
        others = logits.clone()
        others[2] = -torch.inf
        shares[others.argmax()] = -1
    with Gradient(network, composite) as attributor:
        _, wanted = attributor(x.clone().requires_grad_(), lambda out: out * shares)
    same(METHODS[name].function(trial), wanted.sum(1))


def relevance(network: nn.Module, x: torch.Tensor, maps: Rule, vectors: Rule, k: int = 0) -> torch.Tensor:
    """(n, 3, y, x): of pixels between −1 and 2."""
    given = [x.clone(), torch.full_like(x, -1.0), torch.full_like(x, 2.0)]
    images, low, high = (each.requires_grad_() for each in given)
    with Rules(images.detach(), low, high, maps, vectors):
        value = network(images)[:, k]
    assert torch.allclose(value, network(x)[:, k], rtol=1e-3, atol=1e-5)
    gradients = torch.autograd.grad(value.sum(), [images, low, high], allow_unused=True)
    parts = [each.detach() * gradient for each, gradient in zip(given, gradients, strict=True) if gradient is not None]
    return torch.stack(parts).sum(0)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(5)) * 3 - 1


def drawn(network: nn.Module, bias: bool = True) -> nn.Module:
    """With numbers from a seed, batch norm's statistics too."""
    generator = torch.Generator().manual_seed(7)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | Affine):
            for tensor in (module.weight, getattr(module, "running_var", module.weight)):
                nn.init.uniform_(tensor.data, 0.5, 2, generator=generator)
            for tensor in (module.bias, getattr(module, "running_mean", module.bias)):
                nn.init.normal_(tensor.data, std=0.5, generator=generator)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5, generator=generator)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.3 if bias else 0, generator=generator)
    return network.eval().requires_grad_(False)


def two_convolutions(first: list[nn.Module], second: list[nn.Module]) -> nn.Module:
    rest = [nn.ReLU(True), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(5 * 16, 4)]
    return nn.Sequential(*first, nn.ReLU(True), *second, *rest)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_norm_is_folded_into_the_convolution_before_it(x: torch.Tensor, rules: tuple, bias: bool) -> None:
    convolutions = nn.Conv2d(3, 4, 3, bias=bias), nn.Conv2d(4, 5, 3, bias=bias)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(5)
    separate = drawn(two_convolutions([convolutions[0], norms[0]], [convolutions[1], norms[1]]))
    fused = [fuse_conv_bn_eval(*pair) for pair in zip(convolutions, norms, strict=True)]
    together = two_convolutions([fused[0]], [fused[1]])
    together[-1].load_state_dict(separate[-1].state_dict())
    same(relevance(separate, x, *rules), relevance(together, x, *rules))


@pytest.mark.parametrize("rules", RULES)
def test_a_factor_of_each_channel_is_folded_in_too(x: torch.Tensor, rules: tuple) -> None:
    """dlib's networks have those."""
    convolutions, factors = (nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)), (Affine(4), Affine(5))
    separate = drawn(two_convolutions([convolutions[0], factors[0]], [convolutions[1], factors[1]]))
    together = drawn(two_convolutions([nn.Conv2d(3, 4, 3)], [nn.Conv2d(4, 5, 3)]))
    together[-1].load_state_dict(separate[-1].state_dict())
    for place, convolution, factor in zip((0, 2), convolutions, factors, strict=True):
        together[place].weight.copy_(convolution.weight * factor.weight.view(-1, 1, 1, 1))
        together[place].bias.copy_(convolution.bias * factor.weight + factor.bias)
    same(relevance(separate, x, *rules), relevance(together, x, *rules))


class Twice(nn.Module):
    """A convolution's maps go on by two ways; ``by`` says which, ``copies`` that each has a convolution of its own."""

    def __init__(self, by: str, copies: bool) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.last, self.by, self.copies = nn.Linear(4 * 64, 3), by, copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before = F.relu(self.stem(x))
        maps = self.conv(before)
        again = self.conv(before) if self.copies else maps
        one = {
            "relu": lambda: F.relu(maps),
            "norm": lambda: F.relu(self.norm(maps)),
            "sum": lambda: maps + before[:, :, 1:-1, 1:-1],
        }[self.by]()
        return self.last((one + again).flatten(1))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("by", ["relu", "norm", "sum"])
def test_a_convolution_that_is_read_twice(x: torch.Tensor, rules: tuple, by: str) -> None:
    """As if there were two of it."""
    once, twice = drawn(Twice(by, copies=False)), drawn(Twice(by, copies=True))
    same(relevance(once, x, *rules), relevance(twice, x, *rules))


class WrittenOver(nn.Module):
    """ReLU writes into maps that are read again, as torch allows; ``copies`` says so plainly."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        self.stem, self.conv, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4 * 64, 3)
        self.copies = copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = self.conv(F.relu(self.stem(x)))
        positive = F.relu(maps, inplace=not self.copies)
        return self.last((positive + (positive if self.copies else maps)).flatten(1))


def test_a_relu_in_place_is_seen_by_later_readers(x: torch.Tensor) -> None:
    found, wanted = (relevance(drawn(WrittenOver(copies)), x, "gamma", "epsilon") for copies in (False, True))
    same(found, wanted)


@pytest.mark.parametrize("rules", RULES)
def test_relevance_is_conserved_without_biases(x: torch.Tensor, rules: tuple) -> None:
    later = [nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 5, 3, padding=1)]
    network = drawn(two_convolutions([nn.Conv2d(3, 16, 3)], later), bias=False)
    for k in range(3):
        found = relevance(network, x, *rules, k=k).sum((1, 2, 3))
        assert torch.allclose(found, network(x)[:, k], rtol=0.01)


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin()


def test_an_operation_without_a_rule_is_named(x: torch.Tensor) -> None:
    network = drawn(two_convolutions([nn.Conv2d(3, 4, 3)], [nn.Conv2d(4, 5, 3), Sine()]))
    with pytest.raises(FeatureStoreError, match=r"LRP has no rule for sin\(\).*integrated-gradients, occlusion"):
        relevance(network, x, "gamma", "epsilon")


# Maps


def maps_and_gradient(network: nn.Module, trial: Trial) -> tuple[torch.Tensor, torch.Tensor]:
    """Of block1, (places, 8, 8, 8), by plain autograd: the modules up to it, then the others and the head."""
    with torch.no_grad():
        maps = network[:3](trial.inputs()[0])
    maps.requires_grad_()
    logits = trial.legs.head(*network[3:](maps).split(1))
    (gradient,) = torch.autograd.grad(trial.value(logits).sum(), maps)
    return maps.detach(), gradient


def enlarged(maps: np.ndarray) -> np.ndarray:
    """(places, 8, 8) to 32 × 32, bilinearly, by OpenCV."""
    return np.stack([cv2.resize(each, (32, 32), interpolation=cv2.INTER_LINEAR) for each in maps])


def test_class_activation_maps_are_their_formulas(legs_of: Callable[..., Legs]) -> None:
    """Written as loops over places, channels and positions; of three photographs, of which each gets its own map."""
    trial = trial_of(legs_of(NAME, odd_one_head(), maps="block1"))
    maps, gradient = maps_and_gradient(network_of(NAME, build), trial)
    a, g = maps.double().numpy(), gradient.double().numpy()
    wanted = {name: np.zeros((3, 8, 8)) for name in ("grad-cam", "grad-cam++", "hires-cam")}
    for place in range(3):
        for channel in range(8):
            one, slope = a[place, channel], g[place, channel]
            mean = sum(slope[y, x] for y in range(8) for x in range(8)) / 64
            strong, total = 0.0, one.sum()
            for y in range(8):
                for x in range(8):
                    if slope[y, x] > 0:
                        strong += slope[y, x] ** 3 / (2 * slope[y, x] ** 2 + total * slope[y, x] ** 3)
                    wanted["hires-cam"][place, y, x] += one[y, x] * slope[y, x]
            wanted["grad-cam"][place] += mean * one
            wanted["grad-cam++"][place] += strong * one
    for name, each in wanted.items():
        same(METHODS[name].function(trial), enlarged(each).astype(np.float32))


def test_grad_cam_is_that_of_captum(legs_of: Callable[..., Legs]) -> None:
    captum = pytest.importorskip("captum.attr")
    trial = trial_of(legs_of(NAME, maps="block2"), 5)
    network = network_of(NAME, build)
    wanted = captum.LayerGradCam(lambda images: trial.value(network(images)), network.block2).attribute(
        trial.inputs()[0]
    )
    same(METHODS["grad-cam"].function(trial), enlarged(wanted[:, 0].detach().numpy()))


# Pixels


@pytest.mark.parametrize("backbone", [NAME, FUNCTIONAL])
def test_guided_backprop_is_that_of_captum(legs_of: Callable[..., Legs], backbone: str) -> None:
    """Which knows modules alone: functions are found as well."""
    captum = pytest.importorskip("captum.attr")
    trial = trial_of(legs_of(backbone), 5)
    network, x = network_of(NAME, build), trial.inputs()[0]
    with pytest.warns(UserWarning, match="backward hooks on ReLU"):
        guided = captum.GuidedBackprop(network).attribute(x, target=5)
    logit = Trial(trial.legs, trial.pixels, 5, "logit")
    same(METHODS["guided-backprop"].function(logit), (guided * x).sum(1).detach())
    plain = captum.InputXGradient(network).attribute(x, target=5).sum(1).detach()
    same(METHODS["input-x-gradient"].function(logit), plain)
    assert float((plain - (guided * x).sum(1).detach()).abs().max()) > 0.1 * float(plain.abs().max())


def test_integrated_gradients_are_complete(legs_of: Callable[..., Legs]) -> None:
    pytest.importorskip("captum.attr")
    for head, explained, steps in ((odd_one_head(), "logit", 64), ("classes", "margin", 300)):
        trial = trial_of(legs_of(NAME, head), 0, explained=explained, steps=steps)
        found = METHODS["integrated-gradients"].function(trial)
        assert found.shape == (trial.legs.n_places, 32, 32)
        with torch.no_grad():
            inputs = trial.inputs()
            change = trial.of_inputs(inputs) - trial.of_inputs(torch.zeros_like(inputs))
        assert float(found.sum()) == pytest.approx(float(change), rel=0.01)


def test_occlusion_is_a_loop_over_windows(legs_of: Callable[..., Legs]) -> None:
    """Windows of an eighth of the side, half a window apart, filled with the mean colour; a pixel has the mean of its windows."""
    pytest.importorskip("captum.attr")
    trial = trial_of(legs_of(NAME, odd_one_head()))
    network, inputs = network_of(NAME, build), trial.inputs().detach()[0]
    found = METHODS["occlusion"].function(trial)

    rows, own = network(inputs).detach().split(1), float(trial.of_inputs(inputs[None]))
    corners = [(y, x) for y in range(0, 29, 2) for x in range(0, 29, 2)]
    with torch.no_grad():
        for place in (0, 2):
            occluded = inputs[place].repeat(len(corners), 1, 1, 1)
            for image, (y, x) in zip(occluded, corners, strict=True):
                image[:, y : y + 4, x : x + 4] = 0
            each = [row.expand(len(corners), -1) for row in rows]
            each[place] = network(occluded)
            values = trial.value(trial.legs.head(*each))
            sums, counts = np.zeros((32, 32)), np.zeros((32, 32))
            for value, (y, x) in zip(values.tolist(), corners, strict=True):
                sums[y : y + 4, x : x + 4] += own - value
                counts[y : y + 4, x : x + 4] += 1
            same(found[place], (sums / counts).astype(np.float32), 1e-3)
