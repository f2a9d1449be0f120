"""A small VGG-Face (its published keys, narrow) and one set of weights written in every format that people have."""

import math
import pickle
import struct
from collections import OrderedDict
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from featurestore.networks.registry import BACKBONES, RECIPES
from featurestore.networks.spec import BackboneSpec
from featurestore.networks.vggface import BLOCKS

WIDTHS = (4, 5, 6, 7, 8)
FC = 10  # fc6 and fc7, so that fc7 is square, as in the real one
SIZE = 64  # five pools leave maps of 2 × 2: the order of flattening matters


class MiniVGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        features: OrderedDict[str, nn.Module] = OrderedDict()
        width_in = 3
        for block, ((n, _), width) in enumerate(zip(BLOCKS, WIDTHS, strict=True), start=1):
            for i in range(1, n + 1):
                features[f"conv_{block}_{i}"] = nn.Conv2d(width_in, width, 3, padding=1)
                features[f"relu_{block}_{i}"] = nn.ReLU()
                width_in = width
            features[f"maxp_{block}_{n}"] = nn.MaxPool2d(2)
        self.features = nn.Sequential(features)
        layers = [("fc6", nn.Linear(width_in * 4, FC)), ("fc6-relu", nn.ReLU()), ("fc7", nn.Linear(FC, FC))]
        self.fc = nn.Sequential(OrderedDict([*layers, ("fc7-relu", nn.ReLU()), ("fc8", nn.Linear(FC, 9))]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.flatten(self.features(x), 1))


_KEPT = ("conv", "relu", "maxp")
MINI = BackboneSpec(
    name="mini-vgg",
    layers={
        name: path
        for name, path in BACKBONES["vggface"].layers.items()
        if name.startswith(_KEPT) or name in ("fc6", "fc6-relu", "fc7", "fc7-relu", "fc8")
    },
    recipes=(RECIPES["vggface-published"],),
    licence="nobody's",
    builder=MiniVGG,
    input_size=SIZE,
    ends=("fc.fc8.", "fc.fc7.", "fc.fc6."),
)

State = dict[str, torch.Tensor]
CONVOLUTIONS = [f"conv_{block}_{i}" for block, (n, _) in enumerate(BLOCKS, start=1) for i in range(1, n + 1)]
MODULES = [*(f"features.{name}" for name in CONVOLUTIONS), "fc.fc6", "fc.fc7", "fc.fc8"]
TORCHVISION = [
    *(f"features.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)),
    *(f"classifier.{i}" for i in (0, 3, 6)),
]


def renamed(state: State, names: list[str]) -> State:
    modules = dict(zip(MODULES, names, strict=True))
    parts = {key: key.rpartition(".") for key in state}
    return {f"{modules[module]}.{leaf}": state[key] for key, (module, _, leaf) in parts.items()}


class LuaTorch:
    """Writes values as torch7's File.lua does, binary, little endian, 64-bit longs."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.index = 0

    def integer(self, value: int) -> None:
        self.content += struct.pack("<i", value)

    def text(self, text: str) -> None:
        self.integer(len(text))
        self.content += text.encode()

    def number(self, value: float) -> None:
        self.integer(1)
        self.content += struct.pack("<d", value)

    def string(self, text: str) -> None:
        self.integer(2)
        self.text(text)

    def table(self, entries: list[tuple]) -> None:
        """``entries`` are (key, function that writes the value); a key is a string or a number."""
        self.integer(3)
        self.new_index()
        self.integer(len(entries))
        for key, write in entries:
            self.string(key) if isinstance(key, str) else self.number(key)
            write()

    def new_index(self) -> None:
        self.index += 1
        self.integer(self.index)

    def object(self, kind: str) -> None:
        self.integer(4)
        self.new_index()
        self.text("V 1")
        self.text(kind)

    def tensor(self, values: torch.Tensor, kind: str = "Float") -> None:
        self.object(f"torch.{kind}Tensor")
        self.integer(values.dim())
        self.content += struct.pack(f"<{values.dim()}q", *values.shape)
        self.content += struct.pack(f"<{values.dim()}q", *values.contiguous().stride())
        self.content += struct.pack("<q", 1)
        self.object(f"torch.{kind}Storage")
        self.content += struct.pack("<q", values.numel())
        self.content += values.contiguous().numpy().astype("<f8" if kind == "Double" else "<f4").tobytes()

    def module(self, kind: str, fields: list[tuple]) -> None:
        self.object(kind)
        self.table(fields)

    def boolean(self, value: bool) -> None:
        self.integer(5)
        self.integer(value)

    def function(self) -> None:
        """A Lua function: its number, the dumped code, its upvalues."""
        self.integer(6)
        self.new_index()
        self.text("\x1bLua os.execute('touch owned')")
        self.table([])


def write_luatorch(path: Path, state: State, kind: str = "Float", hostile: bool = False) -> Path:
    """An nn.Sequential with convolutions as matrices (SpatialConvolutionMM), and layers without weights between."""
    lua = LuaTorch()

    def leaf(name: str):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        convolution = weight.dim() == 4
        flat = weight.flatten(1) if convolution else weight
        fields = [
            ("gradWeight", lambda: lua.tensor(torch.zeros_like(flat), kind)),
            ("bias", lambda: lua.tensor(bias, kind)),
            ("weight", lambda: lua.tensor(flat, kind)),
            ("train", lambda: lua.boolean(False)),
        ]
        return lambda: lua.module("nn.SpatialConvolutionMM" if convolution else "nn.Linear", fields)

    def relu() -> None:
        lua.module(
            "nn.ReLU", [("inplace", lambda: lua.boolean(True)), *([("forward", lua.function)] if hostile else [])]
        )

    names = [name for name in MODULES if f"{name}.weight" in state]
    writers = [writer for name in names for writer in (leaf(name), relu)]
    # Written from the last to the first: a Lua table has no order, and its numbers say which module comes first.
    modules = [(float(i), writer) for i, writer in reversed(list(enumerate(writers, start=1)))]
    lua.module(
        "nn.Sequential", [("modules", lambda: lua.table(modules)), ("_type", lambda: lua.string("torch.FloatTensor"))]
    )
    path.write_bytes(lua.content)
    return path


def write_hdf5(path: Path, state: State, convolutions: str, linear: str, group: str = "data/") -> Path:
    """``convolutions`` is OIHW, HWIO or HIWO, ``linear`` is ``out in``, ``in out`` or ``as convolutions``."""
    spatial_first = convolutions == "HWIO"
    with h5py.File(path, "w") as file:
        for name in MODULES:
            short = name.rpartition(".")[2].replace("conv_", "conv")
            weight = state[f"{name}.weight"].numpy()
            if weight.ndim == 2 and (name == "fc.fc6" or linear == "as convolutions"):
                side = math.isqrt(weight.shape[1] // len(state["features.conv_5_3.bias"])) if name == "fc.fc6" else 1
                maps = weight.reshape(len(weight), -1, side, side)
                if linear != "as convolutions":  # flattened in the order of the convolutions' axes
                    weight = (maps.transpose(0, 2, 3, 1) if spatial_first else maps).reshape(len(weight), -1)
                else:
                    weight = maps
            if weight.ndim == 4:
                weight = weight.transpose(["OIHW".index(axis) for axis in convolutions])
            elif linear == "in out":
                weight = weight.T
            file[f"{group}{short}_w"] = weight
            file[f"{group}{short}_b"] = state[f"{name}.bias"].numpy()
    return path


def write_every_format(folder: Path, state: State) -> dict[str, Path]:
    """The whole network's weights in each format and layout."""
    files = {}

    def at(name: str) -> Path:
        files[name] = folder / f"{name}.weights"  # the ending says nothing
        return files[name]

    torch.save(state, at("pth"))
    torch.save(state, at("pth-old"), _use_new_zipfile_serialization=False)
    torch.save({"model_state_dict": state, "epoch": 3}, at("checkpoint"))
    torch.save({f"module.{key}": value for key, value in state.items()}, at("parallel"))
    save_file(state, at("safetensors"))
    torch.save(renamed(state, TORCHVISION), at("torchvision"))
    head = {"decision_block.conv_d_7_1.weight": torch.zeros(2), "vgg_core_bridge.fc6.bias": torch.zeros(3)}
    torch.save({**{f"vgg_core.vgg_core.{key}": value for key, value in state.items()}, **head}, at("end-to-end"))
    head = {"decision_layer.fc_d.weight": torch.zeros(3, 2)}
    torch.save({**{f"vgg_core.{key}": value for key, value in state.items()}, **head}, at("multi-view"))
    write_luatorch(at("t7"), state)
    write_luatorch(at("t7-double"), state, "Double")
    for convolutions in ("OIHW", "HWIO", "HIWO"):
        for linear in ("out in", "in out", "as convolutions"):
            write_hdf5(at(f"hdf5-{convolutions}-{linear}".replace(" ", "-")), state, convolutions, linear)
    arrays = {key: value.numpy() for key, value in state.items()}
    for protocol in range(6):
        at(f"pkl-{protocol}").write_bytes(pickle.dumps(arrays, protocol=protocol))
    fortran = {key: np.asfortranarray(value) for key, value in arrays.items()}
    at("pkl-fortran").write_bytes(pickle.dumps(fortran, protocol=2))
    return files
