"""Find face photographs and give each its key: the pair (face, view).

Keys are strings, never positions: a wrong face is then a look-up error instead of a silent mix-up.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from featurestore.errors import FeatureStoreError
from featurestore.keys import FLIPPED, KEY
from featurestore.photos.csv_files import read_csv
from featurestore.remote.client import ObjectStore, url_of
from featurestore.text import in_natural_order, listing, near_matches, shortened

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".pgm", ".ppm", ".bmp", ".tif", ".tiff", ".webp"})
RESERVED = re.compile(r"item|checksums|image_sha256|zarr\.json|.*\.partial|(channel|y|x|feature|token)_[0-9]+")

# Layouts of published face sets; matched against the path below the folder, without its ending.
# "folders" is also VGGFace2 (n000129/0003_01). Deeper trees are refused rather than guessed at.
LAYOUTS = {
    "heads": r"(?:.*/)?(?P<face>head-\d+)_(?:angle-)?(?P<view>frontal|\d+(?:\.\d+)?)",
    "folders": r"(?P<face>[^/]+)/(?P<view>[^/]+)",
}


@dataclass(frozen=True)
class FoundFaces:
    """Keyed photographs.

    ``table`` has one row per item in natural key order: ``face_id``, ``view`` (str), ``path`` (str, absolute)
    and any further metadata columns. ``layout`` says how keys were read, ``left_out`` which image files
    did not match a pattern that the user gave. ``boxed`` photographs have the columns ``BOX``, by which they are cut.
    """

    table: pd.DataFrame
    layout: str
    left_out: tuple[str, ...] = ()
    boxed: bool = False


def find_faces(
    images: str | os.PathLike[str],
    pattern: str | None = None,
    images_root: str | os.PathLike[str] | None = None,
    listed_only: bool = False,
) -> FoundFaces:
    """Key every photograph of a folder, of a CSV with ``face_id, view, path`` columns, or of a ``.txt`` list with a path a line.

    ``pattern`` is a layout's name (see ``LAYOUTS``) or a regular expression with groups ``face`` and ``view``,
    searched for in each path below the folder, or as the list has it. Paths of a list are relative to ``images_root``, or to
    the list's own folder. ``images``, ``images_root`` and paths of a CSV or a list may be URLs, of a prefix or of photographs
    on an object store. ``listed_only``: photographs of a CSV or a list need not be there, to plan for them. Raises
    FeatureStoreError for a missing folder or photograph, no images, an image without a key (no pattern given), two files for one
    key, or a view whose name ends in ``|flipped``.
    """
    url = url_of(images)
    if url is not None:
        return _in_order(_scan_objects(url, pattern))
    root = Path(images).expanduser()
    if not root.exists():
        raise FeatureStoreError(f"there is no folder or CSV {root}. Check the path given with `images`.")
    is_list = root.is_file() and root.suffix.lower() == ".txt"
    if images_root is not None and not is_list:
        raise FeatureStoreError(
            f"`images_root` is for lists of photographs, a .txt file with a path a line; {root} is none."
        )
    if is_list:
        beside: str | Path = root.parent
        if images_root is not None:
            beside = url_of(images_root) or Path(images_root).expanduser()
        found = _read_list(root, beside, pattern, listed_only)
    elif root.is_file():
        if pattern is not None:
            raise FeatureStoreError(f"`pattern` is for folders; the keys of {root} are its face_id and view columns.")
        found = FoundFaces(_read_csv(root, listed_only), layout=f"CSV {root.name}")
    else:
        found = _scan(root, pattern)
    return _in_order(found)


def _in_order(found: FoundFaces) -> FoundFaces:
    """Those of which each has a key of its own, in the natural order of keys."""
    _refuse_duplicates(found.table)
    flipped = found.table[found.table["view"].str.endswith(FLIPPED)]
    if len(flipped):
        raise FeatureStoreError(
            f"{flipped['path'].iloc[0]} has the view {flipped['view'].iloc[0]!r}, but names that end in {FLIPPED} are kept for "
            "photographs that are mirrored here: `flip` both. Leave it out, or rename it."
        )
    order = np.lexsort([_places(found.table[name]) for name in reversed(KEY)])
    return FoundFaces(found.table.iloc[order].reset_index(drop=True), found.layout, found.left_out)


def _places(names: pd.Series) -> np.ndarray:
    """(n,) int64: each name's place in their natural order."""
    codes, distinct = pd.factorize(names.to_numpy(object))
    ordered = {name: place for place, name in enumerate(in_natural_order(distinct))}
    places: np.ndarray = np.array([ordered[name] for name in distinct], np.int64)[codes]
    return places


def with_flipped(found: FoundFaces) -> FoundFaces:
    """``found`` and after each photograph the same one mirrored, as a view of its own: ``frontal|flipped`` after ``frontal``.

    Other columns are those of the photograph: boxes are in the picture as the file shows it.
    """
    plain = found.table.reset_index(drop=True)
    flipped = plain.assign(view=plain["view"] + FLIPPED)
    return replace(found, table=pd.concat([plain, flipped]).sort_index(kind="stable").reset_index(drop=True))


