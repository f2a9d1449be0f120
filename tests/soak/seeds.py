"""Small valid files of every kind, written by the code that writes them for users where there is such code.

The same bytes each time, so that a case's number says what was damaged.
"""

import io
import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.io import savemat

from featurestore import FeatureStore
from featurestore.checkpoints.formats import dlib
from featurestore.checkpoints.formats.pytorch import LEGACY
from featurestore.keys import BOX, KEY, LANDMARKS
from featurestore.photos.detection import COUNT, SEARCHED
from featurestore.store.writer import SourceWriter
from heads.checkpoints import save_head
from heads.registry import draw_head
from heads.train import Checkpoint, TrainingState
from tests.commands import ROOT
from tests.conftest import run_pass, write_photographs
from tests.featurestore.checkpoints import MINI, write_every_format
from tests.heads.published import Earlier, Published
from tests.heads.tiny_network import NAME, RECIPE

N_FEATURES = 12  # of a row that the published heads take here
VERSION_01 = ROOT / "tests" / "heads" / "data" / "version-0.1"
IDENTITY = "of this run"
STORE = "tiny.zarr"
LAYERS = ("block1", "relu1", "descriptor")
_FACES, _VIEWS = ("anna", "ben", "7"), ("1", "2")
_RGB = np.random.default_rng(0).integers(0, 256, (11, 9, 3), np.uint8)


