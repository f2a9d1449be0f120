"""Render demo faces with a table of their traits and simulated odd-one-out trials."""

from pathlib import Path

import click

from pipelines._cli import Command, progress_bar

EPILOG = r"""
Examples:

  python pipelines/make_faces.py
  python pipelines/make_faces.py --faces 200 --views 9 --seed 3 --out store/more_faces

  # then
  python pipelines/cache_layers.py --layers maxp_5_3 --images store/more_faces/faces.csv --weights random:0
"""


@click.command(cls=Command, epilog=EPILOG)
@click.option("--faces", "n_faces", type=click.IntRange(1), default=100, show_default=True, help="Identities.")
@click.option(
    "--views",
    "n_views",
    type=click.IntRange(1, 33),
    default=5,
    show_default=True,
    help="Yaw angles of each, from -60° to 60°, the frontal one among them.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="The same seed gives the same files."
)
@click.option(
    "--trials", "n_trials", type=click.IntRange(0), default=5000, show_default=True, help="Odd-one-out choices."
)
@click.option(
    "--error-rate",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="How often a simulated observer picks one of the two other faces.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("store/demo_faces"),
    show_default=True,
    help="Folder to write to.",
)
def main(out: Path, n_faces: int, n_views: int, seed: int, n_trials: int, error_rate: float) -> None:
    """Render heads that are recognisable from several sides, with faces.csv, trials.csv and a contact sheet."""
    from featurestore.demo.dataset import make_faces

    with progress_bar(n_faces * n_views, "rendering") as bar:
        best = make_faces(out, n_faces, n_views, seed, n_trials, error_rate, progress=bar.update)
    click.echo(f"{n_faces} faces × {n_views} views in {out}: faces.csv, trials.csv, contact_sheet.png.")
    click.echo(f"Best reachable accuracy on the trials: {best:.3f} (chance 0.333).")


if __name__ == "__main__":
    main()
