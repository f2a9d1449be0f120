"""What the commands share: options that take several values, error messages without tracebacks, progress bars.

Nothing heavy is imported here, so that ``--help`` and tab completion answer at once.
"""

import sys
from pathlib import Path
from typing import Any

import click

from featurestore.errors import FeatureStoreError

DEMO_IMAGES = Path("store/demo_faces")
DEMO_STORE = Path("store/demo.zarr")


class Command(click.Command):
    """A command whose ``multiple`` options take values up to the next option: ``--layers a b c``.

    A FeatureStoreError becomes its message and exit status 1; Ctrl-C outside a pass exits with 130.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        several = {
            name for param in self.params if isinstance(param, click.Option) and param.multiple for name in param.opts
        }
        spread: list[str] = []
        current = None
        first = False
        for arg in args:
            if arg.startswith("-") and len(arg) > 1:
                name, equals, _ = arg.partition("=")
                current, first = (name if name in several else None), not equals
                spread.append(arg)
            elif current and not first:
                spread += [current, arg]
            else:
                first = False
                spread.append(arg)
        return super().parse_args(ctx, spread)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples are printed as they stand: a command that is wrapped cannot be copied."""
        if self.epilog:
            formatter.write(f"\n{self.epilog.strip()}\n")

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FeatureStoreError as error:
            raise click.ClickException(str(error)) from error
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise click.ClickException(f"{error.strerror or error}{where}") from error
        except KeyboardInterrupt:
            click.echo("\nStopped.", err=True)
            sys.exit(130)


def note_left_out(failures: list, what: str) -> None:
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
