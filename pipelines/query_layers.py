"""Ask a store: RDMs, neighbours, verification, statistics, invariance, comparison of layers, export and import."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines._cli import Command, as_typed, progress_bar
from pipelines._query import SHOWN, Asked, asking, check, name_networks, query, show, sources_asked, wrote

if TYPE_CHECKING:
    from featurestore import FeatureStore

EPILOG = r"""
Examples:

  python pipelines/query_layers.py rdm --layers fc7-relu --by face --out rdm.csv --figure rdm.png
  python pipelines/query_layers.py neighbours --layers fc7-relu --of face-007 -k 3 --figure neighbours.png
  python pipelines/query_layers.py rsa --pairs similarity.csv --figure rsa.svg

Each command has --help with examples of its own.
"""


@click.group(epilog=EPILOG)
def main() -> None:
    """Ask the layers of a store, without the network: block by block, within a memory cap."""


# click's own formatting of an epilog wraps examples.
main.format_epilog = Command.format_epilog.__get__(main)  # type: ignore[method-assign]


@query(
    main,
    "rdm",
    r"""  python pipelines/query_layers.py rdm --layers fc7-relu --metric cosine --out rdm.csv
  python pipelines/query_layers.py rdm --layers fc7-relu --where "view == 'frontal'" --figure rdm.svg
  python pipelines/query_layers.py rdm --layers maxp_5_3 fc7-relu --by face --pca 0.95 --out rdm.zarr
  python pipelines/query_layers.py rdm --layers maxp_5_3 fc7-relu --by face --out rdms.h5   # for rsatoolbox
""",
)
@click.option("--by", metavar="face|COLUMN", help="Average the items of each face, view or value of a column first.")
@click.option(
    "--pca", type=float, metavar="SHARE", help="Keep the principal components that explain this much variance."
)
def rdm(asked: Asked, by: str | None, pca: float | None) -> None:
    """How different each pair of items is: a representational dissimilarity matrix."""
    from featurestore.queries import dissimilarity

    check(asked, also=(".h5",))
    with asking(asked, "RDM") as opened:
        given = asked.options()
        matrix = dissimilarity.rdm(opened, metric=asked.metric, by=by, pca=pca, **given)
        check(asked, several="layer" in matrix.dims, also=(".h5",))
        if matrix.nbytes <= given["memory"] // 8:
            matrix = matrix.compute()
        elif not asked.out:
            raise click.UsageError(f"the matrix has {matrix.nbytes:,} bytes: write it, --out rdm.zarr.")
        if asked.out:
            from featurestore.queries.exporting import export_rdm
            from featurestore.queries.output import write_result

            h5 = asked.out.suffix == ".h5"
            wrote([export_rdm(matrix, asked.out)] if h5 else write_result(matrix, asked.out))
        if matrix.chunks is None:
            show(dissimilarity.summary(matrix), None, matrix.attrs["left_out"])
        if asked.figure:
            from featurestore.figures import draw_rdm

            wrote([draw_rdm(matrix, asked.figure, _photographs(opened, asked) if by is None else None)])


def _photographs(store: "FeatureStore", asked: Asked) -> dict[str, Path] | None:
    """Where each item's photograph lies, by ``face|view``; None for activations that were imported without them."""
    found = next((source for source in sources_asked(store, asked) if source.items["path"].astype(bool).all()), None)
    if found is None:
        return None
    return {"|".join(key): Path(path) for key, path in zip(found.keys, found.coordinate("path"), strict=True)}


