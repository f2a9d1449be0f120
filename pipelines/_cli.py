"""What the commands share: options that take several values, error messages without tracebacks, progress bars.

Nothing heavy is imported here, so that ``--help`` and tab completion answer at once.
"""

import re
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from featurestore.errors import FeatureStoreError
from pipelines._params import Expression

DEMO_IMAGES = Path("store/demo_faces")
DEMO_STORE = Path("store/demo.zarr")
DOWNLOAD = "download"


class Command(click.Command):
    """A command whose ``multiple`` options take values up to the next option, or with commas: ``--layers a b c``, ``a,b,c``.

    A comma within a name is written ``\\,``; expressions and files are taken whole. A FeatureStoreError becomes its message
    and exit status 1; Ctrl-C outside a caching run exits with 130.
    """

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


def _comma_separated(value: str) -> list[str]:
    """``a,b`` and ``a, b`` as two; ``a\\,b`` as one name with a comma."""
    pieces = [piece.strip().replace("\\,", ",") for piece in re.split(r"(?<!\\),", value)]
    return [piece for piece in pieces if piece] or [value]


def as_typed(message: str) -> str:
    """A message of the library with arguments as the running command's options: `` `on_error` `` as ``--on-error``."""
    options = {param.name: param.opts[0] for param in click.get_current_context().command.params}
    return re.sub(r"(?<![\w'\"=<>(])`(\w+)`", lambda match: options.get(match[1], match[0]), message)


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
    from featurestore.networks.spec import TORCHVISION

    return [CompletionItem(name) for name in [*BACKBONES, TORCHVISION] if name.startswith(incomplete)]


def note_left_out(failures: Collection[object], what: str) -> None:
    """List what was skipped, at the end where it is seen."""
    if failures:
        click.echo(f"\n{len(failures)} photographs were {what}:", err=True)
        for failure in failures:
            click.echo(f"  {failure}", err=True)


def progress_bar(total: int | None, doing: str, unit: str = " images") -> Any:
    """A tqdm bar on a terminal; in a log file a line every half minute instead. ``total`` None: a count that vanishes."""
    from tqdm import tqdm

    every = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        total=total,
        desc=doing,
        unit=unit,
        disable=total == 0,
        leave=total is not None,
        mininterval=every,
        delay=every if total is None else 0,
    )
