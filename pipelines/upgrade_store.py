"""Bring a store of an earlier format version to the present one, without computing."""

from pathlib import Path

import click

from pipelines._cli import Command, as_typed, progress_bar

EPILOG = r"""
Examples:

  python pipelines/upgrade_store.py store/photos.zarr
  python pipelines/upgrade_store.py store/photos.zarr --dry-run
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("store", type=click.Path(path_type=Path))
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def main(store: Path, dry_run: bool) -> None:
    """Write the shards and documents of STORE as this version has them. Killed, it is run again and goes on."""
    from featurestore.store.lock import store_lock
    from featurestore.store.reader import FeatureStore
    from featurestore.store.upgrading import rows_to_upgrade, upgrade_store
    from featurestore.store.zarr_format import FORMAT_VERSION

    opened = FeatureStore.open(store)
    for source in opened.sources.values():
        done = "nothing to do" if source.version == FORMAT_VERSION else f"to version {FORMAT_VERSION}, in its place"
        click.echo(
            f"{source.name}: format version {source.version}, {source.n_items} items, {len(source.layers)} layers: {done}"
        )
    if dry_run:
        return
    with (
        store_lock(store, "pipelines/upgrade_store.py"),
        progress_bar(rows_to_upgrade(opened), "upgrading", " rows") as bar,
    ):
        lost = upgrade_store(FeatureStore.open(store), bar.update)
    for line in lost:
        click.echo(f"  WRONG  {as_typed(line)}")
    if lost:
        click.echo("  These rows count as not cached now: run pipelines/cache_layers.py again to compute them.")
        click.get_current_context().exit(1)
    click.echo(f"Done. Check it: pipelines/verify_store.py {store}")


if __name__ == "__main__":
    main()
