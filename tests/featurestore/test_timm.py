"""timm's networks: its data configuration as the recipe, its keys, and the features that it calls pre-logits."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from featurestore import FeatureStore, FeatureStoreError
from featurestore.caching.extractor import load_extractor
from featurestore.checkpoints.seeded import draw_weights
from featurestore.checkpoints.weights import open_weights
from featurestore.networks.registry import get_backbone, known_backbone
from featurestore.networks.shapes import layer_shapes, with_input_size
from tests.commands import command
from tests.conftest import run_pass
from tests.featurestore.test_capture import far, hooked

timm = pytest.importorskip("timm", reason="timm (the extra of that name) is not installed")
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "hooks"),
    [
        ("resnet18", False),
        ("vit_tiny_patch16_224", False),  # pooled: the class token
        ("mobilenetv3_small_050", False),  # a layer between the pooling and the classifier
        ("resnetv2_50x1_bit", False),  # its classifier is a convolution
        ("mobilevit_xxs", True),
    ],
)
def test_layers_equal_hooks_on_timms_own_network(name: str, hooks: bool) -> None:
    spec = get_backbone(f"timm:{name}")
    assert spec.hooks == hooks
    size = spec.default_recipe().size
    spec = with_input_size(spec, size)
    network = timm.create_model(name).eval()
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    network.load_state_dict(draw_weights(0, shapes, shapes))
    layers = [*[layer for layer in spec.layers if layer != "descriptor"][:: len(spec.layers) // 10], "descriptor"]
    cut = load_extractor(spec, layers, open_weights("random:0", spec), CPU, torch.float32)
    torch.manual_seed(0)
    images = torch.randn(1, 3, size, size)
    with torch.inference_mode():
        got = cut(images)
        expected = hooked(network, {layer: layer for layer in layers[:-1]}, images)
        expected["descriptor"] = network.forward_head(network.forward_features(images), pre_logits=True)
    assert layer_shapes(spec, ["descriptor"])["descriptor"][0] == expected["descriptor"].shape[1]
    for layer in layers:
        assert far(got[layer].flatten(1).numpy(), expected[layer].flatten(1).numpy()) < 1e-4, layer


def test_a_network_whose_classifier_is_two_has_no_descriptor() -> None:
    assert "descriptor" not in get_backbone("timm:deit_tiny_distilled_patch16_224").layers


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50.tv_in1k", "vit_base_patch16_clip_224.openai", "eva02_tiny_patch14_224"]
)
@pytest.mark.parametrize("size", [(301, 200), (97, 131)])
def test_the_recipe_is_timms_transform(name: str, size: tuple[int, int]) -> None:
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    expected = create_transform(**config, is_training=False)(Image.fromarray(rgb))
    recipe = get_backbone(f"timm:{name}").default_recipe()
    got = recipe.normalise(torch.from_numpy(recipe.pixels(rgb)[None].copy()))[0]
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < 1e-5


def test_squashed_pictures_and_those_with_borders() -> None:
    """timm's other two modes: one is Pillow's resize, the other no recipe says."""
    from timm.data import create_transform, resolve_data_config

    configs = {name: timm.get_pretrained_cfg(name) for name in timm.list_models()}
    squash = next(name for name, config in configs.items() if (config.crop_mode, config.crop_pct) == ("squash", 1.0))
    border = next(name for name, config in configs.items() if config.crop_mode == "border")
    rgb = np.random.default_rng(0).integers(0, 256, (90, 131, 3), np.uint8)
    config = resolve_data_config({}, pretrained_cfg=configs[squash].to_dict())
    expected = create_transform(**config, is_training=False)(Image.fromarray(rgb))
    recipe = get_backbone(f"timm:{squash}").default_recipe()
    got = recipe.normalise(torch.from_numpy(recipe.pixels(rgb)[None].copy()))[0]
    assert float((got - expected).abs().max()) < 1e-5
    with pytest.raises(FeatureStoreError, match="has no recipe of its own, so say how"):
        get_backbone(f"timm:{border}").default_recipe()


def test_a_pass_with_weights_in_timms_keys(photographs: Path, tmp_path: Path) -> None:
    """A fine-tuned network with another number of classes, in both formats that timm writes."""
    torch.manual_seed(0)
    network = timm.create_model("test_resnet.r160_in1k", num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    torch.save({"epoch": 3, "state_dict": network.state_dict()}, tmp_path / "model.pth.tar")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network), is_training=False)
    for number, file in enumerate(("model.safetensors", "model.pth.tar")):
        store = tmp_path / f"{number}.zarr"
        options = {"backbone": "timm:test_resnet", "weights": str(tmp_path / file)}
        run_pass(photographs, store, ["layer2", "descriptor", "fc"], **options)
        source = FeatureStore.open(store).source()
        assert source.attributes["recipe"]["name"] == "timm:test_resnet.r160_in1k"
        with torch.inference_mode():
            for i, path in enumerate(source.items["path"]):
                features = network.forward_features(transform(Image.open(path).convert("RGB"))[None])
                descriptor = network.forward_head(features, pre_logits=True)
                assert far(source.rows("descriptor").gather([i]).numpy(), descriptor.numpy()) < 1e-4
                assert far(source.rows("fc").gather([i]).numpy(), network.fc(descriptor).numpy()) < 1e-4
    assert source.rows("fc").shape == (10, 7)


def test_a_store_of_it_is_verified(photographs: Path, tmp_path: Path) -> None:
    run_pass(photographs, tmp_path / "t.zarr", ["layer4", "descriptor"], backbone="timm:test_resnet")
    checked = command("verify_store", tmp_path / "t.zarr")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "recomputed rows agree" in checked.stdout


def test_its_layers_are_listed() -> None:
    listed = command("cache_layers", "--list-layers", "--backbone", "timm:resnet18")
    assert listed.returncode == 0, listed.stderr
    lines = listed.stdout.splitlines()
    assert next(line.split()[1] for line in lines if line.startswith("layer4 ")) == "512×7×7"
    assert next(line.split()[1] for line in lines if line.startswith("descriptor ")) == "512"
    assert lines[-1] == "Input: 224 × 224 pixels, recipe timm:resnet18.a1_in1k."


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("resnet18").state_dict(), tmp_path / "r.safetensors")
    with pytest.raises(FeatureStoreError, match=r"is not a checkpoint of timm:resnet26d\. Keys: \d+ missing: conv1"):
        open_weights(str(tmp_path / "r.safetensors"), get_backbone("timm:resnet26d"))
    with pytest.raises(FeatureStoreError, match=r"is not a checkpoint of timm:vit_tiny"):
        open_weights(str(tmp_path / "r.safetensors"), get_backbone("timm:vit_tiny_patch16_224"))


def test_unknown_names() -> None:
    with pytest.raises(FeatureStoreError, match=r"no network 'resnet_18'\. Did you mean resnet18"):
        get_backbone("timm:resnet_18")
    with pytest.raises(FeatureStoreError, match=r"resnet18 has no weights 'a9_in1k'\. Did you mean a"):
        get_backbone("timm:resnet18.a9_in1k")
    with pytest.raises(FeatureStoreError, match="no network 'hf-hub:someone/something'"):  # nothing is fetched
        get_backbone("timm:hf-hub:someone/something")


def test_without_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(FeatureStoreError, match=r"timm:resnet18 needs timm, .* Install it: pip install timm"):
        get_backbone("timm:resnet18")
    assert known_backbone("timm:resnet18") is None