@query(
    main,
    "rsa",
    r"""  # pairs with a column of similarity: "(0, 1)" by place, or columns face_1, face_2
  python pipelines/query_layers.py rsa --pairs similarity.csv --where "view == 'frontal'" --figure rsa.svg
  python pipelines/query_layers.py rsa --pairs age   # differences of a metadata column
  python pipelines/query_layers.py rsa --pairs judgments.csv --value rating --layers fc6-relu fc7-relu --out rsa.csv
""",
)
@click.option(
    "--pairs", required=True, metavar="FILE|COLUMN", help="CSV of pairs of faces, or a metadata column of numbers."
)
@click.option("--value", metavar="COLUMN", help="The column of numbers. [default: the first]")
@click.option(
    "--similarity/--dissimilarity", default=None, help="What the numbers are. [default: by the column's name]"
)
@click.option(
    "--by", default="face", show_default=True, metavar="face|none", help="Average a face's views, or take items."
)
@click.option("--permutations", type=click.IntRange(0), default=10_000, show_default=True, help="For the p values.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of permutations and resamples.")
def rsa(
    asked: Asked, pairs: str, value: str | None, similarity: bool | None, by: str, permutations: int, seed: int
) -> None:
    """How well each layer's dissimilarities agree with those that people, or instruments, gave."""
    from featurestore.queries.similarity_analysis import rsa as agreement
    from featurestore.text import listing

    check(asked)
    with asking(asked, "RDM") as opened:
        table = agreement(
            opened,
            pairs,
            value=value,
            similarity=similarity,
            metric=asked.metric,
            by=None if by == "none" else by,
            permutations=permutations,
            seed=seed,
            **asked.options(),
        )
    notes = list(table.attrs["left_out"])
    if table.attrs["unknown"]:
        notes.append(f"faces of {pairs} that the store does not hold: {listing(table.attrs['unknown'])}")
    if table.attrs["missing"]:
        notes.append(f"pairs that {pairs} does not hold: {listing(table.attrs['missing'], 3)}")
    show(table, asked.out, notes)
    if asked.figure:
        from featurestore.figures import draw_rsa

        wrote([draw_rsa(table, asked.figure, f"Spearman's correlation with {table.attrs['value']}")])


@query(
    main,
    "neighbours",
    r"""  python pipelines/query_layers.py neighbours --layers fc7-relu --of face-007 -k 3 --figure neighbours.png
  python pipelines/query_layers.py neighbours --layers fc7-relu --of "face-007|yaw+30" --other-faces
  python pipelines/query_layers.py neighbours --layers fc7-relu -k 10 --out neighbours.parquet
""",
)
@click.option("--of", multiple=True, metavar="FACE[|VIEW] …", help="Of these faces or items. [default: of all]")
@click.option("-k", type=click.IntRange(1), default=5, show_default=True, help="How many.")
@click.option("--other-faces", is_flag=True, help="Leave out items of the same face.")
def neighbours(asked: Asked, of: tuple[str, ...], k: int, other_faces: bool) -> None:
    """The most similar items of each item."""
    from featurestore.queries.nearest import neighbours as nearest

    check(asked)
    given = asked.options()
    with asking(asked, "neighbours") as opened:
        table = nearest(
            opened,
            given.pop("layers"),
            list(of) or None,
            k=k,
            metric=asked.metric,
            other_faces=other_faces,
            **given,
        )
        show(table, asked.out)
        if asked.figure:
            from featurestore.errors import FeatureStoreError
            from featurestore.figures import draw_neighbours

            photographs = _photographs(opened, asked)
            if photographs is None:
                raise FeatureStoreError(
                    "these activations were imported without their photographs, so there is no sheet to draw. Leave `figure` out."
                )
            wrote([draw_neighbours(table, photographs, asked.figure)])


@query(
    main,
    "identify",
    r"""  python pipelines/query_layers.py identify --held-out yaw+30 yaw-30
""",
    "where",
    "metric",
    "memory",
    "scheduler",
    "figure",
)
@click.option("--held-out", multiple=True, required=True, metavar="VIEW …", help="Views to identify by the others.")
def identify(asked: Asked, held_out: tuple[str, ...]) -> None:
    """Who is it? The nearest neighbour, by cosine, of views that were held out."""
    from featurestore import FeatureStore, identification_table

    check(asked)
    opened = FeatureStore.open(asked.store)
    name_networks(opened, asked)
    table = identification_table(opened, held_out, asked.layers or None, asked.sources or None)
    known = ["backbone", "weights", *(["source"] if table["layer"].is_unique else [])]
    show(table, asked.out, seen=table.drop(columns=known))


@query(
    main,
    "verify-faces",
    r"""  python pipelines/query_layers.py verify-faces --layers fc7-relu --figure roc.svg
  python pipelines/query_layers.py verify-faces --store store/lfw.zarr --pairs pairs.txt --metric euclidean
""",
)
@click.option(
    "--pairs", type=click.Path(path_type=Path), metavar="FILE", help="CSV, or LFW's pairs.txt. [default: drawn]"
)
@click.option("--n-pairs", type=click.IntRange(10), default=3000, show_default=True, help="Pairs of each kind to draw.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of drawn pairs and resamples.")
def verify_faces(asked: Asked, pairs: Path | None, n_pairs: int, seed: int) -> None:
    """The same person or not? ROC, equal error rate and accuracy of pairs."""
    from featurestore.queries.verification import verify_faces as verify

    check(asked)
    with asking(asked, "pairs") as opened:
        given = asked.options()
        found = verify(opened, pairs=pairs, metric=asked.metric, n_pairs=n_pairs, seed=seed, **given)
    upright = found.table.set_index("layer").astype(object).T.rename_axis(index="score", columns=None)
    show(found.table, asked.out, seen=upright)
    if asked.figure:
        from featurestore.figures import draw_roc

        areas = {
            row.layer: f"area {row.area:.3f} [{row.area_low:.3f}, {row.area_high:.3f}]"
            for row in found.table.itertuples()
        }
        wrote([draw_roc(found.roc, asked.figure, areas)])


