"""Who a network itself takes each photograph for: its most probable classes, by name."""

from pathlib import Path

import click

from pipelines._cli import Command

EPILOG = r"""
Examples:

  python pipelines/cache_layers.py --backbone resnet50_ft --layers fc --images photos --weights resnet50_ft_weight.pkl
  python pipelines/name_faces.py store/photos.zarr --labels identity_meta.csv
  python pipelines/name_faces.py store/photos.zarr --labels identity_meta.csv --top 1 --out answers.csv

  # other networks: a text file with the name of a class on each line
  python pipelines/name_faces.py store/photos.zarr --source vggface --labels names.txt
"""

_SHOWN = 10  # items


@click.command(cls=Command, epilog=EPILOG)
@click.argument("store", type=click.Path(path_type=Path))
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Names of the classes: VGGFace2's identity_meta.csv, or a .txt with a name a line. [default: their numbers]",
)
@click.option(
    "--layer", metavar="NAME", help="The layer that holds a number for each class. [default: fc8, fc or logits]"
)
@click.option("--source", metavar="NAME", help="The source, where several hold such a layer.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Answers for each item.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write all answers as a CSV.")
def main(store: Path, labels: Path | None, layer: str | None, source: str | None, top: int, out: Path | None) -> None:
    """Print the most probable classes of the items of STORE, and how often the first one, or one of the first five, is right."""
    from featurestore import FeatureStore
    from featurestore.files import write_atomically
    from featurestore.intervals import accuracy_over
    from featurestore.queries.answers import answers_table, right_within, source_with_classes

    opened = FeatureStore.open(store)
    found = source_with_classes(opened, layer, source)
    table = answers_table(opened, labels, layer, found.name, max(top, 5))
    click.echo(f"{found.attributes['backbone']}, weights {found.weights}")
    shown = table[table["rank"] <= top]
    for (face, view), answers in list(shown.groupby(["face_id", "view"], sort=False))[:_SHOWN]:
        named = ", ".join(f"{each.label} {each.probability:.1%}" for each in answers.itertuples())
        click.echo(f"{face}/{view}: {named}")
    items = table["rank"].eq(1).sum()
    if items > _SHOWN:
        click.echo(f"and {items - _SHOWN} more" + ("" if out else "; --out FILE writes all"))
    if out:
        write_atomically(out, shown.to_csv(index=False))
        click.echo(f"{len(shown)} answers to {items} items: {out}")
    for rank in (1, 5):
        right = right_within(table, rank)
        if len(right):
            faces = right.index.get_level_values("face_id").to_numpy()
            score = accuracy_over(right.to_numpy(bool), [faces])
            click.echo(
                f"top-{rank} right: {score} (95 % over faces) of {score.n} items whose face is one of the classes"
            )


if __name__ == "__main__":
    main()
