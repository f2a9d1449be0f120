"""dlib's face network: against dlib itself, its published numbers and plain operations; its file, damaged in every way."""

import importlib.util
import re
import struct
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from featurestore import FeatureStore
from featurestore.caching.extractor import load_extractor
from featurestore.caching.provenance import weights_of
from featurestore.checkpoints.packaged import packaged_file
from featurestore.checkpoints.reader import open_tensors
from featurestore.checkpoints.seeded import draw_weights
from featurestore.checkpoints.weights import open_weights
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import get_backbone, get_recipe
from featurestore.networks.tracing import extractor
from featurestore.photos.decode import decode
from featurestore.photos.recipes import Recipe
from tests.commands import command
from tests.conftest import run_pass, write_photographs
from tests.featurestore.test_backbones import with_weights
from tests.featurestore.test_capture import far

SPEC = get_backbone("dlib_resnet_v1")
WHOLE = {"recipe": "dlib-whole"}  # pictures as they are; chips have tests of their own
RECIPE = get_recipe("dlib-whole")
CPU = torch.device("cpu")
PUBLISHED = ("s0_250x250", "s2_w300_h200", "orl_s1_v1", "orl_s2_v1")
FILE = "dlib_face_recognition_resnet_model_v1.dat"

# Where the file's numbers are, from its description: byte of the first one, count, first value.
OFFSETS = {
    "stem.conv": (352, 4736, -0.02932992),
    "stem.affine": (19400, 64, 12.16632),
    "block1_1.conv1": (19826, 9248, -0.01988074),
    "block1_1.affine2": (94383, 64, 5.165206),
    "block2_1.conv1": (244736, 18496, -0.004492272),
    "block2_4.affine2": (1358084, 128, 10.20046),
    "block3_1.conv2": (1655419, 147584, 0.001571601),
    "block4_1.affine1": (5794271, 512, 5.627513),
    "block4_3.conv2": (15246944, 590080, 1.309983e-07),
    "block5_1.conv2": (19972170, 590080, 3.87453e-09),
    "block5_1.affine2": (22332597, 512, 12.69551),
}
DESCRIPTOR_OFFSET = 22334922
SIZE = 22466066


@pytest.fixture(scope="module")
def dat() -> Path:
    """The network's file, out of the package."""
    if importlib.util.find_spec("face_recognition_models") is None:
        pytest.skip("the package face_recognition_models (extra `trained`) is not installed")
    return packaged_file(SPEC)


@pytest.fixture
def copy(dat: Path, tmp_path: Path) -> Path:
    """A file to be damaged."""
    path = tmp_path / "w.dat"
    path.write_bytes(dat.read_bytes())
    return path


def descriptors(weights: str, chips: np.ndarray, recipe: Recipe = RECIPE) -> np.ndarray:
    """uint8 (n, 150, 150, 3) RGB to (n, 128), one picture at a time, through the recipe and the cut network."""
    network = load_extractor(SPEC, ["descriptor"], open_weights(weights, SPEC), CPU, torch.float32)
    with torch.inference_mode():
        rows = [network(recipe.normalise(torch.from_numpy(recipe.pixels(chip)[None])))["descriptor"] for chip in chips]
    return torch.cat(rows).numpy()


def coloured(n: int) -> np.ndarray:
    """Pictures in which red, green and blue differ, smooth as photographs are; some dark, some bright."""
    rng = np.random.default_rng(1)
    small = rng.integers(0, 256, (n, 9, 9, 3), np.uint8)
    return np.stack([cv2.resize(picture, (150, 150), interpolation=cv2.INTER_CUBIC) for picture in small])


@pytest.mark.parametrize("name", PUBLISHED)
def test_descriptors_equal_the_published_numbers(parity: Path, dat: Path, name: str) -> None:
    expected = np.load(parity / "dlib_expected_public.npz")
    assert far(descriptors(str(dat), expected[f"{name}|chip"][None])[0], expected[f"{name}|descriptor"]) < 1e-5


