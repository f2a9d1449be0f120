"""Fetch 400 real photographs of 40 people, the Olivetti faces, by scikit-learn."""

from pathlib import Path

import click

from pipelines._cli import Command, progress_bar

EPILOG = r"""
Examples:

  python pipelines/fetch_olivetti.py

  # then
  python pipelines/cache_layers.py --layers descriptor --images store/olivetti --weights random:0
"""


@click.command(cls=Command, epilog=EPILOG)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("store/olivetti"),
    show_default=True,
    help="Folder to write to.",
)
def main(out: Path) -> None:
    """Write the Olivetti faces as s1/1.png … s40/10.png: for trying the software on real photographs."""
    from featurestore.demo.olivetti import N_IMAGES, fetch_olivetti

    with progress_bar(N_IMAGES, "writing") as bar:
        fetch_olivetti(out, bar.update)
    click.echo(
        f"{N_IMAGES} photographs of 40 people in {out}. They are AT&T Laboratories Cambridge's: do not pass them on."
    )


if __name__ == "__main__":
    main()
