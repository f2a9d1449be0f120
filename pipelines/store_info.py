"""What a store holds; remove a source or a layer of it."""

from pathlib import Path

import click
from click.shell_completion import CompletionItem

from pipelines._cli import Command, as_typed

EPILOG = r"""
Examples:

  python pipelines/store_info.py store/demo.zarr

  # a layer or a whole source that is not needed any more; the beginning of a source's name is enough
  python pipelines/store_info.py store/demo.zarr --remove-layer maxp_5_3 --dry-run
  python pipelines/store_info.py store/demo.zarr --remove-layer maxp_5_3 --source vggface
  python pipelines/store_info.py store/demo.zarr --remove vggface-7f41
"""


def _complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from featurestore.errors import FeatureStoreError
    from featurestore.store.reader import FeatureStore

    typed = [ctx.params.get("store"), *ctx.args]  # where click stops at an option without a value, the rest is in args
    try:
        sources = FeatureStore.open(next(path for path in typed if path and Path(path).is_dir())).sources
    except (FeatureStoreError, StopIteration, OSError):
        return []
    layers = {name: None for source in sources.values() for name in source.layers}
    names = layers if param.name == "remove_layer" else sources
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


@click.command(cls=Command, epilog=EPILOG)
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--remove", metavar="SOURCE", shell_complete=_complete, help="Remove a source: its items and all its layers."
)
@click.option("--remove-layer", metavar="LAYER", shell_complete=_complete, help="Remove a layer; the items stay.")
@click.option(
    "--source",
    metavar="NAME",
    shell_complete=_complete,
    help="The source of --remove-layer, where several hold the layer.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be removed, and stop.")
def main(store: Path, remove: str | None, remove_layer: str | None, source: str | None, dry_run: bool) -> None:
    """Print what STORE holds: sources, items, layers, rows cached, bytes on disk."""
    from featurestore.store.reader import FeatureStore
    from featurestore.store.summary import describe_store

    if (remove is not None and remove_layer is not None) or (source is not None and remove_layer is None):
        raise click.UsageError("give --remove SOURCE, or --remove-layer LAYER with or without --source NAME.")
    opened = FeatureStore.open(store)
    if remove is None and remove_layer is None:
        click.echo(as_typed(describe_store(opened)))
        return
    _remove(store, remove or source, remove_layer, dry_run)


def _remove(store: Path, source: str | None, layer: str | None, dry_run: bool) -> None:
    from featurestore.store.lock import store_lock
    from featurestore.store.reader import FeatureStore
    from featurestore.store.removal import finish_removals, removal_of, remove
    from featurestore.text import human_bytes

    if dry_run:
        removal = removal_of(FeatureStore.open(store), source, layer)
        click.echo(as_typed(f"Would remove {removal} from {store} and free {human_bytes(removal.nbytes)}."))
        return
    with store_lock(store, "pipelines/store_info.py"):
        finished = finish_removals(store)
        for name in finished:
            click.echo(as_typed(f"Finished removing {name} from {store}, which had been interrupted."))
        if not any(_is_meant(name, source, layer) for name in finished):
            removal = removal_of(FeatureStore.open(store), source, layer)
            remove(store, removal)
            click.echo(as_typed(f"Removed {removal} from {store}: {human_bytes(removal.nbytes)} freed."))


def _is_meant(name: str, source: str | None, layer: str | None) -> bool:
    """Whether ``source`` or ``source/layer`` is what was asked for."""
    of, _, found = name.partition("/")
    return of.startswith(source or "") and found == (layer or "")


if __name__ == "__main__":
    main()