@query(
    main,
    "statistics",
    r"""  python pipelines/query_layers.py statistics
  python pipelines/query_layers.py statistics --by view --out statistics.csv
  python pipelines/query_layers.py statistics --layers fc7-relu --trait age   # units that go with a trait
""",
    "metric",
    "figure",
)
@click.option("--by", metavar="face|COLUMN", help="Of the items of each face, view or value of a column apart.")
@click.option("--trait", metavar="COLUMN", help="Instead: the units of one layer that go with this column of numbers.")
def statistics(asked: Asked, by: str | None, trait: str | None) -> None:
    """Mean, spread, sparsity, dead units and effective dimension of each layer."""
    from featurestore.queries import layer_statistics, units

    check(asked)
    with asking(asked, "statistics") as opened:
        given = asked.options()
        if trait:
            table = units.units_with_trait(opened, given.pop("layers"), trait, **given)
        else:
            table = layer_statistics.statistics(opened, by=by, **given)
    show(table, asked.out)


@query(
    main,
    "mean",
    r"""  python pipelines/query_layers.py mean --layers maxp_5_3 --by view --out mean.zarr
""",
    "metric",
    "figure",
)
@click.option(
    "--by", metavar="face|COLUMN", help="A mean of each face, view or value of a column. [default: one of all]"
)
def mean(asked: Asked, by: str | None) -> None:
    """The mean activation of one layer."""
    from featurestore.queries import layer_statistics as statistical
    from featurestore.queries.output import write_result

    check(asked)
    with asking(asked, "mean") as opened:
        given = asked.options()
        array = statistical.mean(opened, given.pop("layers"), by=by, **given)
    click.echo(f"{array.name or 'mean'}: {' × '.join(f'{size:,} {name}' for name, size in array.sizes.items())}")
    if asked.out:
        wrote(write_result(array, asked.out))


@query(
    main,
    "invariance",
    r"""  python pipelines/query_layers.py invariance --figure invariance.svg
  python pipelines/query_layers.py invariance --layers maxp_5_3 fc7-relu --reference frontal --out invariance.csv
""",
)
@click.option("--reference", metavar="VIEW", help="View differences from this view only.")
def invariance(asked: Asked, reference: str | None) -> None:
    """How alike a face stays across views, and how alike others are: the view-generalisation profile of each layer."""
    from featurestore.queries.view_invariance import invariance as profile

    check(asked)
    with asking(asked, "pairs of views") as opened:
        table = profile(opened, metric=asked.metric, reference=reference, **asked.options())
    show(table, asked.out)
    if asked.figure:
        from featurestore.figures import draw_invariance

        wrote([draw_invariance(table, asked.figure, f"mean {asked.metric} distance")])


@query(
    main,
    "compare-layers",
    r"""  python pipelines/query_layers.py compare-layers --figure layers.svg
  python pipelines/query_layers.py compare-layers --sources vggface dlib --measure rdm --out layers.csv
""",
)
@click.option(
    "--measure",
    type=click.Choice(["cka", "cka-biased", "rbf-cka", "rdm"]),
    default="cka",
    show_default=True,
    help="Centred kernel alignment, or the correlation of RDMs.",
)
@click.option("--by", metavar="face|COLUMN", help="Average the items of each face, view or value of a column first.")
def compare_layers(asked: Asked, measure: str, by: str | None) -> None:
    """How alike layers are, of one network or of several."""
    from featurestore.queries.layer_comparison import compare_layers as compare

    check(asked)
    with asking(asked, "pairs of items") as opened:
        given = asked.options()
        table = compare(opened, measure=measure, metric=asked.metric, by=by, **given)
    show(table, asked.out, table.attrs["left_out"])
    if asked.figure:
        from featurestore.figures import draw_layer_matrix

        label = {"rdm": "correlation of RDMs", "rbf-cka": "CKA (Gaussian)"}.get(measure, "CKA (linear)")
        wrote([draw_layer_matrix(table, asked.figure, label)])


