"""Checkpoint files of every format: the same network, refused with reasons, never run; random weights alike everywhere."""

import argparse
import importlib
import importlib.util
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections import OrderedDict, namedtuple
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from featurestore.caching.extractor import load_extractor
from featurestore.checkpoints.formats.pytorch import LEGACY
from featurestore.checkpoints.layouts import readings
from featurestore.checkpoints.reader import open_tensors
from featurestore.checkpoints.seeded import draw_weights
from featurestore.checkpoints.weights import open_weights
from featurestore.errors import FeatureStoreError
from featurestore.networks.registry import get_backbone
from featurestore.networks.spec import BackboneSpec
from tests.featurestore.checkpoints import (
    MINI,
    SIZE,
    LuaTorch,
    MiniVGG,
    write_every_format,
    write_hdf5,
    write_luatorch,
)

SHAPES = MINI.weight_shapes()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return draw_weights(3, SHAPES, SHAPES)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, state) -> dict[str, Path]:
    return write_every_format(tmp_path_factory.mktemp("formats"), state)


def activations(
    path: Path, spec: BackboneSpec = MINI, layers: tuple[str, ...] = ("conv_5_3", "fc6", "fc7-relu", "fc8")
):
    torch.manual_seed(0)
    images = torch.randn(2, 3, SIZE, SIZE)
    network = load_extractor(spec, list(layers), open_weights(str(path), spec), CPU, torch.float32)
    with torch.inference_mode():
        return network(images)


def test_every_format_gives_the_same_activations(files: dict[str, Path], state) -> None:
    """All that people have, recognised by content: the names say nothing."""
    network = MiniVGG().eval()
    network.load_state_dict(state)
    torch.manual_seed(0)
    with torch.inference_mode():
        expected = network(torch.randn(2, 3, SIZE, SIZE))
    assert len(files) == 26
    identities = set()
    for name, path in files.items():
        weights = open_weights(str(path), MINI)
        assert not weights.random
        assert weights.keys == SHAPES.keys(), name
        for key, values in weights.read(SHAPES).items():
            assert values.dtype == torch.float32, name
            assert torch.equal(values, state[key]), f"{name}: {key}"
        assert torch.allclose(activations(path)["fc8"], expected, rtol=1e-5), name
        identities.add(weights.identity)
    assert len(identities) == len(files)  # another file is another source


def test_the_layout_is_named(files: dict[str, Path]) -> None:
    layouts = {
        name: open_weights(str(files[name]), MINI).layout for name in ("t7", "torchvision", "multi-view", "pkl-2")
    }
    assert layouts == {
        "t7": "LuaTorch, modules in network order",
        "torchvision": "PyTorch, torchvision's VGG16 keys",
        "multi-view": "PyTorch, a trained system",
        "pkl-2": "pickle, published keys",
    }
    (note,) = open_weights(str(files["hdf5-HWIO-in-out"]), MINI).notes
    assert "y, x, channel order" in note  # what shapes cannot tell is said
    (note,) = open_weights(str(files["hdf5-HIWO-in-out"]), MINI).notes
    assert note == "fc6 is taken to be flattened in channel, y, x order"
    (note,) = open_weights(str(files["end-to-end"]), MINI).notes
    assert "its head (2 keys) is left out" in note


def test_the_pickles_of_the_field(parity: Path) -> None:
    """Three dialects of one dict, against Python's own unpickler, which may be used on files of our own."""
    for dialect in ("p2", "p4", "py2style"):
        path = parity / f"pkl_sample_{dialect}.pkl"
        with path.open("rb") as file:
            expected = pickle.load(file, encoding="latin1")
        found = open_tensors(path)
        assert found.shapes == {key: value.shape for key, value in expected.items()}
        for key, stored in found.tensors.items():
            assert np.array_equal(stored.read().numpy(), expected[key]), key


