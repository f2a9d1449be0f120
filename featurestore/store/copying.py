"""A store copied between a disk and an object store, either way: checked, and gone on with where it was interrupted.

Shards go first, then chunks, then documents, the root's last: what is there of a copy that was interrupted is no store yet.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from crc32c import crc32c

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL
from featurestore.remote.cache import own_folder
from featurestore.remote.client import Missing
from featurestore.remote.mirror import CRC32C, Mirror, is_shard, local_store, mirror_of, of_sources, put_file, requests
from featurestore.store.checksums import NOT_ITS_OWN, Checksums
from featurestore.store.integrity import check_files
from featurestore.store.lock import is_being_written, store_lock
from featurestore.store.mirrored import download, fetched, holds_noted, transfers
from featurestore.store.reader import FeatureStore
from featurestore.store.shards import DamagedShard
from featurestore.store.writer import free_bytes, refuse_old_version
from featurestore.store.zarr_format import METADATA, Layer
from featurestore.text import human_bytes, listing

CountBytes = Callable[[int], Any]  # called with the size of a file that is there now


@dataclass(frozen=True)
class CopyPlan:
    """What is to be in ``destination``: size (bytes) by file name. ``there`` are those of that size that it has already."""

    source: Path
    destination: Path
    files: Mapping[str, int]
    there: frozenset[str]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def __str__(self) -> str:
        shards = sum(map(is_shard, self.files))
        kind = "objects" if mirror_of(self.destination) else "files"
        lines = [
            f"  from      {self.source}",
            f"  to        {self.destination}",
            f"  copied    {len(self.files):,} {kind}, {shards:,} of them shards, {human_bytes(self.nbytes)}",
        ]
        if self.there:
            size = human_bytes(sum(self.files[name] for name in self.there))
            lines.append(f"  there     {len(self.there):,} of that size, {size}: not copied again if they are the same")
        return "\n".join(lines)


@dataclass
class Copied:
    """What a copy did: files and bytes that were copied, and files that were there as they have to be."""

    files: int = 0
    nbytes: int = 0
    there: int = 0


def plan_copy(source: Path, destination: Path) -> CopyPlan:
    """Compare the two. FeatureStoreError if ``source`` is no store or is damaged, or ``destination`` holds other things."""
    store = FeatureStore.open(source)
    root = fetched(store.path, copies=True)
    refuse_old_version(root)
    if is_being_written(root):
        raise FeatureStoreError(f"{root} is being written. Copy it when that is done.")
    damage = check_files(root)
    if damage:
        raise FeatureStoreError(f"{damage[0]}. Repair it first: pipelines/verify_store.py {root} --repair")
    files = of_sources(_files(root, store))
    to = local_store(destination, writing=True)
    there = _files(to, None)
    others = sorted(there.keys() - files.keys())
    if others:
        raise FeatureStoreError(
            f"{to} holds what {root} does not ({listing(others, 2)}), so it is not a copy of it. Choose another `destination`."
        )
    remote = mirror_of(to)
    missing = sum(size for name, size in files.items() if there.get(name) != size)
    if remote is not None and remote.objects.read_only:
        raise FeatureStoreError(f"{remote.url} can only be read. Copy to s3://, gs:// or az://, or to a folder.")
    if remote is None and missing > free_bytes(to):
        raise FeatureStoreError(
            f"not enough disk for {to}: {human_bytes(missing)} are to be copied, {human_bytes(free_bytes(to))} are free. Choose "
            "another `destination`."
        )
    return CopyPlan(root, to, files, frozenset(name for name, size in there.items() if files[name] == size))


def copy_store(plan: CopyPlan, check: bool = True, progress: CountBytes = lambda nbytes: None) -> Copied:
    """Carry it out, under the destination's ``store_lock``. Run again after an interruption, it copies what is missing.

    Every shard is compared with the checksums that the store holds of its rows. ``check`` reads what was put on an object store
    back, and compares it. FeatureStoreError names a file that is damaged or did not arrive.
    """
    store, done = FeatureStore.open(plan.source), Copied()
    layers = {f"{name}/{each}": layer for name, found in store.sources.items() for each, layer in found.layers.items()}
    with store_lock(plan.destination, "pipelines/copy_store.py", unfinished=True):
        for names in _in_order(plan.files):
            for name, copied in zip(names, transfers().map(partial(_copy, plan, layers, check), names), strict=True):
                done.files += copied
                done.nbytes += copied * plan.files[name]
                done.there += not copied
                progress(plan.files[name])
    if mirror_of(plan.destination) is None:
        damage = check_files(plan.destination)
        if damage:
            raise FeatureStoreError(f"{damage[0]}. Run the same command again.")
    return done


def _files(root: Path, store: FeatureStore | None) -> dict[str, int]:
    """Size (bytes) of each file of a store, by name."""
    remote = mirror_of(root)
    if remote is None or (remote.objects.read_only and store is None):
        paths = [path for path in root.rglob("*") if path.is_file() and not path.name.endswith(PARTIAL)]
        return {path.relative_to(root).as_posix(): path.stat().st_size for path in paths}
    if not remote.objects.read_only:
        return {key: size for key, size in remote.objects.listed() if not key.endswith(PARTIAL)}
    assert store is not None  # what cannot be listed names its files
    small = {path.relative_to(root).as_posix(): path.stat().st_size for path in root.rglob("*") if path.is_file()}
    layers = [layer for source in store.sources.values() for layer in source.layers.values()]
    shards = [remote.key(layer.shard_path(shard)) for layer in layers for shard in range(layer.n_shards)]

    def size_of(key: str) -> int | None:
        try:
            return remote.objects.head(key)[0]
        except Missing:
            return None

    sizes = zip(shards, requests().map(size_of, shards), strict=True)
    return {**small, **{key: size for key, size in sizes if size is not None}}


def _in_order(names: Mapping[str, int]) -> Iterator[list[str]]:
    """Those that may be copied side by side: shards, chunks, documents from the inside out."""

    def rank(name: str) -> int:
        if name.rpartition("/")[2] == METADATA:
            return 100 - name.count("/")
        return 0 if is_shard(name) else 1

    for each in sorted(set(map(rank, names))):
        yield sorted(name for name in names if rank(name) == each)


def _copy(plan: CopyPlan, layers: Mapping[str, Layer], check: bool, name: str) -> bool:
    """Whether the file had to be copied."""
    source, destination = mirror_of(plan.source), mirror_of(plan.destination)
    layer, shard = _shard_of(name, layers)
    noted = None if layer is None else Checksums(layer)[layer.shard_rows(shard)]

    def right(path: Path) -> bool:
        """Whether a file is this one, as far as the store says what is in it."""
        return layer is None or noted is None or holds_noted(layer, shard, path, noted)

    if destination is None and layer is not None and name in plan.there and right(plan.destination / name):
        return False
    if source is None:
        given = plan.source / name
    else:
        given = (plan.destination if destination is None else own_folder() / "copying") / f"{name}{PARTIAL}"
        given.parent.mkdir(parents=True, exist_ok=True)
        came = download(source, name, given)
        said = source.objects.head(name)[1].get(CRC32C)
        if said is not None and said != f"{came:08x}":
            given.unlink()
            raise FeatureStoreError(
                f"{source.url}/{name} is not what was put there: its crc32c is {came:08x}, not {said}."
            )
    try:
        if not right(given):
            raise DamagedShard(
                f"{plan.source / name}: {NOT_ITS_OWN}, for some of its rows. Repair the store first: "
                f"pipelines/verify_store.py {plan.source} --repair"
            )
        if destination is not None:
            return _put(destination, name, given, name in plan.there, check)
        path = plan.destination / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_name(path.name + PARTIAL)
        if source is None:
            shutil.copyfile(given, partial_path)
        partial_path.replace(path)
        return True
    finally:
        if source is not None:
            given.unlink(missing_ok=True)


def _put(destination: Mirror, key: str, path: Path, there: bool, check: bool) -> bool:
    """The same of an object."""
    crc = _crc_of_file(path)
    if there:
        said = destination.objects.head(key)[1].get(CRC32C)
        if (said or f"{_crc_there(destination, key):08x}") == f"{crc:08x}":
            return False
    destination.require_lease()
    put_file(destination.objects, key, path)
    if check and _crc_there(destination, key) != crc:
        raise FeatureStoreError(f"{destination.url}/{key} did not arrive as it was sent. Run the same command again.")
    return True


def _crc_there(remote: Mirror, key: str) -> int:
    crc = 0
    for piece in remote.objects.stream(key)[1]:
        crc = crc32c(piece, crc)
    return crc


def _crc_of_file(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            crc = crc32c(piece, crc)
    return crc


def _shard_of(name: str, layers: Mapping[str, Layer]) -> tuple[Layer | None, int]:
    """The layer and the number of a shard, by its file's name; None for other files."""
    array, _, place = name.rpartition("/c/")
    if not is_shard(name) or array not in layers:
        return None, 0
    return layers[array], int(place.partition("/")[0])
