"""What the commands share: options that take several values, error messages without tracebacks, progress bars.

Nothing heavy is imported here, so that ``--help`` and tab completion answer at once.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from featurestore.errors import FeatureStoreError
from featurestore.text import with_urls
from pipelines._params import Expression

if TYPE_CHECKING:
    from distributed import Client

DEMO_IMAGES = Path("store/demo_faces")
DEMO_STORE = Path("store/demo.zarr")
DOWNLOAD = "download"
_CACHE = (
    (
        "cache",
        "--cache-dir",
        "FOLDER",
        "FEATURESTORE_CACHE_DIR",
        "Where shards of a store at a URL are kept, to be read again.",
    ),
    ("cache_bytes", "--cache-bytes", "N", "FEATURESTORE_CACHE_BYTES", "At most so much there, such as 20G."),
)
_FIRST_LINE, _LINES_EVERY = 3.0, 30.0  # seconds, in a log


class Command(click.Command):
    """A command whose ``multiple`` options take values up to the next option, or with commas: ``--layers a b c``, ``a,b,c``.

    A comma within a name is written ``\\,``; expressions and files are taken whole. A FeatureStoreError becomes its message
    and exit status 1; Ctrl-C outside a caching run exits with 130.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if any(param.name == "store" for param in self.params):
            self.params += [_cache_option(*each) for each in _CACHE]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        several = {
            name: not isinstance(param.type, Expression | click.Path)
            for param in self.params
            if isinstance(param, click.Option) and param.multiple
            for name in param.opts
        }
        spread: list[str] = []
        current = None
        for arg in args:
            values = [arg]
            if arg.startswith("-") and len(arg) > 1:
                name, equals, value = arg.partition("=")
                current = name if name in several else None
                spread.append(name if current else arg)
                values = [value] if current and equals else []
            for value in values:
                for piece in _comma_separated(value) if current and several[current] else [value]:
                    spread += [piece] if current is None or spread[-1] == current else [current, piece]
        return super().parse_args(ctx, spread)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples are printed without wrapping: a command that is wrapped cannot be copied."""
        if self.epilog:
            formatter.write(f"\n{self.epilog.strip()}\n")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FeatureStoreError as error:
            raise click.ClickException(as_typed(str(error))) from error
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise click.ClickException(f"{error.strerror or error}{where}") from error
        except KeyboardInterrupt:
            click.echo("\nStopped.", err=True)
            sys.exit(130)


def _cache_option(name: str, option: str, metavar: str, variable: str, text: str) -> click.Option:
    """An option that is set in the environment, where this process and those that it starts look for it."""

    def keep(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
        if value is not None:
            os.environ[variable] = value

    return click.Option(
        [name, option], metavar=metavar, callback=keep, expose_value=False, help=f"{text} [default: {variable}]"
    )


def _comma_separated(value: str) -> list[str]:
    """``a,b`` and ``a, b`` as two; ``a\\,b`` as one name with a comma."""
    pieces = [piece.strip().replace("\\,", ",") for piece in re.split(r"(?<!\\),", value)]
    return [piece for piece in pieces if piece] or [value]


def as_typed(message: str) -> str:
    """A message of the library with arguments as the running command's options: `` `on_error` `` as ``--on-error``."""
    params = click.get_current_context().command.params
    options = {
        param.name: param.opts[0] if isinstance(param, click.Option) else param.human_readable_name for param in params
    }
    for one, several in (("layer", "layers"), ("source", "sources")):
        if several in options:
            options.setdefault(one, options[several])
    named = re.sub(r"(?<![\w'\"=<>])(?<!\w\()`(\w+)`", lambda match: options.get(match[1], match[0]), message)
    return with_urls(named)


