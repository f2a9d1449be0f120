"""What the questions to a store share: options, the opened store with what runs the tasks, and how results are shown and kept."""

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
    from featurestore.store.reader import Source

SHOWN = 20  # rows of a table on the screen
_WIDTH = 100  # of the screen, in characters

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
    out: Path | None = None
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


def query(group: click.Group, name: str, epilog: str, *but: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command of the group: a function of ``Asked`` and of its own options. It has the shared ones ``but`` some."""

    def made(function: Callable[..., None]) -> click.Command:
        @wraps(function)
        def run(**values: Any) -> None:
            shared = {key: values.pop(key) for key in _OPTIONS if key in values}
            function(Asked(**shared), **values)

        for key, option in reversed(_OPTIONS.items()):
            if key not in but:
                run = option(run)
        command: click.Command = group.command(name, cls=Command, epilog=f"Examples:\n\n{epilog}")(run)
        return command

    return made


@contextmanager
def asking(asked: Asked, doing: str) -> "Iterator[FeatureStore]":
    """The opened store, its networks named; within, tasks run by the scheduler asked for, and show their progress."""
    from featurestore import FeatureStore
    from featurestore.queries.blocks import scheduler as running
    from pipelines._progress import TaskProgress

    opened = FeatureStore.open(asked.store)
    name_networks(opened, asked)
    with running(asked.scheduler) as where:
        if where:
            click.echo(where, err=True)
        with TaskProgress(lambda n: progress_bar(n, doing, " blocks")):
            yield opened


def sources_asked(opened: "FeatureStore", asked: Asked) -> "list[Source]":
    """Those named, or all, that hold any of the layers asked for."""
    named = [opened.source(name) for name in asked.sources] or list(opened.sources.values())
    return [source for source in named if not asked.layers or source.layers.keys() & set(asked.layers)]


def name_networks(opened: "FeatureStore", asked: Asked) -> None:
    """Say which networks the answer is about, and with which weights: random ones are called so."""
    for source in sources_asked(opened, asked):
        click.echo(f"{source.attributes['backbone']}, weights {source.weights}")


def show(
    table: "pd.DataFrame",
    out: Path | None,
    notes: list[str] | tuple[str, ...] = (),
    seen: "pd.DataFrame | None" = None,
) -> None:
    """The first rows on the screen, all of them into ``out``, and what was left out. ``seen`` is shown instead, if given."""
    from featurestore.queries.output import write_result

    seen = table if seen is None else seen
    click.echo(_on_the_screen(seen.head(SHOWN)))
    if len(seen) > SHOWN:
        click.echo(f"and {len(seen) - SHOWN:,} more rows" + ("" if out else "; --out FILE writes all"))
    for note in notes:
        click.echo(f"Left out: {note}.", err=True)
    if out:
        wrote(write_result(table, out))


def _on_the_screen(table: "pd.DataFrame") -> str:
    """As text. Where it is too wide, columns of a named index are wrapped, and other tables have headings of two lines."""
    import pandas as pd

    style: dict[str, Any] = {"float_format": lambda value: f"{value:.3f}"}
    if table.index.names[0]:
        return str(table.to_string(line_width=_WIDTH, **style))
    text = str(table.to_string(index=False, **style))
    if len(text.partition("\n")[0]) <= _WIDTH:
        return text
    headings = pd.MultiIndex.from_tuples([_in_two(str(name)) for name in table.columns])
    return str(table.set_axis(headings, axis=1).to_string(index=False, sparsify=False, **style))


def _in_two(name: str) -> tuple[str, str]:
    """``effective_dimension`` as two lines, about as long as each other; a single word is the lower one."""
    words = name.split("_")
    halves = [("_".join(words[:i]), "_".join(words[i:])) for i in range(len(words))]
    return min(halves, key=lambda half: max(map(len, half)))


def wrote(paths: list[Path]) -> None:
    """Say where results are."""
    click.echo("Kept: " + ", ".join(map(str, paths)))


def check(asked: Asked, several: bool = False, also: tuple[str, ...] = ()) -> None:
    """Before anything is computed: whether the results can be written."""
    from featurestore.figures import check_ending as check_figure
    from featurestore.queries.output import check_ending

    if asked.out:
        check_ending(asked.out, several, also)
    if asked.figure:
        check_figure(asked.figure)
