"""torchvision's networks and the user's own: layers by module path, their own transforms, and nobody's word taken for code."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models import get_model, get_model_weights

from featurestore import FeatureStore
from featurestore.caching.extractor import load_extractor
from featurestore.checkpoints.seeded import draw_weights
from featurestore.checkpoints.weights import open_weights
from featurestore.errors import FeatureStoreError
from featurestore.networks.digests import graph_digest
from featurestore.networks.registry import get_backbone, get_recipe
from featurestore.networks.shapes import layer_shapes, with_input_size
from featurestore.networks.spec import PublishedFile
from featurestore.networks.tracing import extractor
from featurestore.photos.decode import decode
from tests.commands import command
from tests.conftest import run_pass
from tests.featurestore.test_capture import far, hooked

CPU = torch.device("cpu")

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3, stride=STRIDE))
        self.offset = torch.arange(6.0).view(1, 6, 1, 1)  # a constant that is in no state dict
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(torch.flatten(self.pool(self.body(x) + self.offset), 1))

def build_model():
    torch.manual_seed(0)
    return Net()

def not_a_network():
    return 3

def broken():
    raise RuntimeError("no such file: weights.bin")

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

def small(forward, **attributes):
    class Network(Small):
        def __init__(self):
            torch.manual_seed(0)
            super().__init__()
            for name, value in attributes.items():
                setattr(self, name, value() if isinstance(value, type(lambda: 0)) else value)
    Network.forward = forward
    return Network()

def dropped_result():
    def forward(self, x):
        out = self.one(x)
        self.relu(out)  # in place: two is given what is left of out
        return self.two(out)
    return small(forward)

def aliased_residual():
    def forward(self, x):
        out = self.one(x)
        before = out
        out += self.two(out)
        return self.two2(out + 3 * before)
    return small(forward, two2=lambda: nn.Conv2d(4, 4, 1))

def through_a_view():
    def forward(self, x):
        out = self.one(x)
        part = out[:, :2]
        part += 1
        return self.two(out)
    return small(forward)

def noise():
    return small(lambda self, x: self.two(nn.functional.dropout(self.one(x), 0.5)))

def hooked():
    network = small(lambda self, x: self.two(self.one(x)))
    network.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 5,))
    return network

def over_the_batch():
    return small(lambda self, x: self.two(self.norm(self.one(x))), norm=lambda: nn.BatchNorm2d(4, track_running_stats=False))

def other_constants():
    network = small(lambda self, x: self.two(self.one(x) + self.noise))
    torch.seed()
    network.register_buffer("noise", torch.randn(1, 4, 1, 1), persistent=False)
    return network

def flattened():
    # its view needs the usual layout of pictures, which channels-last ones do not have
    return small(lambda self, x: self.three(self.one(x).view(len(x), -1)), three=lambda: nn.Linear(4 * 32 * 32, 5))

def slash():
    network = Small()
    network.add_module("two/2", nn.ReLU())
    Small.forward = lambda self, x: getattr(self, "two/2")(self.two(self.one(x)))
    return network

def computes():
    scales = [value.item() for value in torch.linspace(1, 2, 2)]
    return small(lambda self, x: self.two(scales[1] * self.one(x)) * ((x.mean() > 0) & (x.mean() > 1)))
"""
RECIPE = 'size = 32\nresize = "pil"\nchannels = "RGB"\nmean = [127.5, 127.5, 127.5]\nscale = 128.0\n'


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the user stands in, with a module of theirs and a recipe."""
    folder = tmp_path / "own"
    folder.mkdir()
    name = f"net_{abs(hash(str(tmp_path))) % 10**9}"  # a module is imported once in a process
    (folder / f"{name}.py").write_text(MODULE.replace("STRIDE", "2"))
    (folder / "mine.toml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def module_of(own: Path) -> str:
    return next(own.glob("net_*.py")).stem


@pytest.mark.parametrize("name", ["convnext_tiny", "resnet18", "vit_b_32", "swin_t", "regnet_x_400mf", "googlenet"])
def test_layers_of_torchvision_equal_hooks_on_its_own_network(name: str) -> None:
    """Tokens, windows with index tables, in-place ReLUs, a constructor that computes: the same numbers as hooks that copy."""
    spec = get_backbone(f"torchvision:{name}")
    size = spec.default_recipe().size
    spec = with_input_size(spec, size)
    plain = {"googlenet": {"init_weights": False, "transform_input": True}}.get(name, {})
    network = get_model(name, weights=None, **plain).eval()
    state = network.state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    network.load_state_dict(
        {**state, **draw_weights(2, [key for key in shapes if state[key].is_floating_point()], shapes)}
    )
    layers = [name for name in spec.layers if name != "descriptor"][:: max(1, len(spec.layers) // 20)]
    cut = load_extractor(spec, layers, open_weights("random:2", spec), CPU, torch.float32)
    torch.manual_seed(0)
    images = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        expected = hooked(network, {layer: layer for layer in layers}, images)
        got = cut(images)
    for layer in layers:
        assert far(got[layer].numpy(), expected[layer].numpy()) < 1e-4, layer


@pytest.mark.parametrize(
    ("name", "classifier"),
    [("resnet18", "fc"), ("vgg11", "classifier.6"), ("convnext_tiny", "classifier.2"), ("vit_b_32", "heads.head")],
)
def test_the_descriptor_is_what_the_classifier_is_given(name: str, classifier: str) -> None:
    spec = get_backbone(f"torchvision:{name}")
    spec = with_input_size(spec, spec.default_recipe().size)
    weights = open_weights("random:0", spec)
    network = get_model(name, weights=None).eval()
    weights.put_into(network)
    given = []
    network.get_submodule(classifier).register_forward_pre_hook(lambda module, inputs: given.append(inputs[0]))
    images = torch.randn(1, 3, 224, 224)
    cut = load_extractor(spec, ["descriptor", classifier], weights, CPU, torch.float32)
    with torch.inference_mode():
        classes = network(images)
        got = cut(images)
    assert got["descriptor"].dim() == 2
    assert far(got["descriptor"].numpy(), given[0].numpy()) < 1e-5
    assert far(got[classifier].numpy(), classes.numpy()) < 1e-4


def test_a_network_without_a_vector_has_no_descriptor() -> None:
    """SqueezeNet classifies maps and pools last."""
    spec = get_backbone("torchvision:squeezenet1_1")
    with pytest.raises(FeatureStoreError, match="no layer 'descriptor'"):
        with_input_size(spec, 224).check_layers(["descriptor"])


def test_another_number_of_classes(tmp_path: Path) -> None:
    torch.save(get_model("resnet18", weights=None, num_classes=40).state_dict(), tmp_path / "tuned.pth")
    weights = open_weights(str(tmp_path / "tuned.pth"), with_input_size(get_backbone("torchvision:resnet18"), 224))
    assert weights.notes == ("fc has 40 classes in this file, not 1000",)
    assert layer_shapes(weights.backbone, ["fc", "descriptor"]) == {"fc": (40,), "descriptor": (512,)}


def test_a_module_that_runs_twice_is_refused_with_the_reason(photographs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        FeatureStoreError, match=r"'layer1\.0\.relu' of .* cannot be a layer: it does not run exactly once"
    ):
        run_pass(photographs, tmp_path / "r.zarr", ["layer1.0.relu"], backbone="torchvision:resnet18")


@pytest.mark.parametrize("name", ["convnext_tiny", "efficientnet_b0", "vit_h_14", "resnet50@IMAGENET1K_V1"])
@pytest.mark.parametrize("size", [(301, 200), (97, 131), (64, 64)])
def test_the_recipe_is_that_of_the_weights(name: str, size: tuple[int, int]) -> None:
    model, _, chosen = name.partition("@")
    entry = get_model_weights(model)[chosen or "DEFAULT"]
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    expected = entry.transforms()(Image.fromarray(rgb))
    recipe = get_backbone(f"torchvision:{name}").default_recipe()
    got = recipe.normalise(torch.from_numpy(recipe.pixels(rgb)[None].copy()))[0]
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < 1e-5


def test_all_networks_of_torchvision_have_layers() -> None:
    names = torchvision.models.list_models(module=torchvision.models)
    assert len(names) >= 70
    for name in names[::9]:
        assert len(get_backbone(f"torchvision:{name}").layers) > 10, name


def test_unknown_names() -> None:
    with pytest.raises(FeatureStoreError, match=r"no classifier 'resnet51'. Did you mean .*resnet50"):
        get_backbone("torchvision:resnet51")
    with pytest.raises(FeatureStoreError, match="no weights 'V1'"):
        get_backbone("torchvision:resnet50@V1")
    with pytest.raises(FeatureStoreError, match="no module 'nowhere'"):
        get_backbone("nowhere:build")


def test_a_pass_of_torchvision_and_of_a_face_network_in_one_store(photographs: Path, tmp_path: Path) -> None:
    store = tmp_path / "both.zarr"
    run_pass(photographs, store, ["features.3"], backbone="torchvision:squeezenet1_1")
    run_pass(photographs, store, ["conv2d_1a"], backbone="inception_resnet_v1")
    opened = FeatureStore.open(store)
    assert [name.rpartition("-")[0] for name in opened.sources] == ["inception_resnet_v1", "torchvision-squeezenet1_1"]
    source = opened.source("torchvision-squeezenet1_1")
    assert source.attributes["backbone"] == "torchvision:squeezenet1_1"
    network = get_model("squeezenet1_1", weights=None).eval()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict(draw_weights(0, shapes, shapes))
    transform = get_model_weights("squeezenet1_1").DEFAULT.transforms()
    with torch.inference_mode():
        for i, path in enumerate(source.items["path"]):
            expected = network.features[:4](transform(Image.open(path))[None])[0]
            assert far(source.rows("features.3").gather([i])[0].numpy(), expected.numpy()) < 1e-4


def test_weights_with_other_transforms_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-50's two published files differ in nothing but numbers and in how pictures are to be resized."""
    spec = get_backbone("torchvision:resnet18")
    state = spec.build_meta().state_dict()
    torch.save({key: torch.zeros(value.shape) for key, value in state.items()}, tmp_path / "v1.pth")
    digest = hashlib.sha256((tmp_path / "v1.pth").read_bytes()).hexdigest()
    files = {
        "V2": PublishedFile("https://x/r-00000000.pth", "00000000"),
        "V1": PublishedFile("https://x/r.pth", digest[:8]),
    }
    with pytest.raises(FeatureStoreError, match=r"is torchvision's V1.*`backbone` torchvision:resnet18@V1"):
        open_weights(str(tmp_path / "v1.pth"), replace(spec, files=files))
    own_first = dict(reversed(files.items()))
    assert open_weights(str(tmp_path / "v1.pth"), replace(spec, files=own_first)).identity == digest


