"""Parameters and drawings of backbones, against torch itself and against the graph's own text."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from featurestore import backbone_summary, draw_backbone
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import BACKBONES, get_backbone
from heads.describe import draw
from tests.commands import command


@pytest.mark.parametrize("name", [*BACKBONES, "torchvision:squeezenet1_1"])
def test_parameters_are_counted_once(name: str) -> None:
    """Those that no listed layer contains (a batch norm's within a block, say) are in the total alone."""
    network = get_backbone(name).build_meta()
    summary = backbone_summary(name)
    assert summary.parameters == sum(weight.numel() for weight in network.parameters())
    counts = {layer.name: layer.parameters for layer in summary.layers}
    assert all(0 <= count <= summary.parameters for count in counts.values())
    for layer, path in get_backbone(name).layers.items():
        if layer in counts and not list(network.get_submodule(path).children()):
            assert counts[layer] == sum(weight.numel() for weight in network.get_submodule(path).parameters())


def test_known_numbers() -> None:
    """VGG-16 with 2,622 classes has 145,002,878 weights, fc6 25,088 × 4,096 + 4,096 of them; ResNet-50's stage 1 has 215,808."""
    vgg = backbone_summary("vggface")
    assert vgg.parameters == 145_002_878
    counts = {layer.name: layer.parameters for layer in vgg.layers}
    assert (counts["conv_1_1"], counts["relu_1_1"], counts["fc6"]) == (1_792, 0, 102_764_544)
    resnet = {layer.name: layer.parameters for layer in backbone_summary("resnet50_ft").layers}
    assert resnet["layer1"] == 215_808
    assert resnet["layer1"] == sum(resnet[f"layer1.{block}"] for block in range(3))


def texts(path: Path) -> list[str]:
    root = ElementTree.parse(path).getroot()
    return [node.text or "" for node in root.iter() if node.tag.endswith("}text")]


def edges(path: Path) -> set[str]:
    root = ElementTree.parse(path).getroot()
    return {node.text or "" for node in root.iter() if node.tag.endswith("}title")}


def test_a_drawing_shows_every_layer_and_where_its_input_comes_from(tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz", reason="drawing needs pygraphviz")
    written = texts(draw_backbone("vggface", tmp_path / "vgg.svg"))
    assert "vggface: 145,002,878 parameters" in written
    assert "fc6: Linear" in written
    assert "4,096; 102,764,544 parameters" in written
    path = draw_backbone("resnet50_ft", tmp_path / "resnet.svg")
    names = [text.partition(": ")[0] for text in texts(path)]
    assert "layer1.2 = layer1" in names  # one tensor, two names
    assert {"maxpool->layer1.0.bn3", "maxpool->layer1.0.downsample", "layer1.0.downsample->layer1.0"} <= edges(path)
    assert {"layer1.0->layer1.1", "layer1.0->layer1.1.bn3"} <= edges(path)  # past the block, and through it
    assert "input->layer1.0" not in edges(path)


def test_the_command_lists_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz", reason="drawing needs pygraphviz")
    done = command("cache_layers", "--list-layers", "--backbone", "senet50_ft", "--draw", tmp_path / "a" / "senet.png")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].split()[-1] == "parameters"
    total = sum(weight.numel() for weight in get_backbone("senet50_ft").build_meta().parameters())
    assert f" {total:,}\n" in done.stdout
    assert (tmp_path / "a" / "senet.png").read_bytes().startswith(b"\x89PNG")
    alone = command("cache_layers", "--layers", "fc8", "--draw", tmp_path / "x.svg")
    assert alone.returncode == 2
    assert "--draw belongs to --list-layers" in alone.stderr


def test_what_cannot_be_drawn(tmp_path: Path) -> None:
    with pytest.raises(FeatureStoreError, match=r"a network is drawn as \.svg or \.png, not as 'x\.pdf'"):
        draw_backbone("vggface", tmp_path / "x.pdf")
    with pytest.raises(FeatureStoreError, match=r"is no head.*draw_backbone\('vggface'"):
        draw(get_backbone("vggface").build_meta(), tmp_path / "x.svg")