def test_a_file_of_vggface2_without_counters(tmp_path: Path, parity: Path) -> None:
    """267 keys of 320: batch norm's counters are not in the published pickles, and nobody needs them."""
    layout = json.loads((parity / "layouts.json").read_text())["vggface2_resnet50_pkl"]
    arrays = {key: np.full(shape, 0.5, np.float32) for key, shape in layout}
    path = tmp_path / "resnet50_ft_weight.pkl"
    path.write_bytes(pickle.dumps(arrays, protocol=2))
    spec = get_backbone("resnet50_ft")
    weights = open_weights(str(path), spec)
    assert not weights.absent
    network = load_extractor(spec, ["descriptor"], weights, CPU, torch.float32)
    assert not any(tensor.is_meta for tensor in network.state_dict().values())
    del arrays["layer3.1.bn2.running_var"]
    path.write_bytes(pickle.dumps(arrays, protocol=2))
    with pytest.raises(FeatureStoreError, match=r"1 missing: layer3\.1\.bn2\.running_var"):
        open_weights(str(path), spec)


def test_the_number_of_classes_is_the_files(tmp_path: Path) -> None:
    spec = get_backbone("inception_resnet_v1")
    shapes = spec.with_classes(10575).weight_shapes()
    tensors = {key: torch.zeros(shape) for key, shape in shapes.items()}
    save_file(tensors, tmp_path / "casia.safetensors")
    weights = open_weights(str(tmp_path / "casia.safetensors"), spec)
    assert weights.backbone.classes == 10575
    assert weights.notes == ("logits has 10575 classes in this file, not 8631",)
    embedding = {key: value for key, value in tensors.items() if not key.startswith("logits")}
    save_file(embedding, tmp_path / "embedding.safetensors")
    weights = open_weights(str(tmp_path / "embedding.safetensors"), spec)
    assert weights.absent == {"logits.weight", "logits.bias"}
    load_extractor(spec, ["descriptor"], weights, CPU, torch.float32)
    with pytest.raises(FeatureStoreError, match="cannot give logits"):
        load_extractor(spec, ["descriptor", "logits"], weights, CPU, torch.float32)


CUTS = [
    (("features.",), "maxp_5_3", "fc6"),
    (("features.", "fc.fc6."), "fc6-relu", "fc7"),
    (("features.", "fc.fc6.", "fc.fc7."), "fc7-relu", "fc8"),
]


@pytest.mark.parametrize(
    ("layout", "cut"),
    [*((layout, cut) for layout in ("keys", "t7", "end-to-end") for cut in CUTS), ("without prefix", CUTS[0])],
)
def test_a_file_that_was_cut_gives_the_layers_before(tmp_path: Path, state, layout: str, cut: tuple) -> None:
    kept, gives, lacks = cut
    part = {key: value for key, value in state.items() if key.startswith(kept)}
    path = tmp_path / "cut"
    if layout == "t7":
        write_luatorch(path, part)
    elif layout == "without prefix":
        torch.save({key.removeprefix("features."): value for key, value in part.items()}, path)
    else:
        prefix = "vgg_core.vgg_core." if layout == "end-to-end" else ""
        torch.save({prefix + key: value for key, value in part.items()}, path)
    whole = tmp_path / "whole"
    torch.save(state, whole)
    assert torch.equal(activations(path, layers=(gives,))[gives], activations(whole, layers=(gives,))[gives])
    with pytest.raises(FeatureStoreError, match=f"cannot give {lacks}"):
        activations(path, layers=(gives, lacks))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("fc.fc7.bias"), r"1 missing: fc\.fc7\.bias"),
        (lambda s: s.pop("features.conv_3_1.weight"), r"1 missing: features\.conv_3_1\.weight"),
        (lambda s: s.update({"fc.fc9.bias": torch.zeros(1)}), r"1 unexpected: fc\.fc9\.bias"),
        (
            lambda s: s.update({"fc.fc6.bias": torch.zeros(7)}),
            r"of another shape: fc\.fc6\.bias \(7,\) \(needed: \(10,\)\)",
        ),
    ],
)
def test_a_damaged_state_dict_says_which_keys(tmp_path: Path, state, change, message: str) -> None:
    state = dict(state)
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(FeatureStoreError, match=message):
        open_weights(str(tmp_path / "w.pth"), MINI)