def test_a_module_named_like_a_coordinate(own: Path, photographs: Path) -> None:
    module = own / f"{module_of(own)}.py"
    module.write_text(module.read_text().replace("self.pool", "self.view"))
    name = f"{module.stem}:build_model"
    with pytest.raises(FeatureStoreError, match="'view' is the name of a column"):
        run_pass(photographs, own / "own.zarr", ["view"], backbone=name, weights="built", recipe="mine.toml")


def test_tokens_are_a_layer_too(photographs: Path, tmp_path: Path) -> None:
    run_pass(photographs, tmp_path / "vit.zarr", ["encoder.dropout"], backbone="torchvision:vit_b_32")
    source = FeatureStore.open(tmp_path / "vit.zarr").source()
    assert source.rows("encoder.dropout").shape == (10, 50, 768)
    assert source.xarray()["encoder.dropout"].dims == ("item", "token_50", "feature_768")


def test_a_network_of_the_users_own(own: Path, photographs: Path) -> None:
    name = f"{module_of(own)}:build_model"
    store = own / "own.zarr"
    run_pass(photographs, store, ["body.0", "body.2", "pool"], backbone=name, weights="built", recipe="mine.toml")
    source = FeatureStore.open(store).source()
    assert source.attributes["recipe"]["name"] == "mine"
    network = get_backbone(name).build().eval()
    with torch.inference_mode():
        for i, path in enumerate(source.items["path"]):
            rgb = Image.fromarray(decode(Path(path).read_bytes())).resize((32, 32), Image.Resampling.BILINEAR)
            x = (torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None].float() - 127.5) / 128
            body = network.body(x)
            assert torch.allclose(source.rows("body.2").gather([i]), body, atol=1e-5)
            assert torch.allclose(source.rows("pool").gather([i]), network.pool(body + network.offset), atol=1e-5)
            before_relu = source.rows("body.0").gather([i])
            assert torch.allclose(before_relu, network.body[0](x), atol=1e-5)
            assert float(before_relu.min()) < 0


