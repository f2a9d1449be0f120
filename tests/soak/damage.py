"""Damage of one bit, a swap, an insertion or a cut anywhere in a store: whether it is named, and repaired to the same bytes.

store = make_store(folder)
for case in range(n):
    outcome = damage_and_repair(store, "flip", case)
"""

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from click.testing import CliRunner

from featurestore import FeatureStore
from featurestore.store.rows import open_shard
from featurestore.store.zarr_format import Layer
from pipelines.cache_layers import main as cache_layers
from pipelines.verify_store import main as verify_store
from tests.conftest import files_of, write_photographs
from tests.heads.tiny_network import NAME, RECIPE

DAMAGES = ("flip", "swap", "insert", "cut")
_LAYERS = ("relu1", "block1", "descriptor")  # the first two of one shape


@dataclass(frozen=True)
class Damaged:
    """What became of one case. ``problem`` is empty if it was named and repaired, or did nothing."""

    what: str
    problem: str


@dataclass(frozen=True)
class Store:
    """A small store of two sources, one of them compressed, and the bytes that every file of it has to have."""

    path: Path
    kept: Path
    files: dict[str, bytes]


def make_store(folder: Path, faces: int = 9) -> Store:
    """By the real command: a tiny network of two seeds, with 4 items to a shard and a last shard that is not full."""
    images = write_photographs(folder / "photographs", faces, 2)
    (folder / "tiny.toml").write_text(RECIPE)
    store = folder / "s.zarr"
    for weights, compress in (("random:0", "none"), ("random:1", "zstd")):
        options = ["--images", images, "--store", store, "--backbone", NAME, "--recipe", folder / "tiny.toml"]
        options += ["--weights", weights, "--compress", compress, "--items-per-shard", 4, "--layers", *_LAYERS]
        done = CliRunner().invoke(cache_layers, [str(each) for each in options])
        assert done.exit_code == 0, done.output
    kept = shutil.copytree(store, folder / "kept.zarr")
    return Store(store, kept, files_of(store))


def damage_and_repair(store: Store, what: str, case: int) -> Damaged:
    """Case number ``case`` of one kind of damage; the store is as it was after it."""
    chance = random.Random(f"{what}-{case}")
    named = sorted(store.files)
    path = store.path / named[case % len(named)]
    said = _swap(store, chance, case) if what == "swap" else _change(path, what, chance)
    changed = [name for name, content in files_of(store.path).items() if store.files.get(name) != content]
    problem = _problem(store, changed) if changed else ""
    if problem or files_of(store.path) != store.files:
        shutil.rmtree(store.path)
        shutil.copytree(store.kept, store.path)
    return Damaged(said if changed else f"{said}: the same bytes", problem)


def _problem(store: Store, changed: list[str]) -> str:
    """Whether the check names every file that changed, and the repair brings back the bytes of all."""
    options = [str(store.path), "--backbone", NAME, "--device", "cpu", "--recompute", "0"]
    found = CliRunner().invoke(verify_store, options)
    if found.exception and not isinstance(found.exception, SystemExit):
        return f"the check ended with {found.exception!r}"
    unnamed = [name for name in changed if not any(place in found.output for place in _places(store.path, name))]
    if unnamed or found.exit_code != 1:
        return f"the check does not name {unnamed}, exit status {found.exit_code}"
    done = CliRunner().invoke(verify_store, [*options, "--repair"])
    if done.exit_code != 0:
        return f"the repair ended with {done.exit_code}: {done.exception!r} {done.output[-500:]}"
    now = files_of(store.path)
    wrong = sorted(name for name in now.keys() | store.files.keys() if now.get(name) != store.files.get(name))
    return f"after the repair other bytes are in {wrong}" if wrong else ""


def _places(store: Path, name: str) -> list[str]:
    """How the check may name a file of the store: by its path, or, a shard, by its layer and number."""
    parts = name.split("/")
    shard = [f"layer {parts[1]}, shard {parts[3]}"] if len(parts) > 4 and parts[1] in _LAYERS else []
    return [str(store / name), *shard]


def _change(path: Path, what: str, chance: random.Random) -> str:
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content))
    if what == "flip":
        bit = chance.randrange(8)
        content[at] ^= 1 << bit
        said = f"bit {bit} of byte {at} of {path.name}"
    else:
        n = chance.choice([1, 2, 4, 7, 16, 60, 64, 100])
        said = f"{what} of {n} at byte {at} of {path}"
        content[at : at + (n if what == "cut" else 0)] = b"" if what == "cut" else chance.randbytes(n)
    path.write_bytes(content)
    return said


def _swap(store: Store, chance: random.Random, case: int) -> str:
    """Two shards of a source, two records of a layer, two coordinate chunks, two documents of the store."""
    kinds = ("shards", "records", "chunks", "documents")
    kind = kinds[case % len(kinds)]
    if kind == "records":
        source = chance.choice(list(FeatureStore.open(store.path).sources.values()))
        layer = source.layers[chance.choice(_LAYERS)]
        one, other = chance.sample(range(layer.n_items), 2)
        _swap_records(layer, one, other)
        return f"records {one} and {other} of {layer.folder}"
    endings = {"shards": "0/0", "documents": "zarr.json", "chunks": ("c/0", ".copy")}
    names = [name for name in sorted(store.files) if name.endswith(endings[kind])]
    if kind == "chunks":
        names = [name for name in names if name.count("/") < 5]
    if kind == "shards":
        within = chance.choice(sorted({name.split("/")[0] for name in names}))
        names = [name for name in names if name.startswith(within)]
    one, other = (store.path / name for name in chance.sample(names, 2))
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])
    return f"{one} and {other} in each other's place"


def _swap_records(layer: Layer, one: int, other: int) -> None:
    """Record and checksum; compressed ones of other lengths stay where they are."""
    places = []
    for row in (one, other):
        shard, slot = divmod(row, layer.slots)
        with open_shard(layer, shard) as opened:
            assert opened
            places.append((layer.shard_path(shard), int(opened[1].offsets[slot]), int(opened[1].nbytes[slot])))
    if places[0][2] != places[1][2]:
        return
    records = []
    for path, offset, nbytes in places:
        records.append(path.read_bytes()[offset : offset + nbytes])
    for (path, offset, nbytes), record in zip(places, reversed(records), strict=True):
        content = bytearray(path.read_bytes())
        content[offset : offset + nbytes] = record
        path.write_bytes(content)
