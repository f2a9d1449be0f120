"""Ask a store: RDMs, neighbours, verification, statistics, invariance, comparison of layers, export and import."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipelines._cli import DEMO_STORE, Command, progress_bar
from pipelines._params import Expression

if TYPE_CHECKING:
    import pandas as pd

    from featurestore import FeatureStore

EPILOG = r"""
Examples:

  python pipelines/query_layers.py rdm --layers fc7-relu --by face --out rdm.csv --figure rdm.png
  python pipelines/query_layers.py neighbours --layers fc7-relu --of head-007 -k 3 --figure neighbours.png
  python pipelines/query_layers.py rsa --pairs similarity.csv --figure rsa.svg

Each command has --help with examples of its own.
"""
_SHOWN = 20  # rows of a table on the screen


@click.group(epilog=EPILOG)
def main() -> None:
    """Ask the layers of a store, without the network: block by block, within a memory cap."""


# click's own formatting of an epilog wraps examples.
main.format_epilog = Command.format_epilog.__get__(main)  # type: ignore[method-assign]

_OPTIONS: dict[str, Callable[..., Any]] = {
    "store": click.option(
        "--store", type=click.Path(path_type=Path), default=DEMO_STORE, show_default=True, help="The store to ask."
    ),
    "layers": click.option("--layers", multiple=True, metavar="NAME …", help="These layers. [default: all]"),
    "sources": click.option(
        "--sources",
        multiple=True,
        metavar="NAME …",
        help="These sources; the beginning of a name is enough. [default: all that hold the layers]",
    ),
    "where": click.option(
        "--where", multiple=True, type=Expression(), help="Only items that meet this, such as \"view == 'frontal'\"."
    ),
    "metric": click.option(
        "--metric",
        default="cosine",
        show_default=True,
        metavar="NAME",
        help="cosine, correlation, euclidean or cityblock.",
    ),
    "memory": click.option(
        "--memory", default="1GiB", show_default=True, metavar="BYTES", help="Cap on the memory that the command takes."
    ),
    "scheduler": click.option(
        "--scheduler",
        metavar="threads|processes|ADDRESS",
        help="What runs the query: threads, processes, or a Dask cluster such as tcp://127.0.0.1:8786. [default: threads]",
    ),
    "out": click.option(
        "--out", type=click.Path(path_type=Path), metavar="FILE", help="Write it all: .csv, .parquet, .zarr or .npy."
    ),
    "figure": click.option("--figure", type=click.Path(path_type=Path), metavar="FILE", help="Draw it: .png or .svg."),
}


@dataclass(frozen=True)
class Asked:
    """The options that all commands share, as they were typed."""

    store: Path
    layers: tuple[str, ...]
    sources: tuple[str, ...]
    out: Path | None
    where: tuple[str, ...] = ()
    metric: str = "cosine"
    memory: str = "1GiB"
    scheduler: str | None = None
    figure: Path | None = None

    def options(self) -> dict[str, Any]:
        """What chooses layers and items, and the memory left to the query, as queries take them."""
        from featurestore.queries.blocks import beside_this_program

        layers = self.layers[0] if len(self.layers) == 1 else self.layers or None
        memory = beside_this_program(self.memory)
        return {"layers": layers, "sources": self.sources or None, "where": list(self.where), "memory": memory}


def _query(name: str, epilog: str, *but: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command of the group: a function of ``Asked`` and of its own options. It has the shared ones ``but`` some."""

    def made(function: Callable[..., None]) -> click.Command:
        @wraps(function)
        def run(**values: Any) -> None:
            shared = {key: values.pop(key) for key in _OPTIONS if key in values}
            function(Asked(**shared), **values)

        for key, option in reversed(_OPTIONS.items()):
            if key not in but:
                run = option(run)
        command: click.Command = main.command(name, cls=Command, epilog=f"Examples:\n\n{epilog}")(run)
        return command

    return made