@pytest.mark.parametrize("change", [("STRIDE", "1"), ("torch.arange(6.0)", "torch.ones(6)")])
def test_changed_code_is_another_source(own: Path, photographs: Path, change: tuple[str, str]) -> None:
    """A stride, or a constant: the keys and shapes of the weights stay the same."""
    module = own / f"{module_of(own)}.py"
    arguments = ("--images", photographs, "--store", "own.zarr", "--recipe", "mine.toml", "--weights", "random:1")
    network = ("--layers", "pool", "--backbone", f"{module.stem}:build_model")
    assert command("cache_layers", *network, *arguments, cwd=own).returncode == 0
    module.write_text(MODULE.replace(*change).replace("STRIDE", "2"))
    assert command("cache_layers", *network, *arguments, cwd=own).returncode == 0
    assert len(FeatureStore.open(own / "own.zarr").sources) == 2


def test_a_store_does_not_name_code_to_run(own: Path, photographs: Path) -> None:
    """verify_store imports a network only because the user says so, never because a store does."""
    name = f"{module_of(own)}:build_model"
    run_pass(photographs, own / "own.zarr", ["pool"], backbone=name, weights="random:1", recipe="mine.toml")
    module = own / f"{module_of(own)}.py"
    module.write_text(module.read_text() + "\nopen('imported', 'w').close()\n")
    checked = command("verify_store", "own.zarr", cwd=own)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "If you trust it, name it: --backbone" in checked.stdout
    assert not (own / "imported").exists()
    checked = command("verify_store", "own.zarr", "--backbone", name, cwd=own)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "recomputed rows agree" in checked.stdout
    assert (own / "imported").exists()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("buld_model", "has no function 'buld_model'. Did you mean build_model"),
        ("not_a_network", "returned an object of type int, not a torch.nn.Module"),
        ("broken", "RuntimeError: no such file: weights.bin"),
    ],
)
def test_what_can_be_wrong_with_it(own: Path, function: str, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        get_backbone(f"{module_of(own)}:{function}")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("dropped_result", "layer 'two' .* differs from the same module's output"),
        ("aliased_residual", "layer 'two2' .* differs from the same module"),
        ("through_a_view", "layer 'two' .* differs from the same module"),
        ("noise", "gives different numbers each time"),
        ("hooked", "differs from the same module"),
        ("over_the_batch", "depend on the batch"),
        ("other_constants", "differs from|different numbers"),
    ],
)
def test_what_cannot_be_captured_faithfully_is_refused(
    own: Path, photographs: Path, function: str, message: str
) -> None:
    """Each of these would fill the store with rows that are not the network's, and nothing would look wrong."""
    name = f"{module_of(own)}:{function}"
    options = {"backbone": name, "weights": "random:1", "recipe": "mine.toml"}
    with pytest.raises(FeatureStoreError, match=message):
        run_pass(photographs, own / "own.zarr", ["all"], **options)