def write_seeds(folder: Path) -> None:
    """``folder/kind/seed/…`` for every kind."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for kind, write in WRITERS.items():
        (folder / kind).mkdir(parents=True)
        write(folder / kind)
    for path in folder.rglob("*.lock"):
        path.unlink()
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(_in_order(path.read_bytes()))
    for path in (folder / "checkpoints").glob("*/*"):
        path.write_bytes(_without_addresses(_in_order(path.read_bytes())))


def _in_order(content: bytes) -> bytes:
    """A safetensors file with its metadata in alphabetical order: they are written in any."""
    if content[8:9] != b"{":
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode().ljust(end - 8)
    return content[:8] + header + content[end:]


def _without_addresses(content: bytes) -> bytes:
    """torch before 1.6 calls numbers by where they were in memory."""
    if not content.startswith(LEGACY):
        return content
    found = dict.fromkeys(re.findall(rb"(?<=X.\0\0\0)[0-9]{10,16}", content, re.DOTALL))
    for i, address in enumerate(found):
        content = content.replace(address, str(i).encode().zfill(len(address)))
    return content


def _file(folder: Path, seed: str, name: str) -> Path:
    path = folder / seed / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _images(folder: Path) -> None:
    rgb = Image.fromarray(_RGB)
    rotated, clear = Image.Exif(), rgb.convert("RGBA")
    rotated[0x0112] = 6
    clear.putalpha(100)
    wide = Image.fromarray(_RGB[..., 0].astype(np.uint16) * 257)
    palette = rgb.convert("P", palette=Image.Palette.ADAPTIVE)
    frames = {"save_all": True, "append_images": [rgb.rotate(90), rgb.rotate(180)], "duration": 50}
    pictures: dict[str, tuple[Image.Image, str, dict]] = {
        "png": (rgb, "PNG", {}),
        "png-alpha": (clear, "PNG", {}),
        "png-16": (wide, "PNG", {}),
        "png-1": (rgb.convert("1"), "PNG", {}),
        "png-palette": (palette, "PNG", {"transparency": 0}),
        "png-animated": (rgb, "PNG", frames),
        "jpeg": (rgb, "JPEG", {"exif": rotated}),
        "jpeg-progressive": (rgb, "JPEG", {"progressive": True}),
        "jpeg-cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "jpeg-grey": (rgb.convert("L"), "JPEG", {}),
        "ppm": (rgb, "PPM", {}),
        "pgm": (rgb.convert("L"), "PPM", {}),
        "pgm-16": (wide, "PPM", {}),
        "pbm": (rgb.convert("1"), "PPM", {}),
        "bmp": (rgb, "BMP", {}),
        "bmp-palette": (palette, "BMP", {}),
        "tiff": (rgb, "TIFF", {}),
        "tiff-16": (wide, "TIFF", {}),
        "tiff-lzw": (rgb, "TIFF", {"compression": "tiff_lzw"}),
        "tiff-jpeg": (rgb, "TIFF", {"compression": "jpeg"}),
        "tiff-deflate": (clear, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "tiff-g4": (rgb.convert("1"), "TIFF", {"compression": "group4"}),
        "tiff-pages": (rgb, "TIFF", {"save_all": True, "append_images": [rgb, palette]}),
        "tiff-cmyk": (rgb.convert("CMYK"), "TIFF", {}),
        "webp": (rgb, "WEBP", {"exif": rotated}),
        "webp-lossless": (clear, "WEBP", {"lossless": True}),
        "webp-animated": (rgb, "WEBP", frames),
        "mask": (palette, "PNG", {}),
    }
    for seed, (image, format, options) in pictures.items():
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        _file(folder, seed, "image").write_bytes(buffer.getvalue())
    _file(folder, "tiff-tiled", "image").write_bytes(_tiled_tiff())


def _tiled_tiff() -> bytes:
    """Two by two tiles of 16 × 16 grey pixels, which Pillow reads but does not write."""
    shorts = [(256, 20), (257, 18), (258, 8), (259, 1), (262, 1), (277, 1), (322, 16), (323, 16)]
    start = 8 + 2 + 12 * (len(shorts) + 2) + 4
    offsets, counts = start, start + 16
    entries = [struct.pack("<HHII", tag, 3, 1, value) for tag, value in shorts]
    entries += [struct.pack("<HHII", 324, 4, 4, offsets), struct.pack("<HHII", 325, 4, 4, counts)]
    tiles = struct.pack("<8I", *(start + 32 + 256 * i for i in range(4)), *[256] * 4) + bytes(range(256)) * 4
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + bytes(4) + tiles


def _checkpoints(folder: Path) -> None:
    state = MINI.build().state_dict()
    kept = ("pth", "checkpoint", "safetensors", "t7", "hdf5-OIHW-out-in", "pkl-0", "pkl-2", "pkl-4", "pkl-fortran")
    every = folder / "every"
    every.mkdir()
    for name, path in write_every_format(every, state).items():
        if name in kept:
            path.rename(_file(folder, name, "file.weights"))
    shutil.rmtree(every)
    few = {
        "a.weight": torch.arange(6.0).reshape(2, 3),
        "a.bias": torch.zeros(2, dtype=torch.float16),
        "n": torch.tensor(3),
    }
    small = {
        "small-pth": lambda path: torch.save({"state_dict": few, "epoch": 1, "lr": 0.1, "args": ("a", ("b", 2))}, path),
        "small-pth-old": lambda path: _save_as_before(few, path),
        "pth-old": lambda path: _save_as_before(state, path),
        "small-pth-other": lambda path: torch.save({"model": few, "optimizer": Path("a")}, path),
        "small-safetensors": lambda path: save_file(few, path, {"finetuned": '{"weights": "a", "random": true}'}),
        "small-hdf5": _small_hdf5,
        "small-pkl": lambda path: path.write_bytes(
            pickle.dumps({key: value.numpy() for key, value in few.items() if value.ndim}, protocol=3)
        ),
        "dlib-start": lambda path: path.write_bytes(_start_of_dlib()),
        "dlib-landmarks": lambda path: path.write_bytes(b"\x01\x01\x81\x01\x81\x01" + bytes(64)),
    }
    for seed, write in small.items():
        write(_file(folder, seed, "file.weights"))


def _save_as_before(state: dict[str, torch.Tensor], path: Path) -> None:
    """As torch before 1.6, in one storage: several are written in the order of where they are in memory."""
    together = torch.cat([value.float().flatten() for value in state.values()])
    parts = together.split([value.numel() for value in state.values()])
    views = {key: part.view(value.shape) for part, (key, value) in zip(parts, state.items(), strict=True)}
    torch.save(views, path, _use_new_zipfile_serialization=False)


def _small_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["data/conv_w"] = np.ones((2, 3), np.float32)
        file["one"] = np.ones(1)
        file["half"] = np.ones(4, np.float16)
        file.create_dataset("packed", data=np.arange(300), chunks=(50,), compression="gzip")
        file["link"] = h5py.SoftLink("/data/conv_w")


def _start_of_dlib() -> bytes:
    """dlib's network as far as its first convolution: the whole of it has 22 MB."""

    def integer(value: int) -> bytes:
        magnitude = abs(value).to_bytes(max(1, (abs(value).bit_length() + 7) // 8), "little")
        return bytes([len(magnitude) | (0x80 if value < 0 else 0)]) + magnitude

    def real(value: float) -> bytes:
        return integer(int(value * 2**20)) + integer(-20)

    def text(value: str) -> bytes:
        return integer(len(value)) + value.encode()

    parts = [integer(1), text("loss_metric_2"), real(0.04), real(0.6), *map(integer, dlib._VERSIONS)]
    parts += [text("input_rgb_image_sized"), *map(real, dlib.MEAN_RGB), integer(dlib.SIZE), integer(dlib.SIZE)]
    parts += [text("con_4"), *map(integer, (2, 4736, 1, 1, 1)), bytes(4 * 4736), *map(integer, (32, 7, 7, 2, 2, 0, 0))]
    return b"".join(parts)


def _csvs(folder: Path) -> None:
    keys = [(face, view) for face in _FACES for view in _VIEWS]
    photographs = pd.DataFrame(keys, columns=list(KEY))
    photographs["path"] = [f"{face}/{view}.png" for face, view in keys]
    listed = pd.DataFrame({"NAME_ID": photographs["path"].str.removesuffix(".png"), "X": 1, "Y": 2.5, "W": 5, "H": 6})
    found = photographs.assign(**dict.fromkeys(BOX, 4.5), **dict.fromkeys(LANDMARKS, 3.25))
    found = found.assign(**{COUNT: 1, SEARCHED: "sha256:0123456789abcdef"})
    identities = pd.DataFrame(
        {"Class_ID": _FACES, "Name": ["A", "B", "C"], "Sample_Num": 2, "Flag": "1", "Gender": "f"}
    )
    judged = ("face-1", "face-2", "face-3")  # of the store of version 0.1
    trials = pd.DataFrame([(*judged, face) for face in judged] * 3, columns=["face_1", "face_2", "face_3", "odd"])
    views = trials.assign(
        view_1="left", view_2="frontal", view_3="left", odd_position=[1, 2, 3] * 3, participant="p", response_time=0.5
    )
    published = trials.set_axis(["head1", "head2", "head3", "head_odd"], axis=1).assign(session="2D")
    pairs = pd.DataFrame(
        [("anna", "1", "ben", "2"), ("anna", "1", "anna", "2")], columns=["face_1", "view_1", "face_2", "view_2"]
    )
    similar = pd.DataFrame(
        [("anna", "ben", 0.5), ("anna", "7", 0.25), ("7", "ben", 0.75)], columns=["face_1", "face_2", "similarity"]
    )
    square = pd.DataFrame(1 - np.eye(3), index=list(_FACES), columns=list(_FACES))
    tables = {
        "photographs": photographs.assign(age=[20, 30.5, None, 40, 50, 60], group="a"),
        "boxes": listed,
        "found": found,
        "identities": identities,
        "landmarks": found[[*KEY, *LANDMARKS]],
        "mask-names": pd.DataFrame({"label": [0, 1, 7], "name": ["a", "b", "a"]}),
        "mask-colours": pd.DataFrame({"colour": ["#ff8000", "0000ff"], "name": ["a", "b"]}),
        "masks": photographs[list(KEY)].assign(mask="m.png"),
        "trials": trials,
        "trials-views": views,
        "trials-published": published,
        "pairs": pairs.assign(same=["false", "true"], fold=[1, 2]),
        "similarity": similar,
        "similarity-pairs": pd.DataFrame({"pair": ["(0, 1)", "(0, 2)", "(1, 2)"], "dissimilarity": [0.1, 0.2, 0.3]}),
        "items": photographs.assign(npy_file=photographs["path"]),
    }
    for seed, table in tables.items():
        table.to_csv(_file(folder, seed, "table.csv"), index=False, lineterminator="\n")
    square.to_csv(_file(folder, "similarity-square", "table.csv"), index_label="face")
    texts = {
        "list": "\n".join(photographs["path"]),
        "labels": "\n".join(_FACES),
        "pairs-lfw": "1\t1\nanna\t1\t2\nanna\t1\tben\t2\n",
        "recipe-toml": RECIPE,
    }
    for seed, text in texts.items():
        _file(folder, seed, "table.toml" if seed == "recipe-toml" else "table.txt").write_text(text)
    recipe = {
        "size": 32,
        "resize": "pil-crop",
        "short_side": 40,
        "channels": "BGR",
        "mean": [1, 2, 3],
        "scale": [1.5, 2, 3],
    }
    _file(folder, "recipe-json", "table.json").write_text(json.dumps(recipe))
    for seed in ("photographs", "list"):
        for name in photographs["path"]:
            _file(folder, seed, name).write_bytes(b"")


def _heads(folder: Path) -> None:
    shutil.copytree(VERSION_01 / "runs", folder / "runs")
    for head, options in {
        "similarity": {},
        "fc": {"parallel": True},
        "identity": {"faces": ["a", "b"]},
        "zero-shot": {},
    }.items():
        path = _file(folder, f"ours-{head}", "weights.safetensors")
        save_head(draw_head(head, (N_FEATURES,), 0, **options), path, "fc7-relu", sources=["a"])
    published = {
        "published-conv": Published(7, N_FEATURES, conv=True, parallel=False),
        "published-fc": Published(7, N_FEATURES, conv=False, parallel=True),
        "published-earlier": Earlier(conv=True),
    }
    states = {seed: module.state_dict() for seed, module in published.items()}
    states["published-earlier"] = {
        key: value[:, :N_FEATURES].clone() if key == "vgg_core_fc8.fc8.weight" else value
        for key, value in states["published-earlier"].items()
    }
    states["published-identity"] = {
        "decision_layer.fc_d.weight": torch.zeros(3, N_FEATURES),
        "decision_layer.fc_d.bias": torch.zeros(3),
    }
    for seed, state in states.items():
        torch.save(state, _file(folder, seed, "head.pth"))
    head = draw_head("similarity", (N_FEATURES,), 0)
    adam = torch.optim.Adam(head.parameters())
    for value in head.parameters():
        value.grad = torch.ones_like(value)
    adam.step()
    state = TrainingState([], {name: tensor.clone() for name, tensor in head.state_dict().items()}, 0, 1.5)
    Checkpoint(_file(folder, "unfinished", "state.safetensors"), IDENTITY).save(head, adam, state)


def _stores(folder: Path) -> None:
    made = folder / "made"
    recipe = made / "tiny.toml"
    made.mkdir()
    recipe.write_text(RECIPE)
    for seed, options in {"plain": {}, "packed": {"compress": "zstd", "dtype": "float16"}}.items():
        images = write_photographs(made / seed, 3, 2)
        store = folder / seed / STORE
        run_pass(images, store, list(LAYERS), backbone=NAME, recipe=str(recipe), **options)
        writer = SourceWriter(store, FeatureStore.open(store).source().name, {})
        paths = [Path(path).relative_to(images).as_posix() for path in writer.table["path"]]
        writer.replace_table(writer.table.assign(path=np.array(paths, object)))
        writer.publish()
    shutil.rmtree(made)
    shutil.copytree(ROOT / "tests" / "featurestore" / "data" / "version-1.zarr", folder / "version-1" / STORE)


def _activations(folder: Path) -> None:
    rows = np.arange(12, dtype=np.float32).reshape(6, 2)
    keys = [(face, view) for face in _FACES for view in _VIEWS]
    table = pd.DataFrame(keys, columns=list(KEY))
    np.save(_file(folder, "npy", "rows.npy"), rows)
    np.savez(_file(folder, "npz", "rows.npz"), features=rows, other=rows)
    np.savez_compressed(_file(folder, "npz-packed", "rows.npz"), features=rows)
    np.savetxt(_file(folder, "txt", "rows.txt"), rows)
    path = _file(folder, "mat", "rows.mat")
    savemat(path, {"features": rows, "names": np.array(["a", "b"], object)})
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(116) + path.read_bytes()[116:])  # it says when it was written
    path = _file(folder, "mat-packed", "rows.mat")
    savemat(path, {"features": rows}, do_compression=True)
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(116) + path.read_bytes()[116:])
    with h5py.File(_file(folder, "h5", "rows.h5"), "w") as file:
        file["features"] = rows
    for seed in ("npy", "txt", "mat", "h5", "npz"):
        table.assign(age=20).to_csv(folder / seed / "items.csv", index=False)
    with h5py.File(_file(folder, "exported", "rows.h5"), "w") as file:
        file.create_dataset("fc7", data=rows, chunks=(2, 2), compression="gzip")
        file["fc7"].attrs["layer"] = "fc7"
        for i, name in enumerate(KEY):
            file[name] = [key[i] for key in keys]
        file["items/age"] = np.arange(6.0)
    for (face, view), row in zip(keys, rows, strict=True):
        np.save(_file(folder, "files", f"{face}/{view}.npy"), row)
    pickled = {
        "pickle-pairs": dict(zip(keys, rows, strict=True)),
        "pickle-faces": {
            face: {view: row for (name, view), row in zip(keys, rows, strict=True) if name == face} for face in _FACES
        },
        "pickle-layer": {"fc7": rows},
    }
    for seed, held in pickled.items():
        _file(folder, seed, "rows.pkl").write_bytes(pickle.dumps(held, protocol=4))
    for path in sorted((ROOT / "tests" / "featurestore" / "data" / "pickled").glob("*.pkl")):
        shutil.copy(path, _file(folder, f"pickle-{path.stem}", "rows.pkl"))


WRITERS: dict[str, Callable[[Path], None]] = {
    "images": _images,
    "checkpoints": _checkpoints,
    "csvs": _csvs,
    "heads": _heads,
    "stores": _stores,
    "activations": _activations,
}
