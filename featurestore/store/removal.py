"""Sources and layers taken out of a store, and the disk they free."""

from dataclasses import dataclass
from pathlib import Path

from featurestore.errors import FeatureStoreError
from featurestore.files import PARTIAL, folder_bytes, remove_file, remove_folder
from featurestore.remote.mirror import local_store, mirror_of
from featurestore.store.reader import FeatureStore
from featurestore.store.writer import SourceWriter, drop_leftovers, publish_root, refuse_old_version
from featurestore.store.zarr_format import METADATA
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
    store = local_store(store, writing=True)
    refuse_old_version(store)
    if removal.layer is None:
        going = store / removal.source
        if mirror_of(store) is None:
            going = going.rename(store / (removal.source + PARTIAL))
        else:  # objects have no folder that could be renamed; without its document it is no source
            remove_file(going / METADATA)
        publish_root(store)
        remove_folder(going)
    else:
        SourceWriter(store, removal.source, {}).remove_layer(removal.layer)


def finish_removals(store: Path) -> list[str]:
    """Delete what killed writers left, under ``store_lock``; what was being removed: ``source`` or ``source/layer``."""
    store = local_store(store, writing=True)
    refuse_old_version(store)
    removed = [name for name in drop_leftovers(store) if not (store / name).exists()]
    publish_root(store)
    return removed