def weights_file(given: str, backbone: str, dry_run: bool = False) -> str:
    """``--weights`` as given, or the published file for ``download``, fetched with a bar if it is not here yet.

    A dry run fetches nothing: FeatureStoreError if the file is not here.
    """
    kind, _, which = given.partition(":")
    if kind != DOWNLOAD:
        return given
    from tqdm import tqdm

    from featurestore.checkpoints.download import fetch, kept, published_file, weights_folder
    from featurestore.networks.registry import get_backbone

    spec = get_backbone(backbone)
    published = published_file(spec, which)
    click.echo(f"{spec.licence}\nWeights: {published.url}, kept in {weights_folder()}")
    if dry_run and not kept(published, weights_folder()).exists():
        raise FeatureStoreError(
            "the plan needs these weights, and they are not here yet. Leave --dry-run out to fetch them."
        )
    with tqdm(desc="downloading", unit="B", unit_scale=True, unit_divisor=1024, leave=False, delay=0.5) as bar:

        def show(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return str(fetch(published, weights_folder(), show))


def complete_backbones(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The face networks, and how others are named."""
    from featurestore.networks.registry import BACKBONES
    from featurestore.networks.spec import TIMM, TORCHVISION

    return [CompletionItem(name) for name in [*BACKBONES, TORCHVISION, TIMM] if name.startswith(incomplete)]


def kept_memory(device: str) -> str:
    """Called before a network or a head runs on ``device``: on the CPU freed memory is used again from now on.

    Returns what a plan says of it; on a GPU nothing is done or said.
    """
    from featurestore.devices import choose_device
    from featurestore.memory import keep_freed_memory

    return keep_freed_memory() if choose_device(device).type == "cpu" else ""


def scheduler_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--scheduler`` of a command that divides its work into tasks."""
    return click.option(
        "--scheduler",
        metavar="ADDRESS",
        help="Let the workers of a Dask cluster do it, such as tcp://127.0.0.1:8786, which see the same files at the same paths.",
    )(function)


@contextmanager
def asked_cluster(
    scheduler: str | None, processes: int | None = None, packages: Sequence[str] = ("featurestore",)
) -> "Iterator[Client | None]":
    """A client of the cluster at an address, or of one of ``processes`` made for the command; None where neither is given."""
    if scheduler is None and processes is None:
        yield None
        return
    from featurestore.cluster import connected, local_cluster

    with connected(scheduler, packages) if scheduler else local_cluster(processes or 1) as client:
        yield client


def tasks_of(client: "Client | None") -> dict[str, Any]:
    """The argument ``calls`` of what divides its work into tasks; none without a cluster."""
    if client is None:
        return {}
    from featurestore.cluster import described, in_order

    click.echo(f"  cluster: {described(client)}", err=True)
    return {"calls": partial(in_order, client)}


def note_left_out(failures: Collection[object], what: str) -> None:
    """List what was skipped, at the end where it is seen."""
    if failures:
        click.echo(f"\n{len(failures)} photographs were {what}:", err=True)
        for failure in failures:
            click.echo(f"  {as_typed(str(failure))}", err=True)


def progress_bar(total: int | None, doing: str, unit: str = " images", alike: bool = True) -> Any:
    """A tqdm bar on a terminal, lines in a log file; use as a context and ``update(n)``.

    ``total`` None: a count. ``alike``: each takes about as long as the next, so that a log can say how long is left.
    """
    if not sys.stderr.isatty():
        return LogLines(total, doing, unit, alike)
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=doing,
        unit=unit,
        disable=total == 0,
        leave=total is not None,
        mininterval=0.1,
        delay=0.1 if total is None else 0,
    )


class LogLines:
    """Progress on standard error as whole lines: after the first seconds, then every half minute, and at the end.

    ``clock`` gives seconds. What is over in the first seconds prints its end alone, and nothing without a total.
    """

    def __init__(
        self, total: int | None, doing: str, unit: str, alike: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.doing, self.unit, self.alike, self.clock = total, doing, unit, alike, clock
        self.n = 0
        self.started = clock()
        self.due = self.started + _FIRST_LINE

    def __enter__(self) -> "LogLines":
        return self

    def __exit__(self, *error: object) -> None:
        if self.n and self.total is not None:
            self._print()

    def update(self, n: int = 1) -> None:
        """``n`` more are done."""
        self.n += n
        if self.clock() >= self.due and self.n != self.total:
            self._print()
            self.due = self.clock() + _LINES_EVERY

    def _print(self) -> None:
        from featurestore.text import human_duration

        seconds = max(self.clock() - self.started, 1e-9)
        of = f" of {self.total:,}" if self.total else ""
        line = f"{self.doing}: {self.n:,}{of}{self.unit} in {human_duration(seconds)}"
        if self.total and self.alike and self.n < self.total:
            line += f", about {human_duration((self.total - self.n) * seconds / self.n)} left"
        click.echo(line, err=True)