@pytest.mark.parametrize(
    ("holds", "asked", "message"),
    [
        ("senet50_ft", "resnet50_ft", r"64 unexpected.*It looks like senet50_ft or senet50_scratch \(100 %"),
        ("resnet50_scratch", "inception_resnet_v1", r"It looks like resnet50_ft or resnet50_scratch \(100 %"),
        ("inception_resnet_v1", "vggface", r"It looks like inception_resnet_v1 \(100 %"),
        (
            "torchvision:resnet50",
            "resnet50_ft",
            r"another shape: fc\.weight \(1000, 2048\).*It looks like torchvision:resnet50 \(",
        ),
    ],
)
def test_a_file_of_another_network_says_which(tmp_path: Path, holds: str, asked: str, message: str) -> None:
    """The last is the trap: ImageNet's ResNet-50 has the same keys, and other strides."""
    state = get_backbone(holds).build_meta().state_dict()
    tensors = {key: torch.zeros(value.shape, dtype=torch.float16) for key, value in state.items()}
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(FeatureStoreError, match=f"is not a checkpoint of {asked}.*{message}"):
        open_weights(str(tmp_path / "w.safetensors"), get_backbone(asked))


class Hostile:
    """Unpickling this would leave a folder behind."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pth_never_runs(tmp_path: Path, state, zipped: bool) -> None:
    torch.save({**state, "x": Hostile(tmp_path / "owned")}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FeatureStoreError, match="can run code"):
        open_weights(str(tmp_path / "w.pth"), MINI)
    assert not (tmp_path / "owned").exists()


class Schedule(dict):
    """Of a trainer's own: a class of dicts, one of lists, and one with slots."""


class History(list):
    pass


class Meter:
    __slots__ = ("total",)

    def __init__(self, total: float) -> None:
        self.total = total


Best = namedtuple("Best", "epoch top1")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapper", ["model_state_dict", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_trainers_checkpoint_is_read_past_its_own_objects(
    tmp_path: Path, monkeypatch, state, zipped: bool, wrapper: str, prefix: str
) -> None:
    """Objects of any class beside the weights stay unread; a hostile one among them runs nothing."""
    (tmp_path / "trainers_own.py").write_text("class State:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("trainers_own").State()
    network = MiniVGG()
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.zeros(1, 3, SIZE, SIZE)).sum().backward()
    optimiser.step()
    content = {
        "epoch": 3,
        "state": own,
        wrapper: OrderedDict((prefix + key, torch.nn.Parameter(value)) for key, value in state.items()),
        "optim_state_dict": optimiser.state_dict(),
        "args": argparse.Namespace(resume="x.pth", device=torch.device("cpu"), path=tmp_path),
        "best": Best(2, np.float64(0.9)),
        "meters": [Meter(0.5), Schedule(step=3), History([1, 2]), {Meter, len}],
        "criterion": torch.nn.CrossEntropyLoss(),
        "when": datetime.now(),
        "hostile": Hostile(tmp_path / "owned"),
    }
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    monkeypatch.delitem(sys.modules, "trainers_own")
    weights = open_weights(str(path), MINI)
    assert "trainers_own" not in sys.modules  # though it could be imported
    for key, values in weights.read(SHAPES).items():
        assert torch.equal(values, state[key]), key
    (note,) = weights.notes
    assert note.startswith("objects beside the weights were not read: trainers_own.State, argparse.Namespace, ")
    assert not (tmp_path / "owned").exists()
    assert not list(tmp_path.glob("*.patch"))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_module_is_no_state_dict(tmp_path: Path, zipped: bool) -> None:
    torch.save(MiniVGG(), tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(FeatureStoreError, match=r"it asks for .*MiniVGG.*Save its state dict alone"):
        open_weights(str(tmp_path / "w.pth"), MINI)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["TorchScript", "tar"])
