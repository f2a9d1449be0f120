"""Networks that torch.fx cannot trace, captured by forward hooks: the same numbers as the network's own, or a refusal."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from featurestore import FeatureStore
from featurestore.caching.extractor import load_extractor
from featurestore.checkpoints.weights import open_weights
from featurestore.errors import FeatureStoreError
from featurestore.networks.capture import with_layers
from featurestore.networks.digests import graph_digest
from featurestore.networks.hooks import HookedNetwork
from featurestore.networks.registry import get_backbone
from featurestore.networks.shapes import layer_shapes, with_input_size
from featurestore.networks.spec import BackboneSpec
from featurestore.photos.decode import decode
from tests.commands import command
from tests.conftest import run_pass
from tests.featurestore.test_capture import far

CPU = torch.device("cpu")
RECIPE = 'size = 32\nresize = "pil"\nchannels = "RGB"\nmean = [127.5, 127.5, 127.5]\nscale = 128.0\n'

MODULE = """
import torch
from torch import nn

def centred(x):
    return x - 0.25

class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 4, 3, stride=2)
        self.relu = nn.ReLU(inplace=True)
        self.two = nn.Conv2d(4, 4, 3)
        self.last = nn.Linear(4, 5)
        self.pair = Pair()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.run = forward

    def forward(self, x):
        assert x.ndim == 4 and (x.min() > -1e9).all()  # looks at numbers: torch.fx cannot trace it
        return self.run(self, x)

class Pair(nn.Module):
    def forward(self, x):
        return x, x

def by_picture():
    def forward(self, x):
        rows = []
        for one in x.split(1):  # each picture by itself
            rows.append(-one if one.mean() > 0 else centred(one))
        x = self.one(torch.cat(rows))
        x = self.two(self.relu(x))  # in place: one's output is overwritten
        x += 1
        return self.last(x.view(len(x), 4, -1).mean(2))
    return Net(forward)

def in_place_method():
    def forward(self, x):
        return self.two(self.one(x).mul_(2))
    return Net(forward)

def twice():
    return Net(lambda self, x: self.two(self.relu(self.two(self.relu(self.one(x))))))

def gives_a_pair():
    return Net(lambda self, x: self.two(self.pair(self.one(x))[0]))

def over_the_batch():
    return Net(lambda self, x: self.two(self.norm(self.one(x))))

def by_the_batch():
    return Net(lambda self, x: self.two(self.one(x) if x.mean() > 0.1 else -self.one(x)))

def by_how_many():
    return Net(lambda self, x: self.two(self.one(x) if len(x) < 4 else -self.one(x)))

def skips_some():
    return Net(lambda self, x: self.two(self.relu(self.one(x)) if x.mean() > 0.1 else self.one(x)))

def noise():
    return Net(lambda self, x: self.two(nn.functional.dropout(self.one(x), 0.5)))

def broken():
    return Net(lambda self, x: self.two(x))
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the user stands in, with a module of theirs and a recipe."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / f"hooked_{abs(hash(str(tmp_path))) % 10**9}.py").write_text(MODULE)
    (folder / "mine.toml").write_text(RECIPE)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    return folder


def module_of(own: Path) -> str:
    return next(own.glob("hooked_*.py")).stem


def inputs_of(path: str) -> torch.Tensor:
    rgb = Image.fromarray(decode(Path(path).read_bytes())).resize((32, 32), Image.Resampling.BILINEAR)
    return (torch.from_numpy(np.array(rgb)).permute(2, 0, 1)[None].float() - 127.5) / 128


def test_a_pass_of_a_network_that_looks_at_its_numbers(own: Path, photographs: Path) -> None:
    name = f"{module_of(own)}:by_picture"
    assert get_backbone(name).hooks
    store = own / "own.zarr"
    run_pass(photographs, store, ["one", "relu", "two", "last"], backbone=name, weights="built", recipe="mine.toml")
    source = FeatureStore.open(store).source()
    network = get_backbone(name).build().eval()
    branches = set()
    with torch.inference_mode():
        for i, path in enumerate(source.items["path"]):
            x = inputs_of(path)
            branches.add(bool(x.mean() > 0))
            one = network.one(-x if x.mean() > 0 else x - 0.25)
            two = network.two(one.relu())
            for layer, expected in (("one", one), ("relu", one.relu()), ("two", two), ("last", network(x))):
                assert far(source.rows(layer).gather([i]).numpy(), expected.numpy()) < 1e-5, layer
    assert branches == {True, False}
    assert (source.rows("one").gather(range(10)) < 0).any()  # as it was before the ReLU overwrote it


def test_layers_are_listed_in_the_order_of_computing(own: Path) -> None:
    listed = command(
        "cache_layers", "--list-layers", "--backbone", f"{module_of(own)}:by_picture", "--recipe", "mine.toml", cwd=own
    )
    assert listed.returncode == 0, listed.stderr
    names = [line.split()[0] for line in listed.stdout.splitlines()[1:5]]
    assert names == ["one", "relu", "two", "last"]


def test_an_operation_in_place_is_no_obstacle(own: Path) -> None:
    """Tracing would refuse it: hooks copy before it runs."""
    spec = with_input_size(get_backbone(f"{module_of(own)}:in_place_method"), 32)
    cut = load_extractor(spec, ["one"], open_weights("random:1", spec), CPU, torch.float32)
    network = spec.build().eval()
    open_weights("random:1", spec).put_into(network)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert far(cut(x)["one"].numpy(), network.one(x).numpy()) < 1e-6


