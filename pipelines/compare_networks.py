"""What the layers of several networks in one store know of faces, untrained, in one table."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipelines._cli import Command

if TYPE_CHECKING:
    import pandas as pd

EPILOG = r"""
Examples:

  python pipelines/compare_networks.py store/demo.zarr
  python pipelines/compare_networks.py store/photos.zarr --held-out 8 9 10 --layers maxp_5_3 descriptor --out layers.csv
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--held-out",
    multiple=True,
    metavar="VIEW …",
    help="Views to identify by the others. [default: the last three tenths, in natural order]",
)
@click.option("--layers", multiple=True, metavar="NAME …", help="Only these layers. [default: all]")
@click.option("--n-trials", type=click.IntRange(1), default=3000, show_default=True, help="Same-person trials to draw.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of these trials.")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Write the whole table as CSV."
)
def main(
    store: Path, held_out: tuple[str, ...], layers: tuple[str, ...], n_trials: int, seed: int, out: Path | None
) -> None:
    """Identification and same-person accuracy of every layer in STORE, with intervals and chance."""
    from featurestore import FeatureStore
    from featurestore.files import write_atomically
    from heads.network_table import default_held_out, network_table

    opened = FeatureStore.open(store)
    held = list(held_out) or default_held_out(opened)
    table = network_table(opened, held, layers or None, n_trials, seed)
    click.echo(_text(table, held))
    if out:
        write_atomically(out, table.to_csv(index=False))
        click.echo(f"Kept: {out}")


def _text(table: "pd.DataFrame", held: list[str]) -> str:
    import pandas as pd

    from featurestore.text import listing

    parts = []
    for _, part in table.groupby("source", sort=False):
        first = part.iloc[0]
        shown = pd.DataFrame({
            "layer": part["layer"],
            "identification": [_score(row, "identification") for row in part.to_dict("records")],
            "same person": [_score(row, "same_person") for row in part.to_dict("records")],
        })  # fmt: skip
        parts.append(f"{first['backbone']}, weights {first['weights']}\n{shown.to_string(index=False)}\n")
    first = table.iloc[0]
    parts.append(
        f"identification: the nearest neighbour, by cosine, of {first['probes']} photographs of the views {listing(held, 10)} "
        f"among {first['gallery']} of the others; chance {first['identification_chance']:.3f}.\n"
        f"same person: which of three photographs shows another person, {first['trials']} trials; "
        f"chance {first['same_person_chance']:.3f}.\nNothing is trained here. Intervals (95 %) are over faces."
    )
    left_out = {
        f"{count} photographs of {source} are not in all sources": count
        for source, count in table.groupby("source", sort=False)["not_shared"].first().items()
    }
    notes = [note for note, count in left_out.items() if count]
    if first["set_aside"]:
        notes.append(f"{first['set_aside']} photographs are set aside: the others hold the same")
    return "\n".join([*parts, *(f"Left out: {note}." for note in notes)])


def _score(row: dict[str, float], name: str) -> str:
    return f"{row[name]:.3f} [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]"


if __name__ == "__main__":
    main()
