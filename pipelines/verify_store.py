"""Check a store: every byte of it, a few rows recomputed; repair what is damaged."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines._cli import (
    Command,
    as_typed,
    asked_cluster,
    kept_memory,
    note_left_out,
    progress_bar,
    scheduler_option,
    tasks_of,
)
from pipelines._params import Device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distributed import Client

    from featurestore.caching.verify import Damage, Recomputation, StoreReport
    from featurestore.store.reader import FeatureStore, Source

EPILOG = r"""
Examples:

  python pipelines/verify_store.py store/demo.zarr
  python pipelines/verify_store.py store/photos.zarr --weights vgg_face.pth --repair

  # a large store, read by the workers of a Dask cluster
  python pipelines/verify_store.py store/photos.zarr --scheduler tcp://127.0.0.1:8786
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--backbone",
    metavar="NAME",
    help="Run this network of your own (my_module:build_model) to recompute: code is never imported because a store names it.",
)
@click.option("--source", metavar="NAME", help="Only this source. [default: all]")
@click.option(
    "--weights",
    metavar="FILE",
    help="The weights file a source was made with, to recompute (seeded and built ones need none).",
)
@click.option(
    "--recompute",
    "n_recompute",
    type=click.IntRange(0),
    default=4,
    show_default=True,
    metavar="N",
    help="Items to recompute and compare; 0 for none.",
)
@click.option("--repair", is_flag=True, help="Recompute damaged records, and only those.")
@click.option("--device", type=Device(), default="auto", show_default=True)
@scheduler_option
def main(
    store: Path,
    source: str | None,
    weights: str | None,
    backbone: str | None,
    n_recompute: int,
    repair: bool,
    device: str,
    scheduler: str | None,
) -> None:
    """Check every document, record and checksum of STORE, keys, NaN and infinity; exit status 1 if anything is wrong."""
    from featurestore.errors import FeatureStoreError
    from featurestore.store.reader import FeatureStore

    sound = _check_files(store, repair)
    opened = FeatureStore.open(store.resolve() if scheduler else store)
    if backbone and all(found.attributes["backbone"] != backbone for found in opened.sources.values()):
        names = sorted({found.attributes["backbone"] for found in opened.sources.values()})
        raise FeatureStoreError(f"no source of {store} was computed by {backbone!r}, but by {', '.join(names)}.")
    with asked_cluster(scheduler) as client:
        for found in [opened.source(source)] if source else opened.sources.values():
            sound &= _verify(opened, found, weights, backbone, n_recompute, repair, device, client)
    if not opened.sources:
        click.echo(as_typed(f"{store} holds no source."))
    if not sound:
        click.get_current_context().exit(1)


def _check_files(store: Path, repair: bool) -> bool:
    """Documents, coordinates and checksums; whether they are right by now."""
    from featurestore.remote.mirror import local_store
    from featurestore.store.integrity import check_files, restore
    from featurestore.store.lock import is_being_written, store_lock
    from featurestore.store.mirrored import fetched

    damage = check_files(fetched(store, copies=True))
    if damage and is_being_written(store):
        click.echo("  note   documents and coordinates not checked: the store is being written")
        return True
    for found in damage:
        click.echo(as_typed(f"  WRONG  {found}"))
    if damage and repair:
        with store_lock(store, "pipelines/verify_store.py --repair"):
            lost = restore(check_files(local_store(store, writing=True)))
        click.echo(f"  {len(damage) - len(lost)} of {len(damage)} files repaired")
        return not lost
    return not damage


def _verify(
    store: "FeatureStore",
    source: "Source",
    weights: str | None,
    backbone: str | None,
    n: int,
    repair: bool,
    device: str,
    client: "Client | None",
) -> bool:
    from featurestore.caching.provenance import weights_of
    from featurestore.caching.verify import Recomputation, check_source, recompute_some
    from featurestore.devices import choose_device
    from featurestore.errors import FeatureStoreError

    click.echo(f"{source.name}: {source.n_items} items, layers {', '.join(source.layers) or 'none'}")
    with progress_bar(source.n_items * len(source.layers), "checking", " rows") as bar:
        report = check_source(source, bar.update, **tasks_of(client))
    recomputed = Recomputation()
    not_recomputed = []
    if n and source.layers:
        try:
            recomputed = recompute_some(source, weights_of(source, weights, backbone), choose_device(device), report, n)
        except FeatureStoreError as error:
            if weights or backbone == source.attributes["backbone"]:
                raise
            not_recomputed = [f"nothing recomputed: {error}"]
    not_recomputed += [f"not recomputed: {failure}" for failure in recomputed.failures]
    _print(report, recomputed, not_recomputed)
    damage = (*report.damage, *recomputed.damage)
    if repair and damage:
        return _repair(store, source, damage, weights, backbone, device)
    return report.sound and not recomputed.damage


def _repair(
    store: "FeatureStore",
    source: "Source",
    damage: "Sequence[Damage]",
    weights: str | None,
    backbone: str | None,
    device: str,
) -> bool:
    from featurestore.caching.provenance import weights_of
    from featurestore.caching.repair import keep_intact, repair_job, repair_plan
    from featurestore.caching.run import cache_layers
    from featurestore.caching.verify import Recomputation, check_source
    from featurestore.store.lock import store_lock
    from featurestore.store.reader import FeatureStore

    with store_lock(store.path, "pipelines/verify_store.py --repair"):
        plan = repair_plan(store, source, keep_intact(store, source, damage))
        click.echo(f"\nRepair\n{plan}\n")
        if plan.images:
            plan.refuse_if_full()
            kept_memory(device)
            job = repair_job(store, source, weights_of(source, weights, backbone), device)
            with progress_bar(plan.images, "recomputing") as bar:
                summary = cache_layers(job, plan, bar.update)
            note_left_out(summary.failures, "not repaired")
    after = check_source(FeatureStore.open(store.path).source(source.name))
    _print(after, Recomputation(), [])
    return after.sound


def _print(report: "StoreReport", recomputed: "Recomputation", not_recomputed: list[str]) -> None:
    from featurestore.caching.verify import described

    click.echo(f"  {report.records} records read, {len(report.damage)} damaged")
    if recomputed.damage:
        click.echo(f"  {len(recomputed.damage)} rows do not match a new computation")
    for name, count in report.absent.items():
        click.echo(f"  layer {name}: {count} rows not cached yet")
    if recomputed.difference:
        worst = max(recomputed.difference, key=lambda name: recomputed.difference[name])
        click.echo(
            f"  recomputed rows agree within {recomputed.difference[worst]:.1e} of the largest value (worst: {worst})"
        )
    for line in [*described((*report.damage, *recomputed.damage)), *report.suspicious]:
        click.echo(f"  WRONG  {as_typed(line)}")
    for line in [*report.notes, *not_recomputed]:
        click.echo(f"  note   {as_typed(line)}")
    click.echo("  sound" if report.sound and not recomputed.damage else "  NOT SOUND")


if __name__ == "__main__":
    main()
