"""Sources and layers taken out of a store, and the disk they free."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL, folder_bytes
from featurestore.store.reader import FeatureStore
from featurestore.store.writer import SourceWriter, drop_leftovers, publish_root, refuse_old_version
from featurestore.text import near_matches


@dataclass(frozen=True)
class Removal:
    """What is taken out of ``source``, the whole of it or one ``layer``, and how many bytes that frees."""

    source: str
    layer: str | None
    nbytes: int

    def __str__(self) -> str:
        return f"layer {self.layer} of {self.source}" if self.layer else f"source {self.source}"


def removal_of(store: FeatureStore, source: str | None, layer: str | None) -> Removal:
    """What removing a source, or a layer of one, would take out; nothing is touched.

    ``source`` may be left out where one source holds the layer. FeatureStoreError for names that are not there.
    """
    found = store.source(source, [layer] if layer else ())
    if layer and layer not in found.layers:
        raise FeatureStoreError(f"layer {layer!r} is not in {found.folder}. {near_matches(layer, found.layers)}")
    return Removal(found.name, layer, folder_bytes(found.layers[layer].folder if layer else found.folder))


def remove(store: Path, removal: Removal) -> None:
    """Carry it out, under ``store_lock``, in one step for readers; ``finish_removals`` ends what was killed after that."""
    refuse_old_version(store)
    if removal.layer is None:
        going = store / (removal.source + PARTIAL)
        (store / removal.source).rename(going)
        publish_root(store)
        shutil.rmtree(going)
    else:
        SourceWriter(store, removal.source, {}).remove_layer(removal.layer)


def finish_removals(store: Path) -> list[str]:
    """Delete what killed writers left, under ``store_lock``; what was being removed: ``source`` or ``source/layer``."""
    refuse_old_version(store)
    removed = [name for name in drop_leftovers(store) if not (store / name).exists()]
    publish_root(store)
    return removed