def test_what_torch_would_open_in_other_ways_is_not_opened(tmp_path: Path, monkeypatch, kind: str) -> None:
    """TorchScript holds code; an archive from before torch 0.1.10 is unpacked. Neither gets to the second reading."""

    def opened(*_: object, **__: object) -> None:
        pytest.fail("it was opened")

    path = tmp_path / "w.pth"
    if kind == "TorchScript":
        torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "script.pt")
        with zipfile.ZipFile(tmp_path / "script.pt") as packed, zipfile.ZipFile(path, "w") as plain:
            for entry in packed.infolist():
                plain.writestr(entry.filename, packed.read(entry))
        monkeypatch.setattr(torch.jit, "load", opened)
    else:
        header = tarfile.TarInfo("storages").tobuf()
        header = LEGACY + header[len(LEGACY) : 148] + b" " * 8 + header[156:]  # a name that passes for a .pth
        checksum = b"%06o\0 " % sum(header)
        path.write_bytes(header[:148] + checksum + header[156:] + bytes(1024))
        assert tarfile.is_tarfile(path)
        monkeypatch.setattr(tarfile.TarFile, "extract", opened)
    with pytest.raises(FeatureStoreError, match=r"w\.pth is damaged or incomplete"):
        open_tensors(path)


def test_what_a_pth_sets_is_gone_with_it(tmp_path: Path, state) -> None:
    """BUILD may set attributes of what a pickle names; neither torch nor the next file notices, and no file is written."""
    torch.save({"state_dict": state, "x": Meter(1)}, tmp_path / "sound.pth")
    target = str(tmp_path / "owned").encode()
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    attributes = b"N}(U\x0cdump_patchesI01\nU\x08__name__U" + bytes([len(target)]) + target + b"u\x86b"
    module = b"(U\x06module" + rebuild + attributes + b"U\x01aU\x01btQ"
    hostile = b"\x80\x02}(U\x01a" + module + b"U\x01bcos\nmkdir\n(U" + bytes([len(target)]) + target + b"tRu."
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
    (tmp_path / "w.pth").write_bytes(head + hostile + pickle.dumps([], 2))
    with pytest.raises(FeatureStoreError, match=r"it asks for os.mkdir"):
        open_tensors(tmp_path / "w.pth")
    assert torch._utils._rebuild_tensor_v2.__name__ == "_rebuild_tensor_v2"
    assert not hasattr(torch._utils._rebuild_tensor_v2, "dump_patches")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sound.pth", "w.pth"]
    assert open_weights(str(tmp_path / "sound.pth"), MINI).keys == SHAPES.keys()


@pytest.mark.parametrize("kind", ["bytearray", "bytearray, old", "packed", "sparse", "whole numbers", "complex"])
def test_a_pth_that_is_not_what_it_seems(tmp_path: Path, state, kind: str) -> None:
    """A kilobyte that asks for gigabytes; tensors that are no floats."""
    path = tmp_path / "w.pth"

    class Bomb:
        def __reduce__(self):
            return bytearray, (4 << 30,)

    whole = dict(state)
    key = "features.conv_1_1.bias"
    whole[key] = {
        "sparse": torch.zeros(4).to_sparse(),
        "whole numbers": torch.zeros(4, dtype=torch.int8),
        "complex": torch.zeros(4, dtype=torch.complex64),
    }.get(kind, whole[key])
    if kind.startswith("bytearray"):
        whole = {"state_dict": whole, "x": Bomb()}
    torch.save(whole, path, _use_new_zipfile_serialization=not kind.endswith("old"))
    if kind == "packed":
        with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "p.pth", "w", zipfile.ZIP_DEFLATED) as packed:
            for entry in plain.infolist():
                packed.writestr(entry.filename, plain.read(entry))
        path = tmp_path / "p.pth"
    with pytest.raises(
        FeatureStoreError, match=r"bytearray|packed archive|not a plain tensor|the network has torch.float32"
    ):
        open_weights(str(path), MINI).read(SHAPES)