def _image_files(root: Path) -> Iterator[str]:
    """Paths below ``root`` (posix, relative), hidden files and folders left out; linked folders are entered once."""
    entered = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in entered:  # a link back to where we are
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                path = Path(folder) / name
                if path.is_file() or path.is_symlink():  # a broken link is named when it is read; a pipe would hang
                    yield _utf8(path.relative_to(root).as_posix())


def _utf8(name: str) -> str:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise FeatureStoreError(f"the file name {name!a} is not UTF-8, so it cannot be a key. Rename it.") from None
    return name


def _scan(root: Path, pattern: str | None) -> FoundFaces:
    files = list(_image_files(root))
    if not files:
        raise FeatureStoreError(
            f"no images in {root}: looked in all its folders for files ending in {', '.join(sorted(IMAGE_SUFFIXES))}."
        )
    return _keyed(files, root, pattern, root)


def _scan_objects(url: str, pattern: str | None) -> FoundFaces:
    """The photographs among the objects below a URL."""
    suffixes = (".csv", ".txt")
    if url.lower().endswith(suffixes):
        raise FeatureStoreError(
            f"{url} is a table or a list, which are read from a disk. Fetch it; the paths in it may be URLs of photographs."
        )
    objects = ObjectStore(url)
    if objects.read_only:
        raise FeatureStoreError(
            f"{url} cannot be listed. Give `images` a CSV or a list with the URLs of the photographs."
        )
    files = [key for key, _ in objects.listed() if key.lower().endswith(tuple(IMAGE_SUFFIXES))]
    if not files:
        raise FeatureStoreError(f"no images below {url}.")
    return _keyed(files, url, pattern, url)


def _read_list(path: Path, root: str | Path, pattern: str | None, listed_only: bool) -> FoundFaces:
    """The photographs whose paths, absolute or below ``root``, are the lines of a text file."""
    if isinstance(root, Path) and not root.is_dir():
        raise FeatureStoreError(f"there is no folder {root}. Check the path given with `images_root`.")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise FeatureStoreError(f"{path} cannot be read as a list of paths: {error}.") from None
    files: list[str] = []
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        if "\0" in line or not line.lower().endswith(tuple(IMAGE_SUFFIXES)):
            raise FeatureStoreError(
                f"{path} line {number} is no path of an image: {line!r:.100}. It needs a path a line, ending in "
                f"{', '.join(sorted(IMAGE_SUFFIXES))}."
            )
        below = line.startswith("/") and Path(line).is_relative_to(root)
        files.append(_tidy(os.path.relpath(line, root) if below else line) if url_of(line) is None else line)
    if not files:
        raise FeatureStoreError(f"no images in {path}: it has no line with a path.")
    paths = [] if listed_only else _resolved(files, root)
    gone = set(_absent(paths))
    absent = [file for file, path in zip(files, paths, strict=False) if path in gone]
    if absent:
        raise FeatureStoreError(
            f"{len(absent)} of {len(files)} images named in {path} do not exist: {listing(absent, 3)}. "
            f"Paths are read relative to {root}; another folder is given with `images_root`."
        )
    found = _keyed(files, root, pattern, path)
    return replace(found, layout=f"{found.layout} in list {path.name}")


def keys_of(names: Iterable[str], pattern: str | None = None) -> pd.DataFrame:
    """Keys (face_id, view) of photographs by their names alone, in their order: the rules of ``find_faces``.

    FeatureStoreError for names without a key.
    """
    found = _keyed([Path(name).as_posix() for name in names], Path(), pattern, Path("the list of names"))
    if found.left_out:
        raise FeatureStoreError(
            f"{len(found.left_out)} names have no key by `pattern`: {listing(found.left_out, 3)}. Every row needs one."
        )
    return found.table[list(KEY)]


def _keyed(files: list[str], root: str | Path, pattern: str | None, where: str | Path) -> FoundFaces:
    """Keys of the files (posix paths, relative to ``root``) that ``where`` holds or names."""
    rows: list[tuple[str, str, str]] = []
    left_out = []
    regexes = _regexes(pattern)
    layouts = set()
    for file in files:
        stem = file.rpartition(".")[0] or file
        for name, regex in regexes.items():
            match = regex.fullmatch(stem) if name in LAYOUTS else regex.search(file)
            if match and match["face"] and match["view"]:
                rows.append((match["face"], match["view"], file))
                layouts.add(name)
                break
        else:
            left_out.append(file)
    if not rows or (left_out and pattern is None):
        tried = pattern or "face/view.ext and head-007_angle-348.75.ext or head-007_frontal.ext"
        raise FeatureStoreError(
            f"{len(left_out)} of {len(files)} images in {where} have no key: {listing(left_out, 3)}. Looked for {tried}. "
            "Give `pattern` a regular expression with the groups face and view, such as "
            r"'(?P<face>\w+)-(?P<view>\w+)\.jpg', or `images` a CSV with face_id, view, path."
        )
    table = pd.DataFrame(rows, columns=[*KEY, "path"])
    table["path"] = _resolved(table["path"], root)
    return FoundFaces(table, " and ".join(sorted(layouts)), tuple(left_out))