@query(
    main,
    "export",
    r"""  python pipelines/query_layers.py export --layers fc7-relu --format numpy --to exported
  python pipelines/query_layers.py export --layers fc7-relu --format rsatoolbox --to exported --by face
  python pipelines/query_layers.py export --format hdf5 --to demo.h5
""",
    "metric",
    "scheduler",
    "out",
    "figure",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["numpy", "files", "hdf5", "rsatoolbox"]),
    required=True,
    help="An array and a table of names; an .npy for each photograph; one HDF5 file; datasets for rsatoolbox.",
)
@click.option("--to", required=True, type=click.Path(path_type=Path), metavar="PATH", help="Folder, or file for hdf5.")
@click.option("--by", metavar="face|COLUMN", help="Average the items of each face, view or value of a column first.")
def export(asked: Asked, form: str, to: Path, by: str | None) -> None:
    """Write layers for other programs."""
    from featurestore import FeatureStore
    from featurestore.queries.exporting import export as write
    from featurestore.queries.selection import select

    opened, given = FeatureStore.open(asked.store), asked.options()
    name_networks(opened, asked)
    chosen = select(opened, given["layers"], sources=given["sources"], where=given["where"], by=by)
    with progress_bar(len(chosen) * len(chosen.layers), "exporting", " rows") as bar:
        written = write(opened, to, format=form, by=by, progress=bar.update, **given)
    wrote(written if len(written) <= SHOWN else [*written[:3], Path(f"and {len(written) - 3:,} more")])


@main.command(
    "import",
    cls=Command,
    epilog=r"""
Examples:

  # what thingsvision wrote: keys from the names of the photographs
  python pipelines/query_layers.py import features.npy --kind numpy --layer fc7 --store store/old.zarr --names file_names.txt

  # a pickled pandas table of an earlier extractor: read without running anything in it
  python pipelines/query_layers.py import features.pkl --kind pickle --layer maxp_5_3 --store store/old.zarr
""",
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--store", type=click.Path(path_type=Path), required=True, help="The store that gets a source of its own."
)
@click.option("--kind", type=click.Choice(["numpy", "files", "hdf5", "pickle"]), required=True, help="What PATH is.")
@click.option("--layer", metavar="NAME", help="What the layer is called in the store. [needed but for hdf5]")
@click.option(
    "--items", type=click.Path(path_type=Path), metavar="CSV", help="Keys of the rows: face_id, view, metadata."
)
@click.option(
    "--names", type=click.Path(path_type=Path), metavar="FILE", help="Names of the rows' photographs, one a line."
)
@click.option("--pattern", metavar="REGEX", help="How keys are read from such names; see cache_layers.py --help.")
@click.option("--name", metavar="NAME", help="What the source is called. [default: imported-HASH]")
@click.option("--dry-run", is_flag=True, help="Say what would be imported, and stop.")
def import_(
    path: Path,
    store: Path,
    kind: str,
    layer: str | None,
    items: Path | None,
    names: Path | None,
    pattern: str | None,
    name: str | None,
    dry_run: bool,
) -> None:
    """Take in activations that another program computed, marked as such: how they were made is not known."""
    from featurestore.photos.csv_files import read_csv
    from featurestore.photos.keys import keys_of
    from featurestore.store.importing import import_activations, row_names

    if items and names:
        raise click.UsageError("give --items or --names, not both.")
    table: Any = read_csv(items, dtype={"face_id": str, "view": str}) if items else None
    if table is None:
        listed = names.read_text("utf-8-sig").splitlines() if names else row_names(path, kind=kind, layer=layer)
        table = keys_of([line for line in listed if line.strip()], pattern) if listed else None
    if dry_run:
        click.echo(
            f"{path}: {'its own keys' if table is None else f'{len(table)} rows, first {tuple(table.iloc[0][:2])}'}"
        )
        return
    with progress_bar(None if table is None else len(table), "importing", " rows") as bar:
        done = import_activations(path, store, kind=kind, layer=layer, name=name, items=table, progress=bar.update)
    for note in done.notes:
        click.echo(f"Note: {note}.")
    click.echo(
        as_typed(f"Imported {done.n_items:,} items of {', '.join(done.layers)} into {store}, source {done.source}.")
    )


if __name__ == "__main__":
    main()