def _tuples_of_tuples(kind: str) -> bytes:
    """A pickle of some hundred bytes or some hundred thousand whose key Python's own unpickler cannot hash."""
    deep = b")" + b"\x85" * 200_000
    wide = b"U\x01aq\x00" + b"".join(b"0(" + b"h%c" % i * 10 + b"tq%c" % (i + 1) for i in range(40))
    lists = b"]q\x00" + b"".join(b"]q%c(h%ch%ce" % (i + 1, i, i) for i in range(60))
    twos = b"K\x00q\x00" + b"".join(b"h%ch%c\x86q%c" % (i, i, i + 1) for i in range(15))
    text = b"X" + (1 << 19).to_bytes(4, "little") + b"x" * (1 << 19)
    return {
        "a key many times": b"\x80\x02" + twos + b"}(" + b"h\x0fK\x01" * 2_000 + b"u.",
        "a large number as a key": b"\x80\x02}\x8b"
        + struct.pack("<i", 1 << 20)
        + b"\x7f" * (1 << 20)
        + b"q\x00("
        + b"h\x00N" * 2_000
        + b"u.",
        "a list that is called": b"\x80\x02" + lists + b")R.",
        "text that is called": b"\x80\x02" + text + b")\x81.",
        "a long name of a class": b"\x80\x02c" + b"x" * (1 << 19) + b"\nx\n.",
        "a deep key": b"\x80\x02}" + deep + b"K\x01s.",
        "a wide key": b"\x80\x02}" + wide + b"K\x01s.",
        "a deep key beside a class": b"\x80\x02ca\nb\n0}" + deep + b"K\x01s.",
        "a wide key of Python 2": b"(lp0\n0}" + wide + b"I1\ns.",
        "a list in the place of a tensor's numbers": b"\x80\x02ca\nb\n0]]a\x85Q.",
        "a bytearray without its name": b"\x80\x05ca\nb\n0\x96" + (4 << 30).to_bytes(8, "little") + b"x.",
        "a key behind a mark that is not there": b"\x80\x02t.",
    }[kind]


@pytest.mark.parametrize("file", ["zip", "before 1.6", "pkl"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("a deep key", "tuples within tuples, more than 100 deep"),
        ("a wide key", "tuples within tuples, more than 100 deep or of more than 65536 values"),
        ("a key many times", "more than 33554432 values in tuples that are keys"),
        ("a large number as a key", "more than 33554432 values in tuples that are keys"),
        ("a list that is called", "a list or long text is where a class or function should be"),
        ("text that is called", "a list or long text is where a class or function should be"),
        ("a long name of a class", "the name of a class has 524,290 letters"),
        ("a deep key beside a class", "tuples within tuples"),
        ("a wide key of Python 2", "tuples within tuples"),
        ("a list in the place of a tensor's numbers", "a list is where a tensor's numbers should be named"),
        ("a bytearray without its name", "expected 4294967296 bytes in a bytearray8"),
        ("a key behind a mark that is not there", "list index out of range"),
    ],
)
def test_what_would_end_the_process_or_never_end(tmp_path: Path, kind: str, message: str, file: str) -> None:
    """Hashing a tuple that is nested 200,000 deep ends Python; one of 10 ** 40 values takes for ever. Neither gets that far."""
    content, path = _tuples_of_tuples(kind), tmp_path / "w.pth"
    if file == "zip":
        with zipfile.ZipFile(path, "w") as packed:
            packed.writestr("archive/data.pkl", content)
            packed.writestr("archive/version", "3\n")
    elif file == "before 1.6":
        head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
        path.write_bytes(head + content + pickle.dumps([], 2))
    else:
        path.write_bytes(content)
    with pytest.raises(FeatureStoreError, match=rf"w\.pth is damaged or incomplete: .*{message}"):
        open_tensors(path)