def test_what_can_be_captured_though_it_looks_odd(own: Path, photographs: Path) -> None:
    """A constructor that computes with tensors, operators that end in an underscore; names that no folder can have stay out."""
    options = {"weights": "random:1", "recipe": "mine.toml"}
    run_pass(photographs, own / "odd.zarr", ["two"], backbone=f"{module_of(own)}:computes", **options)
    assert set(get_backbone(f"{module_of(own)}:slash").layers) == {"one", "two"}
    run_pass(photographs, own / "odd.zarr", ["three"], backbone=f"{module_of(own)}:flattened", **options)


def test_weights_that_are_drawn_at_each_call_are_refused(own: Path) -> None:
    module = own / f"{module_of(own)}.py"
    module.write_text(
        module.read_text().replace(
            "def build_model():\n    torch.manual_seed(0)", "def build_model():\n    torch.seed()"
        )
    )
    with pytest.raises(FeatureStoreError, match="returns different weights at each call"):
        open_weights("built", get_backbone(f"{module.stem}:build_model"))


@pytest.mark.parametrize(
    ("before", "after"),
    [("nhead=2", "nhead=4"), ("norm_first=False", "norm_first=True"), ("nn.functional.relu", "nn.functional.gelu")],
)
def test_settings_that_a_module_does_not_print(own: Path, before: str, after: str) -> None:
    code = """
from torch import nn
def build():
    block = nn.TransformerEncoderLayer(8, nhead=2, norm_first=False, activation=nn.functional.relu, batch_first=True)
    return nn.Sequential(nn.Flatten(2), nn.Linear(1024, 8), block)
"""
    digests = []
    for i, text in enumerate((code, code.replace(before, after))):
        name = f"{module_of(own)}_{i}"
        (own / f"{name}.py").write_text(text)
        digests.append(graph_digest(with_input_size(get_backbone(f"{name}:build"), 32)))
    assert digests[0] != digests[1]


