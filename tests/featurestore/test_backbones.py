"""The face networks: against the originals' numbers, and against the SE-ResNet written out as plain operations."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from featurestore.caching.extractor import load_extractor
from featurestore.checkpoints.seeded import draw_weights
from featurestore.checkpoints.weights import open_weights
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import BACKBONES, get_backbone
from featurestore.networks.shapes import layer_shapes
from featurestore.networks.tracing import extractor
from featurestore.photos.decode import decode
from tests.commands import command
from tests.featurestore.test_capture import far

LAYOUTS = {
    "vggface": "vggface",
    "inception_resnet_v1": "facenet_classify8631",
    "resnet50_ft": "vggface2_resnet50",
    "resnet50_scratch": "vggface2_resnet50",
    "senet50_ft": "vggface2_senet50",
    "senet50_scratch": "vggface2_senet50",
}


def with_weights(name: str, state: dict[str, torch.Tensor]) -> torch.nn.Module:
    network = get_backbone(name).build_meta().eval()
    network.load_state_dict(state, assign=True)
    return network


def pictures(parity: Path, name: str) -> torch.Tensor:
    recipe = get_backbone(name).default_recipe()
    pixels = recipe.pixels(decode((parity / "images" / "s0_250x250.png").read_bytes()))
    return recipe.normalise(torch.from_numpy(pixels.copy()[None]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_keys_and_shapes_are_the_published_ones(parity: Path, name: str) -> None:
    published = json.loads((parity / "layouts.json").read_text())[LAYOUTS[name]]
    assert get_backbone(name).weight_shapes() == {key: tuple(shape) for key, shape in published}


def test_casia_has_other_classes(parity: Path) -> None:
    published = json.loads((parity / "layouts.json").read_text())["facenet_pretrained_casia"]
    spec = get_backbone("inception_resnet_v1").with_classes(10575)
    assert spec.weight_shapes() == {key: tuple(shape) for key, shape in published}
    assert layer_shapes(spec, ["logits", "descriptor"]) == {"logits": (10575,), "descriptor": (512,)}


@pytest.mark.parametrize(
    ("name", "prefix", "n_modules"),
    [("inception_resnet_v1", "inception_resnet_v1", 26), ("resnet50_ft", "resnet50", 21)],
)
def test_every_stage_equals_the_original(parity: Path, name: str, prefix: str, n_modules: int) -> None:
    expected = np.load(parity / "expected.npz")
    spec = get_backbone(name)
    shapes = spec.weight_shapes()
    entries = {key.split("|")[1] for key in expected.files if key.startswith(f"{prefix}/") and "|" in key}
    assert len(entries) == n_modules
    paths = {entry: {"logits8631": "logits"}.get(entry, entry) for entry in entries}
    network = extractor(
        with_weights(name, draw_weights(7, shapes, shapes)), {**paths, "descriptor": spec.layers["descriptor"]}
    )
    with torch.inference_mode():
        outputs = {entry: values.contiguous().numpy() for entry, values in network(pictures(parity, name)).items()}
    for entry in entries:
        at = f"{prefix}/s0_250x250|{entry}|"
        assert outputs[entry].shape == tuple(expected[at + "shape"]), entry
        flat = outputs[entry].ravel()
        wide = flat.astype(np.float64)
        stats = [wide.mean(), wide.std(), np.linalg.norm(wide), wide.min(), wide.max(), (wide == 0).mean()]
        assert far(flat[expected[at + "idx64"]], expected[at + "val64"]) < 1e-5, entry
        assert far(np.array(stats), expected[at + "stats"]) < 1e-5, entry
    whole = {"inception_resnet_v1": "embedding", "resnet50": "pooled2048"}[prefix]
    assert far(outputs["descriptor"][0], expected[f"{prefix}/{whole}/s0_250x250"]) < 1e-5


def plain_vggface2(state: dict[str, torch.Tensor], x: torch.Tensor, squeeze: bool) -> dict[str, torch.Tensor]:
    """(SE-)ResNet-50 from FACTS.md as bare functions on a state dict; every stage, block and gate."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{leaf}"].view(1, -1, 1, 1) for leaf in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    def block(x: torch.Tensor, name: str, stride: int) -> torch.Tensor:
        out = F.relu(norm(F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride), f"{name}.bn1"))
        out = F.relu(norm(F.conv2d(out, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2"))
        out = outputs[f"{name}.bn3"] = norm(F.conv2d(out, state[f"{name}.conv3.weight"]), f"{name}.bn3")
        if squeeze:
            means = out.mean((2, 3))
            inner = F.relu(means @ state[f"{name}.conv4.weight"].flatten(1).T + state[f"{name}.conv4.bias"])
            scores = inner @ state[f"{name}.conv5.weight"].flatten(1).T + state[f"{name}.conv5.bias"]
            gates = outputs[f"{name}.gates"] = (1 / (1 + torch.exp(-scores)))[:, :, None, None]
            out = out * gates
        if f"{name}.downsample.0.weight" in state:
            x = norm(F.conv2d(x, state[f"{name}.downsample.0.weight"], stride=stride), f"{name}.downsample.1")
            outputs[f"{name}.downsample"] = x
        return F.relu(out + x)

    outputs: dict[str, torch.Tensor] = {}
    x = outputs["conv1"] = F.conv2d(x, state["conv1.weight"], stride=2, padding=3)
    x = outputs["bn1"] = norm(x, "bn1")
    x = outputs["relu"] = F.relu(x)
    x = outputs["maxpool"] = F.max_pool2d(x, 3, 2, padding=0, ceil_mode=True)
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for i in range(blocks):
            x = outputs[f"layer{stage}.{i}"] = block(x, f"layer{stage}.{i}", stride=2 if i == 0 and stage > 1 else 1)
        outputs[f"layer{stage}"] = x
    outputs["avgpool"] = x.mean((2, 3), keepdim=True)
    outputs["descriptor"] = x.mean((2, 3))
    outputs["fc"] = outputs["descriptor"] @ state["fc.weight"].T + state["fc.bias"]
    return outputs


@pytest.mark.parametrize(("name", "most"), [("senet50_ft", 2e-5), ("resnet50_scratch", 1e-5)])
def test_every_layer_equals_plain_operations(parity: Path, name: str, most: float) -> None:
    spec = get_backbone(name)
    shapes = spec.weight_shapes()
    state = open_weights("random:7", spec).read(shapes)
    network = extractor(with_weights(name, state), spec.layers)
    images = pictures(parity, name)
    with torch.inference_mode():
        outputs = network(images)
        expected = plain_vggface2(
            {key: value.double() for key, value in state.items()}, images.double(), "senet" in name
        )
    assert outputs.keys() == expected.keys() == spec.layers.keys()
    for layer, values in outputs.items():
        assert values.shape == expected[layer].shape, layer
        assert far(values.numpy(), expected[layer].numpy()) < most, layer


@pytest.mark.parametrize("name", BACKBONES)
def test_layers_that_are_equal_by_construction_are_declared(name: str) -> None:
    """Names for one output, or a dropout's: everything else has to differ in a network with random weights."""
    spec = get_backbone(name)
    shapes = spec.weight_shapes()
    names = [layer for layer in spec.layers if layer not in ("fc6", "fc8")]  # the largest, and never equal to others
    network = with_weights(name, draw_weights(3, shapes, shapes))
    torch.manual_seed(0)
    with torch.inference_mode():
        outputs = extractor(network, {layer: spec.layers[layer] for layer in names})(
            torch.randn(1, 3, spec.input_size, spec.input_size)
        )
    equal = {
        frozenset({one, other})
        for i, one in enumerate(names)
        for other in names[:i]
        if outputs[one].shape == outputs[other].shape and torch.equal(outputs[one], outputs[other])
    }
    assert equal == {pair for pair in spec.equal if pair <= set(names)}


@pytest.mark.parametrize("name", [name for name in BACKBONES if name != "vggface"])
def test_seeded_networks_are_stable(name: str) -> None:
    """A picture's rows alone and among others: a network that turns rounding into other rows could never be verified."""
    spec = get_backbone(name)
    torch.manual_seed(0)
    images = 60 * torch.randn(3, 3, spec.input_size, spec.input_size)  # as bright as photographs
    network = load_extractor(spec, ["descriptor"], open_weights("random:0", spec), torch.device("cpu"), torch.float32)
    with torch.inference_mode():
        together, alone = network(images)["descriptor"][1], network(images[1:2])["descriptor"][0]
    assert far(alone.numpy(), together.numpy()) < 1e-4


@pytest.mark.parametrize("name", BACKBONES)
def test_layers_can_be_listed(name: str) -> None:
    spec = get_backbone(name)
    shapes = layer_shapes(spec)
    assert list(shapes) == list(spec.layers)
    width = {"vggface": 4096, "inception_resnet_v1": 512, "dlib_resnet_v1": 128}.get(name, 2048)
    assert shapes["descriptor"] == (width,)


def test_the_command_lists_layers_of_any_network() -> None:
    listed = command("cache_layers", "--list-layers", "--backbone", "senet50_ft")
    assert listed.returncode == 0, listed.stderr
    assert "layer4.2.gates" in listed.stdout
    assert "63 layers" in listed.stdout


def test_an_unknown_backbone_names_its_neighbours() -> None:
    with pytest.raises(FeatureStoreError, match=r"Did you mean senet50_ft"):
        get_backbone("senet50ft")