@pytest.mark.parametrize("name", PUBLISHED[:2])
def test_the_recipe_is_opencvs_resize(parity: Path, name: str) -> None:
    picture = decode((parity / "images" / f"{name}.png").read_bytes())
    assert np.array_equal(RECIPE.pixels(picture), np.load(parity / "dlib_expected_public.npz")[f"{name}|chip"])


def test_descriptors_equal_dlib_itself(dat: Path) -> None:
    dlib = pytest.importorskip("dlib", reason="dlib-bin is not installed")
    reference = dlib.face_recognition_model_v1(str(dat))
    chips = np.concatenate(
        [coloured(8), np.zeros((1, 150, 150, 3), np.uint8), np.full((1, 150, 150, 3), 255, np.uint8)]
    )
    got = descriptors("packaged", chips)
    for chip, descriptor in zip(chips, got, strict=True):
        assert far(descriptor, np.array(reference.compute_face_descriptor(chip))) < 1e-5


@pytest.mark.parametrize("mistake", ["no biases", "255", "one level brighter", "BGR", "means in the other order"])
def test_what_is_easily_got_wrong_is_far_outside_the_tolerance(dat: Path, mistake: str, tmp_path: Path) -> None:
    """Each leaves descriptors that look right; on grey pictures swapped channels are not even different."""
    chips = coloured(3)
    right = descriptors(str(dat), chips)
    weights, recipe = str(dat), RECIPE
    if mistake == "no biases":
        read = open_weights(weights, SPEC)
        state = read.read(read.keys)
        convolutions = [key for key in state if "conv" in key and key.endswith("bias")]
        torch.save({**state, **{key: torch.zeros_like(state[key]) for key in convolutions}}, tmp_path / "w.pth")
        weights = str(tmp_path / "w.pth")
    recipe = {
        "255": replace(recipe, scale=255.0),
        "one level brighter": replace(recipe, mean=tuple(mean - 1 for mean in recipe.mean)),
        "BGR": replace(recipe, channels="BGR"),
        "means in the other order": replace(recipe, mean=recipe.mean[::-1]),
    }.get(mistake, recipe)
    wrong = descriptors(weights, chips, recipe)
    assert min(far(one, other) for one, other in zip(wrong, right, strict=True)) > 1e-4