def test_it_needs_a_recipe(own: Path, photographs: Path) -> None:
    name = f"{module_of(own)}:build_model"
    with pytest.raises(FeatureStoreError, match=r"`recipe` FILE\.toml"):
        run_pass(photographs, own / "own.zarr", ["pool"], backbone=name, weights="built")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "size 0 is not a whole number of pixels"),
        ({"size": 10**9}, "size 1000000000 is not"),
        ({"resize": "nearest"}, "resize 'nearest' is not one of cv2, cv2-crop, pil, pil-crop, chip"),
        ({"mean": [1, 2]}, "mean .* is not a number, or three"),
        ({"scale": 0}, "scale 0 is not a number"),
        ({"scale": [1, 0, 1]}, "scale .* other than 0"),
        ({"short_side": 10}, "belongs to a crop"),
        ({"box_margin": -1}, "box_margin -1 is not a share"),
        ({"colour": "RGB"}, "no field 'colour'"),
        ({"channels": None}, "lacks channels"),
        ({"name": "facenet"}, "has the name 'facenet' of a published one"),
    ],
)
def test_a_recipe_that_is_none(tmp_path: Path, values: dict, message: str) -> None:
    sound = {"size": 32, "resize": "pil", "channels": "RGB", "mean": [0, 0, 0]}
    (tmp_path / "r.json").write_text(json.dumps({**sound, **values}))
    with pytest.raises(FeatureStoreError, match=message):
        get_recipe(str(tmp_path / "r.json"))
    (tmp_path / "r.json").write_text(json.dumps(sound))
    assert get_recipe(str(tmp_path / "r.json")).name == "r"


def test_a_size_that_a_network_does_not_take(photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(RECIPE)
    with pytest.raises(FeatureStoreError, match="cannot be run on 32 × 32 pixels"):
        run_pass(
            photographs,
            tmp_path / "s.zarr",
            ["encoder"],
            backbone="torchvision:vit_b_32",
            recipe=str(tmp_path / "small.toml"),
        )


def test_in_place_functions_of_others(tmp_path: Path) -> None:
    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.relu(self.one(x), True)

    class Named(Positional):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu_(self.one(x))

    network, x = Positional(), torch.randn(3, 4)
    with torch.no_grad():
        expected = network.one(x)
        assert torch.equal(extractor(network, {"one": "one"})(x)["one"], expected)
    with pytest.raises(ValueError, match="works in place"):
        extractor(torch.nn.Sequential(Named(), torch.nn.Linear(4, 4)), {"last": "1"})


def test_nothing_is_left_of_a_run_that_was_refused(own: Path, photographs: Path) -> None:
    with pytest.raises(FeatureStoreError):
        run_pass(photographs, own / "new.zarr", ["nowhere"], backbone="torchvision:resnet18")
    assert not (own / "new.zarr").exists()