def test_keys_and_objects_as_deep_as_a_training_scripts_are_read(tmp_path: Path, state) -> None:
    shared = ("a", ("b", ("c", tuple(range(1000)))))
    nested: list = []
    for _ in range(300):  # lists have no hash: as deep as one likes
        nested = [nested, shared]
    torch.save({"state_dict": state, "x": {shared: nested}, "y": Meter(shared)}, tmp_path / "w.pth")
    assert open_weights(str(tmp_path / "w.pth"), MINI).keys == SHAPES.keys()


def test_the_names_in_an_archive_as_torch_finds_them(tmp_path: Path) -> None:
    """In capitals too: what is looked for in ``data.pkl`` is looked for there."""
    with zipfile.ZipFile(tmp_path / "w.pth", "w") as packed:
        packed.writestr("archive/DATA.PKL", b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x7f\x85R.")
        packed.writestr("archive/version", "3\n")
    with pytest.raises(FeatureStoreError, match="it asks for bytearray"):
        open_tensors(tmp_path / "w.pth")


def hostile_pickles(folder: Path) -> dict[str, bytes]:
    target = str(folder / "owned").encode()
    array = np.zeros(3, np.float32)
    pickles = {
        f"protocol {n}": pickle.dumps({"conv1.weight": array, "x": Hostile(folder / "owned")}, n) for n in range(6)
    }
    pickles["an object array"] = pickle.dumps({"a": np.array([Hostile(folder / "owned")], object)}, 2)
    pickles["a text that begins with a global"] = b"cposix\nmkdir\n(V" + target + b"\ntR."
    pickles["the other names of a module"] = b"\x80\x02cnumpy.core.multiarray\n_reconstruct.os.mkdir\nq\x00."
    pickles["a persistent id"] = b"\x80\x02U\x01aQ."
    pickles["attributes of what it names"] = (
        b"\x80\x02}U\x01acnumpy\nndarray\n\x81N}U\x0c__setstate__cposix\nmkdir\nstbs."
    )
    pickles["a torch tensor"] = pickle.dumps({"a": torch.zeros(2)}, 2)
    return pickles


def test_a_hostile_pkl_never_runs(tmp_path: Path) -> None:
    for name, content in hostile_pickles(tmp_path).items():
        path = tmp_path / "w.pkl"
        path.write_bytes(content)
        with pytest.raises(FeatureStoreError, match=r"can run code|damaged or incomplete"):
            open_weights(str(path), MINI)
        assert not (tmp_path / "owned").exists(), name


def test_what_a_pickle_sets_is_gone_with_it(tmp_path: Path, state) -> None:
    """BUILD can set attributes of a class that is named; the next file must not notice."""
    path = tmp_path / "w.pkl"
    path.write_bytes(b"\x80\x02cnumpy\nndarray\nN}U\x0c__setstate__c_codecs\nencode\ns\x86b.")
    with pytest.raises(FeatureStoreError):
        open_tensors(path)
    path.write_bytes(pickle.dumps({key: value.numpy() for key, value in state.items()}, 2))
    assert open_weights(str(path), MINI).keys == SHAPES.keys()


def test_a_hostile_t7_never_runs(tmp_path: Path, state) -> None:
    path = write_luatorch(tmp_path / "w.t7", state, hostile=True)
    with pytest.raises(FeatureStoreError, match="can run code: it holds a Lua function"):
        open_weights(str(path), MINI)


def test_a_t7_that_promises_more_numbers_than_it_has(tmp_path: Path) -> None:
    lua = LuaTorch()
    few = torch.zeros(4)
    lua.module("nn.Linear", [("weight", lambda: lua.tensor(few)), ("bias", lambda: lua.tensor(few))])
    sound = lua.content
    at = sound.index((4).to_bytes(8, "little"))  # the first tensor's size
    (tmp_path / "w.t7").write_bytes(sound[:at] + (1 << 40).to_bytes(8, "little") + sound[at + 8 :])
    with pytest.raises(FeatureStoreError, match="damaged or incomplete: a tensor of sizes"):
        open_tensors(tmp_path / "w.t7")


def test_a_t7_whose_tables_hold_themselves(tmp_path: Path) -> None:
    lua = LuaTorch()
    itself = (4).to_bytes(4, "little") + (1).to_bytes(4, "little")

    def again() -> None:
        lua.content += itself

    lua.module("nn.Sequential", [("modules", lambda: lua.table([(1.0, again), (2.0, again)]))])
    (tmp_path / "w.t7").write_bytes(lua.content)
    assert open_tensors(tmp_path / "w.t7").tensors == {}


def test_what_shapes_cannot_tell_is_said(tmp_path: Path, state) -> None:
    """A file cut after fc7, whose only matrix is square; and one first convolution, 3 × 3 × 3 × out, alone."""
    path = write_hdf5(tmp_path / "w.h5", state, "HIWO", "as convolutions")
    with h5py.File(path, "a") as file:
        del file["data/fc8_w"], file["data/fc8_b"], file["data/fc7_w"]
        file["data/fc7_w"] = state["fc.fc7.weight"].numpy()
    assert open_weights(str(path), MINI).notes == ("fc7 may have the axes out in or in out; out in is taken",)
    with h5py.File(tmp_path / "one.h5", "w") as file:
        file["conv1_1_w"], file["conv1_1_b"] = np.zeros((3, 3, 3, 4)), np.zeros(4)
    *_, reading = readings(open_tensors(tmp_path / "one.h5"))
    assert reading.notes == ("conv1_1 may have the axes y x in out or y in x out; y x in out is taken",)


def test_hdf5_of_other_kinds(tmp_path: Path, state) -> None:
    path = write_hdf5(tmp_path / "w.h5", state, "OIHW", "out in")
    with h5py.File(path, "a") as file:
        file["data/empty"] = h5py.Empty("f4")
        file["data/text"] = "x"
        file["data/long"] = np.zeros(3, np.longdouble)
    assert open_weights(str(path), MINI).keys == SHAPES.keys()  # what are no numbers is passed over


def test_shapes_are_those_that_are_read(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "w.h5", "w") as file:
        file["one"] = np.float32(3)
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"one": np.array(3.0, np.float32)}, 2))
    for name in ("w.h5", "w.pkl"):
        (stored,) = open_tensors(tmp_path / name).tensors.values()
        assert stored.shape == stored.read().shape == ()
    path = safetensors_file(tmp_path, {"four": {"dtype": "F4", "shape": [4, 4], "data_offsets": [0, 8]}}, bytes(8))
    (stored,) = open_tensors(path).tensors.values()
    with pytest.raises(FeatureStoreError, match=r"four is said to have the shape \(4, 4\), but is read as \(4, 2\)"):
        stored.read()


