"""Copy a store between a disk and an object store."""

from pathlib import Path

import click

from pipelines._cli import Command, as_typed, progress_bar

EPILOG = r"""
Examples:

  python pipelines/copy_store.py store/demo.zarr s3://bucket/demo.zarr --dry-run
  python pipelines/copy_store.py store/demo.zarr s3://bucket/demo.zarr
  python pipelines/copy_store.py https://host/demo.zarr store/copied.zarr
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("destination", type=click.Path(path_type=Path))
@click.option(
    "--check/--no-check",
    default=True,
    show_default=True,
    help="Read back what was put on an object store, and compare it; elsewhere it is compared in any case.",
)
@click.option("--dry-run", is_flag=True, help="Say how much is to be copied, and stop.")
def main(source: Path, destination: Path, check: bool, dry_run: bool) -> None:
    """Copy the store SOURCE to DESTINATION, each a folder or a URL. Interrupted, it is run again and goes on.

    Credentials come from the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL).
    """
    from featurestore.store.copying import copy_store, plan_copy
    from featurestore.text import human_bytes

    plan = plan_copy(source, destination)
    click.echo(as_typed(f"Plan{' (nothing is copied)' if dry_run else ''}\n{plan}"))
    if dry_run:
        return
    with progress_bar(plan.nbytes, "copying", " bytes") as bar:
        done = copy_store(plan, check, bar.update)
    there = f"; {done.there:,} were there" if done.there else ""
    click.echo(f"Done: {done.files:,} files copied, {human_bytes(done.nbytes)}{there}.")


if __name__ == "__main__":
    main()
