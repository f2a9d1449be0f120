"""The layers of a handful of pictures without a store: the numbers of the store's rows."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featurestore import FeatureStore, FeatureStoreError, activations
from featurestore.photos.decode import decode
from tests.conftest import LAYERS


@pytest.fixture(scope="module")
def paths(small_store: Path) -> list[str]:
    return FeatureStore.open(small_store).items["path"].tolist()


def test_the_rows_of_a_store(small_store: Path, paths: list[str]) -> None:
    """As paths, PIL images and arrays, in another order than the store's, and with its dimensions and attributes."""
    source = FeatureStore.open(small_store).source()
    stored = source.xarray().isel(item=[7, 2, 4])
    pictures = [paths[i] for i in (7, 2, 4)]
    arrays = [decode(Path(path).read_bytes()) for path in pictures]
    for images, names in (
        (pictures, pictures),
        ([Path(path) for path in pictures], pictures),
        ([Image.open(path) for path in pictures], ["0", "1", "2"]),
        (arrays, ["0", "1", "2"]),
        (dict(zip("abc", arrays, strict=True)), ["a", "b", "c"]),
        ((path for path in pictures), pictures),
    ):
        found = activations(images, LAYERS, weights="random:0", device="cpu")
        assert list(found["item"].values) == names
        assert list(found.data_vars) == LAYERS
        for layer in LAYERS:
            assert found[layer].dims == stored[layer].dims
            assert np.allclose(found[layer], stored[layer], rtol=1e-5, atol=1e-5 * float(stored[layer].max()))
    for name in ("backbone", "weights", "recipe", "precision"):
        assert found.attrs[name] == source.attributes[name]


def test_one_picture_and_one_layer(paths: list[str]) -> None:
    found = activations(paths[0], LAYERS[0], weights="random:0", device="cpu")
    assert found.sizes["item"] == 1
    one = found[LAYERS[0]].sel(item=paths[0])
    grey = np.asarray(Image.open(paths[0]).convert("L"))
    both = activations([grey, np.stack([grey] * 3, axis=2)], LAYERS[0], weights="random:0", device="cpu")[LAYERS[0]]
    assert np.array_equal(both[0], both[1])
    assert not np.allclose(both[0], one)


def test_more_pictures_than_a_batch(paths: list[str]) -> None:
    arrays = [decode(Path(path).read_bytes()) for path in paths * 2]
    found = activations(arrays, LAYERS[1], weights="random:0", device="cpu")[LAYERS[1]]
    assert found.sizes["item"] == 20
    assert np.allclose(found[:10], found[10:].values, rtol=1e-5, atol=1e-5 * float(found.max()))


def test_another_network_and_recipe(paths: list[str], tmp_path: Path) -> None:
    name = {"backbone": "torchvision:squeezenet1_1", "weights": "random:0"}
    found = activations(paths[:1], ["features.3"], **name)
    assert found["features.3"].dims == ("item", "channel_128", "y_55", "x_55")
    text = 'size = 64\nresize = "pil"\nchannels = "RGB"\nmean = 127.5\n'
    (tmp_path / "small.toml").write_text(text)
    small = activations(paths[:1], ["features.3"], recipe=str(tmp_path / "small.toml"), **name)
    assert small["features.3"].shape[2:] < found["features.3"].shape[2:]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "`images` holds no picture"),
        (["nowhere.png"], "nowhere.png: there is no such file"),
        ([__file__], "test_activations.py: image cannot be decoded"),
        ([np.zeros((4, 4, 3))], r"picture '0' of `images` is an array \(4, 4, 3\) of float64"),
        ([np.zeros((3, 4, 4), np.uint8)], r"is an array \(3, 4, 4\) of uint8"),
        ([np.zeros((0, 4, 3), np.uint8)], r"is an array \(0, 4, 3\)"),
        ([np.zeros((2, 2), np.uint8), 5], "picture '1' of `images` is of type int"),
        ([__file__, __file__], "two of `images` have the name"),
    ],
)
def test_what_is_no_picture(images: list, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=message):
        activations(images, LAYERS, weights="random:0", device="cpu")


def test_what_a_caching_run_refuses(paths: list[str]) -> None:
    with pytest.raises(FeatureStoreError, match="no layer 'conv'"):
        activations(paths[0], ["conv"], weights="random:0")
    with pytest.raises(FeatureStoreError, match=r"there is no weights file nowhere\.pth"):
        activations(paths[0], LAYERS, weights="nowhere.pth")


def test_faces_are_found_first(orl: Path) -> None:
    """Two photographs of one person are near to a trained network, turned upright; another's is not."""
    pytest.importorskip("dlib", reason="dlib-bin is not installed")
    if importlib.util.find_spec("face_recognition_models") is None:
        pytest.skip("face_recognition_models is not installed")
    network = {"backbone": "dlib_resnet_v1", "weights": "packaged", "device": "cpu", "find_faces": True}
    paths = [orl / "s1" / "1.pgm", orl / "s1" / "2.pgm", orl / "s2" / "1.pgm"]
    mine, again, other = activations(paths, "descriptor", **network)["descriptor"].values
    assert np.linalg.norm(mine - again) < 0.6 < np.linalg.norm(mine - other)
    with pytest.raises(FeatureStoreError, match="empty: no face found"):
        activations({"empty": np.zeros((80, 80, 3), np.uint8)}, "descriptor", **network)