def safetensors_file(folder: Path, header: dict, numbers: bytes = b"") -> Path:
    text = json.dumps(header).encode()
    (folder / "w.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + numbers)
    return folder / "w.safetensors"


@pytest.mark.parametrize(
    ("n", "digits", "message"),
    [(10_001, 6, "holds 10,001 tensors"), (1, 11_000_000, "its header has 11,000,061 bytes")],
)
def test_more_tensors_than_networks_have_are_refused(tmp_path: Path, n: int, digits: int, message: str) -> None:
    nothing = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    path = safetensors_file(tmp_path, {f"k{i:0{digits}}": nothing for i in range(n)})
    with pytest.raises(FeatureStoreError, match=message):
        open_weights(str(path), MINI)


def test_a_zip_archive_with_a_damaged_end(tmp_path: Path, state) -> None:
    torch.save(state, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    end = whole.rfind(b"PK\x05\x06")
    (tmp_path / "w.pth").write_bytes(whole[:end] + struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 5) + whole[end:])
    with pytest.raises(FeatureStoreError, match=r"w\.pth is damaged or incomplete: zipfiles that span multiple disks"):
        open_weights(str(tmp_path / "w.pth"), MINI)


def test_hdf5_reads_no_other_file(tmp_path: Path, state) -> None:
    secret = write_hdf5(tmp_path / "other.h5", state, "OIHW", "out in")
    path = write_hdf5(tmp_path / "w.h5", state, "OIHW", "out in")
    with h5py.File(path, "a") as file:
        del file["data/fc8_b"]
        file["data/fc8_b"] = h5py.ExternalLink(str(secret), "/data/fc8_b")
    with pytest.raises(FeatureStoreError, match="is not a checkpoint"):  # the link is not there for us
        open_weights(str(path), MINI)
    with h5py.File(path, "a") as file:
        del file["data/fc8_b"]
        file.create_dataset("data/fc8_b", (9,), "f4", external=[(str(secret), 0, 36)])
    with pytest.raises(FeatureStoreError, match="are in another file"):
        open_weights(str(path), MINI)


def test_damage_anywhere_is_an_error_of_ours(files: dict[str, Path], tmp_path: Path) -> None:
    """Cut short and with bytes changed: a message, or a file that happens to be still readable; never another exception."""
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged"
    for name, file in files.items():
        whole = file.read_bytes()
        for trial in range(12):
            content = bytearray(whole[: rng.integers(1, len(whole))] if trial % 2 else whole)
            if trial % 2 == 0:
                for at in rng.integers(0, min(len(whole), 4000), 8):
                    content[at] = rng.integers(0, 256)
            path.write_bytes(content)
            try:
                open_weights(str(path), MINI).read(SHAPES)
            except FeatureStoreError as error:
                assert str(path) in str(error), name


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "page.pth").write_text("<html>404</html>")
    with pytest.raises(FeatureStoreError, match=r"no weights file that is known here: it looks like a web page"):
        open_weights(str(tmp_path / "page.pth"), MINI)
    if sys.platform == "linux":
        with pytest.raises(FeatureStoreError, match="mem is empty"):  # what the system shows as a file
            open_tensors(Path("/proc/self/mem"))
    with pytest.raises(FeatureStoreError, match="there is no weights file"):
        open_weights(str(tmp_path / "gone.pth"), MINI)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(FeatureStoreError, match="not a state dict"):
        open_weights(str(tmp_path / "list.pth"), MINI)
    with pytest.raises(FeatureStoreError, match="whole number"):
        open_weights("random:x", MINI)
    with pytest.raises(FeatureStoreError, match="for networks of your own"):
        open_weights("built", MINI)