@contextmanager
def _asking(asked: Asked, doing: str) -> "Iterator[FeatureStore]":
    """The opened store, with what runs the tasks, their progress, and the time that it took."""
    from featurestore import FeatureStore
    from featurestore.queries.blocks import scheduler as running
    from pipelines._progress import TaskProgress

    opened = FeatureStore.open(asked.store)
    with running(asked.scheduler) as where:
        if where:
            click.echo(where, err=True)
        with TaskProgress(lambda n: progress_bar(n, doing, " blocks")):
            yield opened


def _show(table: "pd.DataFrame", out: Path | None, notes: list[str] | tuple[str, ...] = ()) -> None:
    """The first rows on the screen, all of them into ``out``, and what was left out."""
    from featurestore.queries.output import write_result

    shown = table.head(_SHOWN)
    index = bool(table.index.names[0])
    click.echo(shown.to_string(index=index, float_format=lambda value: f"{value:.3f}"))
    if len(table) > len(shown):
        click.echo(f"and {len(table) - len(shown):,} more rows" + ("" if out else "; --out FILE writes all"))
    for note in notes:
        click.echo(f"Left out: {note}.", err=True)
    if out:
        _wrote(write_result(table, out))


def _wrote(paths: list[Path]) -> None:
    click.echo("Kept: " + ", ".join(map(str, paths)))


def _check(asked: Asked, several: bool = False) -> None:
    """Before anything is computed: whether the results can be written."""
    from featurestore.figures import check_ending as check_figure
    from featurestore.queries.output import check_ending

    if asked.out:
        check_ending(asked.out, several)
    if asked.figure:
        check_figure(asked.figure)


@_query(
    "rdm",
    r"""  python pipelines/query_layers.py rdm --layers fc7-relu --metric cosine --out rdm.csv
  python pipelines/query_layers.py rdm --layers fc7-relu --where "view == 'frontal'" --figure rdm.svg
  python pipelines/query_layers.py rdm --layers maxp_5_3 fc7-relu --by face --pca 0.95 --out rdm.zarr
""",
)
@click.option("--by", metavar="face|COLUMN", help="Average the items of each face, view or value of a column first.")
@click.option(
    "--pca", type=float, metavar="SHARE", help="Keep the principal components that explain this much variance."
)
def rdm(asked: Asked, by: str | None, pca: float | None) -> None:
    """How different each pair of items is: a representational dissimilarity matrix."""
    from featurestore.queries import dissimilarity

    with _asking(asked, "RDM") as opened:
        given = asked.options()
        matrix = dissimilarity.rdm(opened, metric=asked.metric, by=by, pca=pca, **given)
        _check(asked, several="layer" in matrix.dims)
        if matrix.nbytes <= given["memory"] // 8:
            matrix = matrix.compute()
        elif not asked.out:
            raise click.UsageError(f"the matrix has {matrix.nbytes:,} bytes: write it, --out rdm.zarr.")
        if asked.out:
            from featurestore.queries.output import write_result

            _wrote(write_result(matrix, asked.out))
        if matrix.chunks is None:
            _show(dissimilarity.summary(matrix), None, matrix.attrs["left_out"])
        if asked.figure:
            from featurestore.figures import draw_rdm

            _wrote([draw_rdm(matrix, asked.figure, _photographs(opened, asked.sources) if by is None else None)])


def _photographs(store: "FeatureStore", sources: tuple[str, ...]) -> dict[str, Path]:
    """Where each item's photograph lies, by ``face|view``."""
    found = store.source(sources[0]) if sources else next(iter(store.sources.values()))
    return {"|".join(key): Path(path) for key, path in zip(found.keys, found.coordinate("path"), strict=True)}


