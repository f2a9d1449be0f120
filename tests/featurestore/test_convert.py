"""Any checkpoint as safetensors that says where it comes from."""

import hashlib
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from featurestore.checkpoints.convert import convert, recognise
from featurestore.checkpoints.seeded import draw_weights
from featurestore.checkpoints.weights import open_weights
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import get_backbone
from tests.commands import command
from tests.featurestore.checkpoints import MINI, write_luatorch

SHAPES = MINI.weight_shapes()


@pytest.fixture(scope="module")
def pkl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shapes = get_backbone("senet50_ft").weight_shapes()
    state = draw_weights(1, [key for key in shapes if not key.endswith("num_batches_tracked")], shapes)
    path = tmp_path_factory.mktemp("pkl") / "senet50_ft_weight.pkl"
    path.write_bytes(pickle.dumps({key: value.numpy() for key, value in state.items()}, 2))
    return path


def test_origin_licence_and_the_same_numbers(tmp_path: Path) -> None:
    state = draw_weights(1, SHAPES, SHAPES)
    source = write_luatorch(tmp_path / "VGG_FACE.t7", state)
    convert(source, MINI, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        metadata = file.metadata()
        assert {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()} == SHAPES  # noqa: SIM118
    assert metadata["origin"] == "VGG_FACE.t7"
    assert metadata["origin_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert metadata["licence"] == MINI.licence
    assert metadata["origin_layout"] == "LuaTorch, modules in network order"
    converted = open_weights(str(tmp_path / "out.safetensors"), MINI).read(SHAPES)
    assert all(torch.equal(converted[key], state[key]) for key in SHAPES)


def test_the_command(pkl: Path, tmp_path: Path) -> None:
    out = tmp_path / "senet.safetensors"
    done = command("convert_weights", pkl, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "384 tensors of senet50_ft or senet50_scratch, read as pickle, published keys" in done.stdout
    assert hashlib.sha256(pkl.read_bytes()).hexdigest() in done.stdout
    assert "non-commercial" in done.stdout
    with pytest.raises(FeatureStoreError, match=r"exists\. Choose another `out`, or add `overwrite`"):
        convert(pkl, get_backbone("senet50_ft"), out)
    convert(pkl, get_backbone("senet50_scratch"), out, overwrite=True)
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["backbone"] == "senet50_scratch"


def test_files_of_no_known_network(pkl: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "w.pth")
    with pytest.raises(FeatureStoreError, match="is no checkpoint of dlib_resnet_v1, inception_resnet_v1, vggface"):
        recognise(tmp_path / "w.pth")
    with pytest.raises(FeatureStoreError, match="is not a checkpoint of resnet50_ft"):
        convert(pkl, get_backbone("resnet50_ft"), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    assert recognise(pkl) == ["senet50_ft", "senet50_scratch"]
    with pytest.raises(FeatureStoreError, match=r"has to end in \.safetensors"):
        convert(pkl, get_backbone("senet50_ft"), tmp_path / "out.pth")
    with pytest.raises(FeatureStoreError, match="cannot be written"):
        convert(pkl, get_backbone("senet50_ft"), Path("/proc/out.safetensors"))