def test_random_weights_depend_on_seed_and_key_alone(parity: Path) -> None:
    spec = importlib.util.spec_from_file_location("seeded", parity / "seeded_weights.py")
    seeded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(seeded)
    shapes = get_backbone("inception_resnet_v1").with_classes(5).weight_shapes()
    expected = seeded.fill(shapes, seed=11)
    got = draw_weights(11, reversed(list(shapes)), shapes)
    for key in shapes:
        assert np.array_equal(got[key].numpy(), expected[key]), key
    assert open_weights("random:11", MINI).identity == "seed:11"
    senet = get_backbone("senet50_ft")
    keys = ["bn1.running_var", "bn1.weight", "layer3.2.bn3.weight", "layer3.2.conv4.bias", "layer1.0.conv2.weight"]
    expected = seeded.fill(senet.weight_shapes(), 7, seeded.GAINS["vggface2_senet50_pkl"])
    for key, values in open_weights("random:7", senet).read(keys).items():
        assert np.array_equal(values.numpy(), expected[key]), key


@pytest.mark.parametrize("first", [0x80, 0x28])
def test_the_length_that_begins_a_safetensors_file_is_not_taken_for_a_pickle(tmp_path: Path, first: int) -> None:
    """One header in sixteen has a length whose first byte is that of a pickle."""
    path = tmp_path / "w.safetensors"
    note = ""
    while not path.exists() or path.read_bytes()[0] != first:
        note += "8 chars."
        save_file({"w": torch.ones(3)}, path, {"note": note})
    assert open_tensors(path).tensors["w"].read().tolist() == [1, 1, 1]