@_query(
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

    _check(asked)
    with _asking(asked, "RDM") as opened:
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
    _show(table, asked.out, notes)
    if asked.figure:
        from featurestore.figures import draw_rsa

        _wrote([draw_rsa(table, asked.figure, f"Spearman's correlation with {table.attrs['value']}")])


@_query(
    "neighbours",
    r"""  python pipelines/query_layers.py neighbours --layers fc7-relu --of head-007 -k 3 --figure neighbours.png
  python pipelines/query_layers.py neighbours --layers fc7-relu --of "head-007|yaw+30" --other-faces
  python pipelines/query_layers.py neighbours --layers fc7-relu -k 10 --out neighbours.parquet
""",
)
@click.option("--of", multiple=True, metavar="FACE[|VIEW] …", help="Of these faces or items. [default: of all]")
@click.option("-k", type=click.IntRange(1), default=5, show_default=True, help="How many.")
@click.option("--other-faces", is_flag=True, help="Leave out items of the same face.")
def neighbours(asked: Asked, of: tuple[str, ...], k: int, other_faces: bool) -> None:
    """The most similar items of each item."""
    from featurestore.queries.nearest import neighbours as nearest

    _check(asked)
    given = asked.options()
    with _asking(asked, "neighbours") as opened:
        table = nearest(
            opened,
            given.pop("layers"),
            of or None,
            k=k,
            metric=asked.metric,
            other_faces=other_faces,
            **given,
        )
        _show(table, asked.out)
        if asked.figure:
            from featurestore.figures import draw_neighbours

            _wrote([draw_neighbours(table, _photographs(opened, asked.sources), asked.figure)])


@_query(
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

    _check(asked)
    opened = FeatureStore.open(asked.store)
    _show(identification_table(opened, held_out, asked.layers or None, asked.sources or None), asked.out)


@_query(
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

    _check(asked)
    with _asking(asked, "pairs") as opened:
        given = asked.options()
        found = verify(opened, pairs=pairs, metric=asked.metric, n_pairs=n_pairs, seed=seed, **given)
    _show(found.table.set_index("layer").T.rename_axis(None), None)
    if asked.out:
        from featurestore.queries.output import write_result

        _wrote(write_result(found.table, asked.out))
    if asked.figure:
        from featurestore.figures import draw_roc

        areas = {
            row.layer: f"{row.area:.3f} [{row.area_low:.3f}, {row.area_high:.3f}]" for row in found.table.itertuples()
        }
        _wrote([draw_roc(found.roc, asked.figure, areas)])


@_query(
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

    _check(asked)
    with _asking(asked, "statistics") as opened:
        given = asked.options()
        if trait:
            table = units.units_with_trait(opened, given.pop("layers"), trait, **given)
        else:
            table = layer_statistics.statistics(opened, by=by, **given)
    _show(table, asked.out)


@_query(
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

    _check(asked)
    with _asking(asked, "mean") as opened:
        given = asked.options()
        array = statistical.mean(opened, given.pop("layers"), by=by, **given)
    click.echo(f"{array.name or 'mean'}: {' × '.join(f'{size:,} {name}' for name, size in array.sizes.items())}")
    if asked.out:
        _wrote(write_result(array, asked.out))


@_query(
    "invariance",
    r"""  python pipelines/query_layers.py invariance --figure invariance.svg
  python pipelines/query_layers.py invariance --layers maxp_5_3 fc7-relu --reference frontal --out invariance.csv
""",
)
@click.option("--reference", metavar="VIEW", help="View differences from this view only.")
def invariance(asked: Asked, reference: str | None) -> None:
    """How alike a face stays across views, and how alike others are: the view-generalisation profile of each layer."""
    from featurestore.queries.view_invariance import invariance as profile

    _check(asked)
    with _asking(asked, "pairs of views") as opened:
        table = profile(opened, metric=asked.metric, reference=reference, **asked.options())
    _show(table, asked.out)
    if asked.figure:
        from featurestore.figures import draw_invariance

        _wrote([draw_invariance(table, asked.figure)])


@_query(
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

    _check(asked)
    with _asking(asked, "pairs of items") as opened:
        given = asked.options()
        table = compare(opened, measure=measure, metric=asked.metric, by=by, **given)
    _show(table, asked.out, table.attrs["left_out"])
    if asked.figure:
        from featurestore.figures import draw_layer_matrix

        label = {"rdm": "correlation of RDMs", "rbf-cka": "CKA (Gaussian)"}.get(measure, "CKA (linear)")
        _wrote([draw_layer_matrix(table, asked.figure, label)])


if __name__ == "__main__":
    main()