def plain_dlib(state: dict[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The network as bare functions on a state dict; every layer."""

    def affine(x: torch.Tensor, name: str) -> torch.Tensor:
        return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def convolved(x: torch.Tensor, name: str, i: int, stride: int, padding: int) -> torch.Tensor:
        out = F.conv2d(x, state[f"{name}.conv{i}.weight"], state[f"{name}.conv{i}.bias"], stride, padding)
        return affine(out, f"{name}.affine{i}")

    def added(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        total = torch.zeros([max(sides) for sides in zip(one.shape, other.shape, strict=True)], dtype=one.dtype)
        for part in (one, other):
            _, channels, rows, columns = part.shape
            total[:, :channels, :rows, :columns] += part
        return total

    outputs = {}
    x = F.conv2d(x, state["stem.conv.weight"], state["stem.conv.bias"], stride=2)
    x = outputs["stem"] = F.relu(affine(x, "stem.affine"))
    x = outputs["pool"] = F.max_pool2d(x, 3, 2)
    for group, blocks in enumerate((3, 4, 3, 3, 1), start=1):
        for i in range(1, blocks + 1):
            name, halves = f"block{group}_{i}", group > 1 and i == 1
            branch = F.relu(convolved(x, name, 1, *((2, 0) if halves else (1, 1))))
            branch = convolved(branch, name, 2, 1, 1)
            x = outputs[name] = F.relu(added(branch, F.avg_pool2d(x, 2) if halves else x))
    outputs["pooled"] = x.mean((2, 3))
    outputs["descriptor"] = outputs["pooled"] @ state["descriptor.weight"].T
    return outputs


@pytest.mark.parametrize("weights", ["random:7", "packaged"])
def test_every_layer_equals_plain_operations(weights: str, request: pytest.FixtureRequest) -> None:
    if weights == "packaged":
        request.getfixturevalue("dat")
    state = open_weights(weights, SPEC).read(SPEC.weight_shapes())
    images = RECIPE.normalise(torch.from_numpy(coloured(2)))
    with torch.inference_mode():
        outputs = extractor(with_weights(SPEC.name, state), SPEC.layers)(images)
        expected = plain_dlib({key: value.double() for key, value in state.items()}, images.double())
    assert outputs.keys() == expected.keys() == SPEC.layers.keys()
    assert [tuple(expected[f"block{group}_1"].shape[1:]) for group in range(1, 6)] == [
        (32, 35, 35), (64, 17, 17), (128, 8, 8), (256, 4, 4), (256, 2, 2),
    ]  # fmt: skip
    for layer, values in outputs.items():
        assert values.shape == expected[layer].shape, layer
        assert far(values.numpy(), expected[layer].numpy()) < 1e-5, layer


def test_numbers_are_where_the_file_has_them(dat: Path) -> None:
    content = dat.read_bytes()
    assert len(content) == SIZE
    tensors = {name: stored.read() for name, stored in open_tensors(dat).tensors.items()}
    assert {name: tuple(values.shape) for name, values in tensors.items()} == SPEC.weight_shapes()
    for module, (at, count, first) in OFFSETS.items():
        values = np.concatenate([tensors[f"{module}.{leaf}"].numpy().ravel() for leaf in ("weight", "bias")])
        assert values.tobytes() == content[at : at + 4 * count], module
        assert values[0] == pytest.approx(first, rel=1e-6), module
    last = np.frombuffer(content, "<f4", 256 * 128, DESCRIPTOR_OFFSET).reshape(256, 128)
    assert np.array_equal(tensors["descriptor.weight"].numpy(), last.T)
    total = np.concatenate([values.numpy().ravel() for values in tensors.values()]).astype(np.float64)
    assert (len(total), total.sum(), (total**2).sum()) == (
        5614592,
        pytest.approx(28099.428485),
        pytest.approx(246883.844703),
    )


def test_converted_it_gives_the_same_descriptors(dat: Path, tmp_path: Path) -> None:
    done = command("convert_weights", "packaged", "--backbone", SPEC.name, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert SPEC.packaged.sha256 in done.stdout
    assert "public domain (CC0 1.0)" in done.stdout
    converted = tmp_path / Path(FILE).with_suffix(".safetensors")
    chips = coloured(2)
    assert np.array_equal(descriptors(str(converted), chips), descriptors(str(dat), chips))
    done = command("convert_weights", dat, "--out", tmp_path / "again.safetensors")
    assert "tensors of dlib_resnet_v1, read as dlib" in done.stdout, done.stderr
    done = command("convert_weights", "packaged")
    assert "such as --backbone dlib_resnet_v1" in done.stderr


def test_a_store_of_it_is_verified_without_being_told_the_weights(dat: Path, tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "photographs", 2, 2)
    store = tmp_path / "s.zarr"
    line = (
        "--backbone",
        SPEC.name,
        "--layers",
        "block4_3",
        "descriptor",
        "--weights",
        "packaged",
        "--recipe",
        "dlib-whole",
    )
    done = command("cache_layers", *line, "--images", images, "--store", store)
    assert done.returncode == 0, done.stderr
    assert "recipe    dlib-whole: the whole photograph, not aligned" in done.stdout
    source = FeatureStore.open(store).source()
    assert source.attributes["weights_name"] == FILE
    assert "public domain" in source.attributes["licence"]
    whole = np.stack([RECIPE.pixels(decode(Path(path).read_bytes())) for path in source.items["path"]])
    assert np.allclose(source.rows("descriptor").gather(range(4)), descriptors(str(dat), whole), atol=1e-6)
    checked = command("verify_store", store)
    assert checked.returncode == 0, checked.stderr
    assert "recomputed rows agree" in checked.stdout
    run_pass(
        images, store, ["descriptor"], backbone=SPEC.name, **WHOLE, weights=str(dat)
    )  # by its path: the same source
    assert len(FeatureStore.open(store).sources) == 1


def test_its_own_recipe_asks_for_landmarks(tmp_path: Path) -> None:
    images = write_photographs(tmp_path / "photographs", 1, 2)
    with pytest.raises(
        FeatureStoreError, match=r"recipe 'dlib-chip' turns faces upright .*`find_faces`.*another `recipe`"
    ):
        run_pass(images, tmp_path / "s.zarr", ["descriptor"], backbone=SPEC.name)


def test_without_the_package_it_says_what_to_install(
    dat: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = write_photographs(tmp_path / "photographs", 1, 2)
    run_pass(images, tmp_path / "s.zarr", ["descriptor"], backbone=SPEC.name, **WHOLE, weights="packaged")
    source = FeatureStore.open(tmp_path / "s.zarr").source()
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if Path(folder) not in dat.parents])
    for ask in (lambda: open_weights("packaged", SPEC), lambda: weights_of(source, None)):
        with pytest.raises(
            FeatureStoreError, match=r"is not installed here. .*pip install face_recognition_models .*" + FILE
        ):
            ask()
    assert weights_of(source, str(dat)).identity == SPEC.packaged.sha256


def test_the_package_is_not_run_and_its_file_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = tmp_path / "face_recognition_models" / "models"
    models.mkdir(parents=True)
    (models.parent / "__init__.py").write_text("raise RuntimeError('no pkg_resources here')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(FeatureStoreError, match="is not installed here"):  # the package is, its file is not
        open_weights("packaged", SPEC)
    (models / FILE).write_bytes(b"\x01\x01other")
    with pytest.raises(FeatureStoreError, match=r"has the sha256 .*, not 55533b28a95800a5…: it was changed or damaged"):
        open_weights("packaged", SPEC)
    with pytest.raises(FeatureStoreError, match=r"no Python package holds weights of vggface; .* dlib_resnet_v1"):
        open_weights("packaged", get_backbone("vggface"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape_predictor_5_face_landmarks.dat", "it holds the landmarks of a shape predictor"),
        ("shape_predictor_68_face_landmarks.dat", "it holds the landmarks of a shape predictor"),
        ("mmod_human_face_detector.dat", "a network in which 'loss_mmod_' is where that one has 'loss_metric_2'"),
    ],
)
def test_other_files_of_dlib_are_named(dat: Path, name: str, message: str) -> None:
    with pytest.raises(FeatureStoreError, match=f"not its face recognition network: {'.*'}{message}.*file is {FILE}"):
        open_weights(str(dat.with_name(name)), SPEC)


def test_a_file_of_another_version_of_dlib_is_named(copy: Path) -> None:
    content = copy.read_bytes()
    copy.write_bytes(content.replace(b"\x05con_4", b"\x05con_6"))
    with pytest.raises(FeatureStoreError, match="a network in which 'con_6' is where that one has 'con_4'"):
        open_tensors(copy)


def test_a_file_that_is_cut_is_refused_wherever(copy: Path) -> None:
    """At the ends of everything in its first bytes, around its numbers, and at random."""
    around = [at + 4 * count + d for at, count, _ in OFFSETS.values() for d in (-1, 0, 1)]
    rng = np.random.default_rng(0)
    lengths = {*range(1, 420), *around, *rng.integers(1, SIZE, 60).tolist(), SIZE - 1, SIZE - 35, DESCRIPTOR_OFFSET}
    for length in sorted(lengths, reverse=True):
        with copy.open("r+b") as file:
            file.truncate(length)
        with pytest.raises(
            FeatureStoreError, match=r"is damaged or incomplete: it ends at byte \d+|no weights file that is known"
        ):
            open_tensors(copy)


def test_a_byte_too_many_is_refused(copy: Path) -> None:
    with copy.open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(FeatureStoreError, match="damaged or incomplete: 1 bytes more than the network has"):
        open_tensors(copy)


INNER = 29 + 2 * 130  # where the description of the input begins, after the versions of layers
NAME = INNER + 45  # of the first layer
TENSOR = NAME + 7  # its tensor: a version, four sizes, numbers


@pytest.mark.parametrize(
    ("at", "old", "new", "message"),
    [
        (0, "01 01", "00 01", "no weights file that is known here"),
        (3, "0d", "40", "holds a network in which"),
        (2, "01 0d", "08 0d 00 00 00 00 00 00 7f", "no weights file that is known here"),
        (29, "01 02", "01 03", "versions of layers (3, 2, 2"),
        (29, "01 02", "81 02", "versions of layers (-2, 2, 2"),
        (29, "01 02", "02 02 00", "an integer with leading zeros, or a negative zero, at byte 29"),
        (29, "01 02", "81 00", "a negative zero, at byte 29"),
        (29, "01 02", "00 02", "an integer of 0 bytes at byte 29"),
        (29, "01 02", "09 02 00 00 00 00 00 00 00 00", "an integer of 9 bytes at byte 29"),
        (29, "01 02", "11 02", "an integer of 17 bytes at byte 29"),
        (29, "01 02", "08 ff ff ff ff ff ff ff ff", "versions of layers"),
        (INNER, "01 15", "08 ff ff ff ff ff ff ff ff", "a name of 18446744073709551615 letters"),
        (INNER, "01 15", "81 15", "a name of -21 letters"),
        (INNER + 23, None, "01 01 02 01 40", "a real number 1 · 2^16385"),
        (INNER + 23, None, "01 01 02 00 7d", "a real number 1 · 2^32000"),
        (INNER + 23, None, "01 01 08 ff ff ff ff ff ff ff 7f", "a real number 1 · 2^9223372036854775807"),
        (NAME, None, "01 05 63 6f 6e 5f 36", "'con_6' is where that one has 'con_4'"),
        (TENSOR + 2, "02 80 12", "08 00 00 00 00 00 00 00 40", "a tensor of the sizes (2, 4611686018427387904, 1, 1, 1)"),
        (TENSOR + 2, "02 80 12", "82 80 12", "a tensor of the sizes (2, -4736, 1, 1, 1)"),
    ],
)  # fmt: skip
def test_a_hostile_file_is_refused(dat: Path, tmp_path: Path, at: int, old: str | None, new: str, message: str) -> None:
    """Values that dlib would take for lengths and sizes: nothing is reserved for them, and nothing waits."""
    with dat.open("rb") as file:
        content = file.read(30_000)
    before, after = bytes.fromhex(old or ""), bytes.fromhex(new)
    assert content[at:].startswith(before)
    kept = len(before) if old else len(after)
    path = tmp_path / "w.dat"
    path.write_bytes(content[:at] + after + content[at + kept :])
    with pytest.raises(FeatureStoreError, match=re.escape(message)):
        open_tensors(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(copy: Path, number: float) -> None:
    at = OFFSETS["block4_1.affine1"][0]
    with copy.open("r+b") as file:
        file.seek(at + 40)
        file.write(struct.pack("<f", number))
    with pytest.raises(FeatureStoreError, match=f"numbers that are NaN or infinite, from byte {at} on"):
        open_tensors(copy)


def test_a_byte_that_is_changed_is_noticed_or_without_effect(copy: Path) -> None:
    """Anywhere in the description: an error of ours, or exactly the weights that the file has."""
    whole = copy.read_bytes()
    rng = np.random.default_rng(0)
    places = {
        *range(OFFSETS["stem.conv"][0]),
        *(at - int(d) for at, _, _ in OFFSETS.values() for d in rng.integers(1, 100, 4)),
    }
    expected = {key: stored.read() for key, stored in open_tensors(copy).tensors.items()}
    refused = 0
    for place in sorted(places):
        with copy.open("r+b") as file:
            file.seek(place)
            file.write(bytes([whole[place] ^ (1 << int(rng.integers(8)))]))
        try:
            found = {key: stored.read() for key, stored in open_tensors(copy).tensors.items()}
            assert all(torch.equal(found[key], expected[key]) for key in expected), place
        except FeatureStoreError as error:
            assert str(copy) in str(error)
            refused += 1
        with copy.open("r+b") as file:
            file.seek(place)
            file.write(whole[place : place + 1])
    assert refused > 0.9 * len(places)


def test_the_network_that_a_file_looks_like(tmp_path: Path) -> None:
    shapes = SPEC.weight_shapes()
    torch.save(draw_weights(1, shapes, shapes), tmp_path / "w.pth")
    with pytest.raises(FeatureStoreError, match=r"It looks like dlib_resnet_v1 \(100 %"):
        open_weights(str(tmp_path / "w.pth"), get_backbone("vggface"))
