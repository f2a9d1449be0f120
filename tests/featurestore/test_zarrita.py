"""Stores as they are, read by zarrita (JavaScript) in node: rows bit for bit, absent rows, names.

``FEATURESTORE_NODE_MODULES`` names a folder ``node_modules`` that holds zarrita; without it npm is asked for it.
"""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from featurestore import FeatureStore
from featurestore.store.lock import store_lock
from featurestore.store.writer import SourceWriter
from tests.conftest import LAYERS

PACKAGES = ("zarrita@0.7.5", "@zarrita/storage@0.2.0")
SCRIPT = """
import * as zarr from "zarrita";
import FileSystemStore from "@zarrita/storage/fs";

const [folder, layers, row, columns] = JSON.parse(process.argv[2]);
const open = (name) => zarr.open.v3(zarr.root(new FileSystemStore(folder)).resolve(name), { kind: "array" });
const found = { rows: {}, columns: {} };
for (const name of layers) {
  const array = await open(name);
  const { data, shape } = await zarr.get(array, [row, ...array.shape.slice(1).map(() => null)]);
  const bytes = Buffer.from(data.buffer, data.byteOffset, data.byteLength).toString("base64");
  found.rows[name] = { shape, bytes, dtype: array.dtype };
}
for (const name of columns) found.columns[name] = [...(await zarr.get(await open(name))).data];
console.log(JSON.stringify(found));
"""


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose scripts find zarrita."""
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    folder = tmp_path_factory.mktemp("node")
    given = os.environ.get("FEATURESTORE_NODE_MODULES")
    if given:
        if not (Path(given) / "zarrita").is_dir():
            pytest.skip(f"FEATURESTORE_NODE_MODULES {given} does not hold zarrita")
        (folder / "node_modules").symlink_to(Path(given).resolve())
    else:
        if not shutil.which("npm"):
            pytest.skip("npm is not installed, and FEATURESTORE_NODE_MODULES is not set")
        install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), *PACKAGES]
        try:
            subprocess.run(install, capture_output=True, check=True, timeout=30, cwd=folder)
        except (subprocess.SubprocessError, OSError) as error:
            pytest.skip(f"npm could not install zarrita: {type(error).__name__}")
    (folder / "read.mjs").write_text(SCRIPT)
    return folder


def read(node: Path, source: Path, layers: list[str], row: int, columns: list[str]) -> dict:
    arguments = json.dumps([str(source.resolve()), layers, row, columns])
    done = subprocess.run(["node", "read.mjs", arguments], cwd=node, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def values_of(found: dict, name: str) -> np.ndarray:
    row = found["rows"][name]
    return np.frombuffer(base64.b64decode(row["bytes"]), row["dtype"]).reshape(row["shape"])


@pytest.mark.parametrize("row", [0, 5, 9])
def test_rows_and_names_of_a_store(node: Path, small_store: Path, row: int) -> None:
    """In the first, a middle and the last shard, which is not full."""
    source = FeatureStore.open(small_store).source()
    found = read(node, source.folder, LAYERS, row, ["face_id", "view", "path"])
    for name in LAYERS:
        expected = source.rows(name).gather([row])[0].numpy()
        np.testing.assert_array_equal(values_of(found, name).view(np.uint32), expected.view(np.uint32))
    for name in ("face_id", "view"):
        assert found["columns"][name] == list(source.keys.get_level_values(name))
    assert found["columns"]["path"] == list(source.items["path"])


@pytest.mark.parametrize("compress", ["none", "zstd", "blosc"])
def test_an_absent_row_is_nan(node: Path, tmp_path: Path, compress: str) -> None:
    values = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    with store_lock(tmp_path / "s.zarr", "test"):
        attributes = {"backbone": "none", "weights": "seed:0", "recipe": {}, "precision": "fp32"}
        writer = SourceWriter(tmp_path / "s.zarr", "s", attributes)
        writer.add_layer("l", (2, 3), "float32", compress, 4)
        shard = writer.open_shard("l", 0, end=4)
        shard.write([0, 2], values[[0, 2]])  # 1 and 3 are absent, and so is the second shard
        shard.commit()
        keys = {"face_id": ["ä", "b/c", "007", "𝄞", "e"], "view": ["1", "", "x|flipped", "2", "3"]}
        writer.append(pd.DataFrame(keys, dtype=object).assign(path="", image_sha256=""))
        writer.publish()
    for row in range(5):
        found = read(node, tmp_path / "s.zarr" / "s", ["l"], row, list(keys))
        read_row = values_of(found, "l")
        assert read_row.shape == (2, 3)
        if row in (0, 2):
            np.testing.assert_array_equal(read_row, values[row].reshape(2, 3))
        else:
            assert np.isnan(read_row).all()
        assert found["columns"] == keys
