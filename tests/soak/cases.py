"""Cases: what is damaged in which seed, from the case's number alone, and its files on disk."""

import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.soak.mutators import damage

Files = Mapping[str, bytes]  # by their paths below a folder

KINDS = ("images", "checkpoints", "csvs", "heads", "stores", "activations")
_TREES = ("heads", "stores")  # folders that were sent whole: what is in them may be links and devices too
_SPARED = ".png"  # photographs that tables name
ODD = (
    "folder",
    "absent",
    "empty",
    "loop",
    "broken link",
    "/dev/zero",
    "/dev/null",
    "/proc/self/mem",
    "pipe",
    "outside",
)
_MOST_FILES = (1, 1, 1, 2, 3)  # damaged at once


@dataclass(frozen=True)
class Case:
    """``odd`` files are replaced by what it says."""

    seed_file: str
    files: Files
    odd: Mapping[str, str]

    def write(self, folder: Path) -> None:
        """Into a new folder."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        for name, what in self.odd.items():
            _replace(folder / name, what)


def read_seeds(folder: Path) -> dict[str, Files]:
    """The files of each seed of one kind."""
    return {
        seed.name: {
            path.relative_to(seed).as_posix(): path.read_bytes() for path in sorted(seed.rglob("*")) if path.is_file()
        }
        for seed in sorted(folder.iterdir())
    }


def make_case(kind: str, number: int, seed: int, seeds: Mapping[str, Files]) -> Case:
    """Case ``number`` of a soak with ``seed``."""
    rng = random.Random(f"{seed}-{kind}-{number}")
    chosen = rng.choice(list(seeds))
    files, odd = dict(seeds[chosen]), {}
    names = [name for name in files if not name.endswith(_SPARED)]
    others = [content for each in seeds.values() for content in each.values() if content]
    for name in rng.sample(names, min(len(names), rng.choice(_MOST_FILES))):
        if kind in _TREES and rng.random() < 0.15:
            place = name if rng.random() < 0.7 else str(Path(name).parent)
            odd[name if place == "." else place] = rng.choice(ODD)
        else:
            files[name] = damage(name, files[name], rng, others)
    return Case(chosen, files, odd)


def _replace(path: Path, what: str) -> None:
    if not os.path.lexists(path):  # within a folder that has been replaced
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    if what == "folder":
        path.mkdir()
    elif what == "empty":
        path.touch()
    elif what == "pipe":
        os.mkfifo(path)
    elif what != "absent":
        targets = {"loop": path.name, "broken link": "nowhere", "outside": "/etc/hostname"}
        path.symlink_to(targets.get(what, what))
