"""Layers out of one forward pass: against the original implementation, and against hooks that copy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from featurestore.caching.extractor import load_extractor
from featurestore.checkpoints.weights import open_weights
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import get_backbone
from featurestore.networks.shapes import layer_shapes
from featurestore.networks.tracing import extractor
from featurestore.photos.decode import decode

SPEC = get_backbone("vggface")


def far(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())


def test_all_38_layers_equal_the_original(parity: Path) -> None:
    expected = np.load(parity / "expected.npz")
    shapes = SPEC.weight_shapes()
    assert shapes == {key: tuple(shape) for key, shape in json.loads((parity / "layouts.json").read_text())["vggface"]}
    network = load_extractor(
        SPEC, list(SPEC.layers), open_weights("random:7", SPEC), torch.device("cpu"), torch.float32
    )
    recipe = SPEC.default_recipe()
    pixels = recipe.pixels(decode((parity / "images" / "s0_250x250.png").read_bytes()))
    with torch.inference_mode():
        outputs = network(recipe.normalise(torch.from_numpy(pixels[None])))
    descriptor = outputs.pop("descriptor")[0].numpy()
    assert len(outputs) == 38
    fc7 = expected["vggface/s0_250x250|fc7-relu|full"].ravel()
    assert far(descriptor, fc7 / np.linalg.norm(fc7)) < 1e-5
    for name, output in outputs.items():
        values = output[0].contiguous().numpy()
        entry = f"vggface/s0_250x250|{name}|"
        assert (1, *values.shape) == tuple(expected[entry + "shape"]), name
        flat = values.ravel()
        wide = flat.astype(np.float64)
        stats = [wide.mean(), wide.std(), np.linalg.norm(wide), wide.min(), wide.max(), (wide == 0).mean()]
        assert far(flat[expected[entry + "idx64"]], expected[entry + "val64"]) < 1e-5, name
        assert far(np.array(stats), expected[entry + "stats"]) < 1e-5, name
        if entry + "full" in expected:
            assert far(flat, expected[entry + "full"].ravel()) < 1e-5, name


def hooked(network: nn.Module, paths: dict[str, str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The slow way that cannot be wrong: a hook on each module copies its output as it is made."""
    kept: dict[str, torch.Tensor] = {}
    modules = dict(network.named_modules())
    hooks = [
        modules[path].register_forward_hook(lambda m, i, o, name=name: kept.update({name: o.clone()}))
        for name, path in paths.items()
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize(
    "build", [torchvision.models.vgg11, torchvision.models.alexnet, torchvision.models.mobilenet_v2]
)
def test_in_place_operations_never_reach_a_captured_layer(build) -> None:
    torch.manual_seed(0)
    network = build(weights=None).eval()
    calls: dict[str, int] = {}
    for path, module in network.named_modules():
        module.register_forward_hook(lambda m, i, o, path=path: calls.update({path: calls.get(path, 0) + 1}))
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        network(images)
        leaves = {
            path: path
            for path, module in network.named_modules()
            if calls.get(path) == 1 and not list(module.children())
        }
        expected = hooked(network, leaves, images)
        got = extractor(network, leaves)(images)
    assert any(getattr(module, "inplace", None) is False for module in network.modules())
    for path in leaves:
        assert torch.equal(got[path], expected[path]), path


def test_operators_in_place_are_replaced() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.one(x)
            y += self.two(y)
            return nn.functional.relu(y, inplace=True)

    network = Residual()
    x = torch.randn(3, 4)
    with torch.no_grad():
        expected = hooked(network, {"one": "one"}, x)["one"]
        got = extractor(network, {"one": "one", "all": "two"})(x)["one"]
    assert torch.equal(got, expected)


def test_a_method_in_place_is_refused() -> None:
    class Bad(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)
            self.two = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.one(x).mul_(2))

    with pytest.raises(ValueError, match="in place"):
        extractor(Bad(), {"two": "two"})


def test_nothing_is_computed_or_loaded_past_the_last_layer() -> None:
    cut = extractor(SPEC.build_meta(), {"conv_1_2": SPEC.layers["conv_1_2"], "relu_1_1": SPEC.layers["relu_1_1"]})
    assert sorted(cut.state_dict()) == [
        "features.conv_1_1.bias",
        "features.conv_1_1.weight",
        "features.conv_1_2.bias",
        "features.conv_1_2.weight",
    ]
    called = [node.target for node in cut.graph.nodes if node.op == "call_module"]
    assert called == ["features.conv_1_1", "features.relu_1_1", "features.conv_1_2"]


def test_a_layer_that_runs_twice_is_refused() -> None:
    resnet = torchvision.models.resnet18(weights=None)
    with pytest.raises(ValueError, match="gives 2 tensors"):
        extractor(resnet, {"relu": "layer1.0.relu"})


def test_shapes_are_those_of_the_published_table() -> None:
    shapes = layer_shapes(SPEC)
    assert shapes["maxp_5_3"] == (512, 7, 7)
    assert shapes["conv_1_1"] == (64, 224, 224)
    assert shapes["fc8"] == (2622,)
    total = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    assert round(total / 2**20) == 109  # MiB an image, all layers


def test_an_unknown_layer_names_its_neighbours() -> None:
    with pytest.raises(FeatureStoreError, match=r"no layer 'fc7_relu'. Did you mean fc7-relu"):
        SPEC.check_layers(["maxp_5_3", "fc7_relu"])
    assert SPEC.check_layers(["fc7-relu", "maxp_5_3", "maxp_5_3"]) == ["maxp_5_3", "fc7-relu"]
    assert len(SPEC.check_layers(["all"])) == 39