def test_nothing_is_run_past_the_last_layer(own: Path) -> None:
    network = get_backbone(f"{module_of(own)}:by_picture").build()
    ran = []
    for name, module in network.named_children():
        module.register_forward_hook(lambda m, i, o, name=name: ran.append(name))
    HookedNetwork(network, {"relu": "relu", "one": "one"})(torch.randn(2, 3, 32, 32))
    assert ran == ["one", "relu"]


def test_a_network_that_catches_every_exception_is_ended_too() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.two(self.one(x))
            except Exception:
                return self.two(x)

    network = Careful()
    network.two.register_forward_hook(lambda *_: pytest.fail("two was run"))
    x = torch.randn(3, 4)
    assert torch.equal(HookedNetwork(network, {"one": "one"})(x)["one"], network.one(x))


@pytest.mark.parametrize(
    ("function", "layer", "message"),
    [
        ("twice", "two", "'two' of .* cannot be a layer: it runs 2 times in a forward pass"),
        ("gives_a_pair", "pair", "'pair' of .* cannot be a layer: it gives a value of type tuple, not a tensor"),
        ("skips_some", "norm", "'norm' of .* cannot be a layer: it runs 0 times"),
        ("over_the_batch", "two", "depend on the batch"),
        ("by_the_batch", "two", "depend on the batch"),
        ("by_how_many", "two", "depend on the batch"),  # of four: seen in the run itself
        ("skips_some", "relu", "'relu' was not computed for these pictures|'relu' .* cannot be a layer"),
        ("noise", "two", "gives different numbers each time"),
        ("broken", "two", "cannot be run on 32 × 32 pixels: .*expected input"),
    ],
)
def test_what_hooks_cannot_capture_faithfully_is_refused(
    own: Path, photographs: Path, function: str, layer: str, message: str
) -> None:
    name = f"{module_of(own)}:{function}"
    with pytest.raises(FeatureStoreError, match=message):
        run_pass(
            photographs, own / "own.zarr", [layer], backbone=name, weights="random:1", recipe=str(own / "mine.toml")
        )


def test_a_branch_that_only_some_batch_takes_ends_the_run(own: Path) -> None:
    """What two random inputs did not show is noticed at the picture that shows it."""
    network = HookedNetwork(get_backbone(f"{module_of(own)}:skips_some").build(), {"relu": "relu"})
    assert network(torch.ones(1, 3, 32, 32))["relu"].shape == (1, 4, 15, 15)
    with pytest.raises(FeatureStoreError, match="'relu' was not computed for these pictures"):
        network(-torch.ones(1, 3, 32, 32))


@pytest.mark.parametrize("change", [("x - 0.25", "x - 0.5"), ("stride=2", "stride=1"), ("", "")])
def test_changed_code_is_another_source(own: Path, change: tuple[str, str]) -> None:
    """A function that the forward calls is in no traced graph here, so the text of the file counts."""
    digests = []
    for i, text in enumerate((MODULE, MODULE.replace(*change) if change[0] else MODULE)):
        name = f"{module_of(own)}_{i}"
        (own / f"{name}.py").write_text(text)
        digests.append(_digest(f"{name}:by_picture"))
    assert (digests[0] == digests[1]) == (change == ("", ""))


def _digest(name: str) -> str:
    return graph_digest(with_input_size(get_backbone(name), 32))


def test_traced_and_hooked_give_the_same() -> None:
    """A network that can be traced, captured both ways."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1))

    spec = with_layers(BackboneSpec("both", {}, (), "", build))
    assert not spec.hooks
    spec = with_input_size(spec, 32)
    weights = open_weights("random:0", spec)
    images = torch.randn(2, 3, 32, 32)
    traced = load_extractor(spec, list(spec.layers), weights, CPU, torch.float32)(images)
    hooked = HookedNetwork(spec.build(), spec.layers)
    weights.put_into(hooked.network)
    for name, output in hooked(images).items():
        assert far(traced[name].numpy(), output.detach().numpy()) < 1e-6, name


def test_a_vision_transformer_of_hugging_face(own: Path, photographs: Path) -> None:
    """As a user would write it: weights and configuration from a local folder."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    made = transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=32, patch_size=8))
    made.save_pretrained(own / "vit")
    name = f"{module_of(own)}_vit:build_model"
    (own / name.replace(":build_model", ".py")).write_text(
        "from transformers import ViTModel\n\ndef build_model():\n    return ViTModel.from_pretrained('vit')\n"
    )
    spec = with_input_size(get_backbone(name), 32)
    assert spec.hooks
    blocks = [path for path, module in made.named_modules() if type(module).__name__ == "ViTLayer"]
    assert len(blocks) == 3
    layers = [blocks[1], "layernorm", "pooler"]
    assert layer_shapes(spec, layers) == {blocks[1]: (17, 32), "layernorm": (17, 32), "pooler": (32,)}
    run_pass(photographs, own / "vit.zarr", layers, backbone=name, weights="built", recipe="mine.toml")
    source = FeatureStore.open(own / "vit.zarr").source()
    made.eval()
    with torch.inference_mode():
        for i, path in enumerate(source.items["path"]):
            whole = made(inputs_of(path), output_hidden_states=True)
            assert far(source.rows(blocks[1]).gather([i]).numpy(), whole.hidden_states[2].numpy()) < 1e-5
            assert far(source.rows("layernorm").gather([i]).numpy(), whole.last_hidden_state.numpy()) < 1e-5
            assert far(source.rows("pooler").gather([i]).numpy(), whole.pooler_output.numpy()) < 1e-5
    checked = command("verify_store", own / "vit.zarr", "--backbone", name, cwd=own)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "recomputed rows agree" in checked.stdout