def _tidy(path: str) -> str:
    """As ``Path`` writes it, without ``./`` and ``//``; most have neither."""
    return Path(path).as_posix() if re.search(r"//|(^|/)\.(/|$)", path) else path


def _regexes(pattern: str | None) -> dict[str, re.Pattern[str]]:
    if pattern is None:
        return {name: re.compile(regex) for name, regex in LAYOUTS.items()}
    if pattern in LAYOUTS:
        return {pattern: re.compile(LAYOUTS[pattern])}
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise FeatureStoreError(f"`pattern` {pattern!r} is not a regular expression: {error}.") from None
    if not {"face", "view"} <= set(regex.groupindex):
        hint = near_matches(pattern, LAYOUTS) if pattern.isidentifier() else ""
        raise FeatureStoreError(
            f"`pattern` {pattern!r} lacks the groups (?P<face>…) and (?P<view>…) that make a key. {hint}".rstrip()
        )
    return {pattern: regex}


def _read_csv(path: Path, listed_only: bool) -> pd.DataFrame:
    as_text = {
        "dtype": str,
        "keep_default_na": False,
        "na_values": [""],
        "usecols": lambda name: name in (*KEY, "path"),
    }
    table = read_csv(path)
    table = table.assign(**read_csv(path, **as_text))  # a face may be called 007, or NA
    missing = [name for name in [*KEY, "path"] if name not in table.columns]
    if missing:
        raise FeatureStoreError(
            f"{path} has no column {', '.join(missing)}; it has {listing(table.columns, 20)}. "
            "It needs face_id, view and path; further columns are kept as metadata."
        )
    if table.empty:
        raise FeatureStoreError(f"no images in {path}: it has a header and no rows.")
    for name in [*KEY, "path"]:
        empty = table.index[table[name].isna() | (table[name].astype(str).str.strip() == "")]
        if len(empty):
            raise FeatureStoreError(f"{path} line {empty[0] + 2} has no {name}.")
    table.columns = [re.sub(r"\s+", "_", str(name).strip()) for name in table.columns]
    for name in table.columns:
        if RESERVED.fullmatch(name) or not re.fullmatch(r"\w[\w.-]*", name):
            raise FeatureStoreError(
                f"{path} has a column {shortened(name)!r}, which cannot name a coordinate of a store. Rename it."
            )
    if table.columns.has_duplicates:
        twice = table.columns[table.columns.duplicated()][0]
        raise FeatureStoreError(f"{path} has the column {shortened(twice)!r} twice. Rename one.")
    folder = path.resolve().parent
    if table["path"].str.contains("\0", regex=False).any():
        raise FeatureStoreError(f"{path} has a path with a NUL character in it.")
    table["path"] = _resolved(map(os.path.expanduser, table["path"]), folder)
    absent = [] if listed_only else _absent(table["path"])
    if absent:
        raise FeatureStoreError(
            f"{len(absent)} of {len(table)} images named in {path} do not exist: {listing(absent, 3)}. "
            "Paths are read relative to the CSV's own folder."
        )
    return table


def _absent(paths: Iterable[str]) -> list[str]:
    """Those that are no files; objects are not asked for, one by one, before they are read."""
    return [path for path in paths if not os.path.isfile(path) and url_of(path) is None]


def _resolved(paths: Iterable[str], folder: str | Path) -> list[str]:
    """Absolute paths without links; those of one folder are followed to it once. URLs stay, below a URL they are ones."""
    folders: dict[str, str] = {}
    resolved = []
    for path in paths:
        url = url_of(path) if ":/" in path else None
        if url or isinstance(folder, str):
            resolved.append(url or f"{folder}/{path}")
            continue
        whole = os.path.join(folder, path)
        parent, name = os.path.split(whole)
        if name in ("", ".", "..") or os.path.islink(whole):  # noqa: PTH114
            resolved.append(os.path.realpath(whole))
            continue
        if parent not in folders:
            folders[parent] = os.path.realpath(parent)
        resolved.append(os.path.join(folders[parent], name))
    return resolved


def _refuse_duplicates(table: pd.DataFrame) -> None:
    twice = table[table.duplicated(list(KEY), keep=False)]
    if len(twice):
        face, view = twice.iloc[0][list(KEY)]
        same = twice[(twice["face_id"] == face) & (twice["view"] == view)]["path"]
        raise FeatureStoreError(
            f"two files for one key: face {shortened(face)!r}, view {shortened(view)!r} is {listing(same, 3)} "
            f"({len(twice)} files share a key). Rename or remove one, or give them different keys with `pattern`."
        )
