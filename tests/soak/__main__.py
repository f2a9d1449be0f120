"""Attacks on stores, and on what reads files that a stranger could have made: ``python -m tests.soak``."""

import csv
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import click

from featurestore.text import aligned, human_bytes
from pipelines._cli import Command, progress_bar
from tests.commands import FORKS
from tests.soak.cases import KINDS, make_case, read_seeds
from tests.soak.damage import DAMAGES, damage_and_repair, make_store
from tests.soak.kills import kill_passes
from tests.soak.workers import OUTCOMES, Outcome, make_seeds, outcomes, read_again

_COLUMNS = ("kind", "case", "seed", "seed_file", "outcome", "seconds", "mib", "detail")
_MEMORY = Path("/dev/shm")
_FUZZ = """
Examples:

  python -m tests.soak fuzz --n 2000 --out store/soak
  python -m tests.soak fuzz --kind images csvs --n 100000 --seed 7 --workers 4
"""
_AGAIN = """
Example:

  python -m tests.soak again --kind images --case 1234 --seed 0
"""
_DAMAGE = """
Example:

  python -m tests.soak damage --n 1000
"""
_KILLS = """
Example:

  python -m tests.soak kills --n 1000
"""


@click.group()
def main() -> None:
    """Attack the readers of files that a stranger could have made."""


@contextmanager
def _workplace() -> Iterator[Path]:
    """A folder in memory, with all seeds in ``seeds``."""
    with tempfile.TemporaryDirectory(prefix="soak-", dir=_MEMORY if _MEMORY.is_dir() else None) as name:
        making = FORKS.Process(target=make_seeds, args=(Path(name, "seeds"),))
        making.start()
        making.join()
        if making.exitcode:
            raise click.ClickException("the undamaged files could not be written.")
        yield Path(name)


@main.command(cls=Command, epilog=_FUZZ)
@click.option(
    "--kind", "kinds", multiple=True, type=click.Choice(KINDS), default=KINDS, help="Kinds of files. [default: all]"
)
@click.option("--n", type=click.IntRange(1), default=1000, show_default=True, help="Cases of each kind.")
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="Number of the first case.")
@click.option("--seed", type=int, default=0, show_default=True, help="Other cases.")
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count() or 1, help="Processes. [default: one a core]")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Keep findings here.")
def fuzz(kinds: tuple[str, ...], n: int, first: int, seed: int, workers: int, out: Path | None) -> None:
    """Damage small valid files in N ways and read them; exit status 1 if anything but a refusal comes of it.

    Whatever is not read has to be refused by a FeatureStoreError, within 10 s and 1 GiB, and nothing in it may run.
    """
    ended: dict[str, list[Outcome]] = {}
    with _workplace() as place:
        for kind in kinds:
            ended[kind] = []
            with progress_bar(n, kind, " cases") as bar:
                for outcome in outcomes(kind, seed, iter(range(first, first + n)), place / "seeds", place, workers):
                    bar.update(1)
                    if outcome.is_finding:
                        outcome = found_in(out, kind, seed, outcome, place / "seeds")
                    ended[kind].append(outcome)
            lines = distinct(ended[kind])
            click.echo("\n".join([f"{kind}:", *lines]) if lines else f"{kind}: no findings")
    found = sum(outcome.is_finding for some in ended.values() for outcome in some)
    click.echo("\n".join(["", *table_of(ended), ""]))
    click.echo(f"{found} findings{f', kept in {out}' if found and out else ''}.")
    if found:
        sys.exit(1)


def table_of(ended: dict[str, list[Outcome]]) -> list[str]:
    """Lines: of each kind how often each outcome was, the slowest case and the largest."""
    seen = [what for what in OUTCOMES if any(outcome.what == what for some in ended.values() for outcome in some)]
    rows = [("kind", *seen, "slowest", "largest")]
    for kind, some in ended.items():
        counts = Counter(outcome.what for outcome in some)
        slowest = max(some, key=lambda outcome: outcome.seconds)
        largest = max(some, key=lambda outcome: outcome.bytes)
        worst = (
            f"{slowest.seconds:.2f} s (case {slowest.number})",
            f"{human_bytes(largest.bytes)} (case {largest.number})",
        )
        rows.append((kind, *(f"{counts[what]:,}" for what in seen), *worst))
    return aligned(rows)


def distinct(ended: list[Outcome]) -> list[str]:
    """A line for each finding of another kind or place, the most frequent first."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in ended:
        if outcome.is_finding:
            groups.setdefault((outcome.what, outcome.detail.partition(": ")[0]), []).append(outcome)
    return [
        f"  {len(some)} × {what}, case {some[0].number} ({some[0].seed_file}): {some[0].detail}"
        for (what, _), some in sorted(groups.items(), key=lambda pair: -len(pair[1]))
    ]


def found_in(out: Path | None, kind: str, seed: int, outcome: Outcome, seeds: Path) -> Outcome:
    """With the seed's name, which a worker that ended could not say. ``out`` gets its files and a line in ``findings.csv``."""
    case = make_case(kind, outcome.number, seed, read_seeds(seeds / kind))
    outcome = replace(outcome, seed_file=case.seed_file)
    if out is None:
        return outcome
    folder = out / f"{kind}-{seed}-{outcome.number}"
    shutil.rmtree(folder, ignore_errors=True)
    case.write(folder)
    table = out / "findings.csv"
    is_new = not table.exists()
    with table.open("a", newline="", encoding="utf-8", errors="backslashreplace") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerows([_COLUMNS] if is_new else [])
        about = (kind, outcome.number, seed, case.seed_file, outcome.what)
        lines.writerow([*about, f"{outcome.seconds:.2f}", f"{outcome.bytes / 2**20:.0f}", outcome.detail])
    return outcome


@main.command(cls=Command, epilog=_AGAIN)
@click.option("--kind", type=click.Choice(KINDS), required=True)
@click.option("--case", "number", type=click.IntRange(0), required=True, help="Its number.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Keep its files here.")
def again(kind: str, number: int, seed: int, out: Path | None) -> None:
    """Read one case again, in a process of its own, and show what it raises."""
    with _workplace() as place:
        reading = FORKS.Process(target=read_again, args=(kind, number, seed, place, out))
        reading.start()
        reading.join()
    if reading.exitcode:
        click.echo(f"exit status {reading.exitcode}")
        sys.exit(1)


@main.command(cls=Command, epilog=_DAMAGE)
@click.option(
    "--n", type=click.IntRange(1), default=1000, show_default=True, help="Flipped bits; a fifth each of the others."
)
@click.option("--first", type=click.IntRange(0), default=0, show_default=True, help="Number of the first case.")
def damage(n: int, first: int) -> None:
    """Flip bits, swap, insert and cut anywhere in a store; exit status 1 if one is not named and repaired to the same bytes."""
    rows, wrong = [("damage", "cases", "the same bytes", "named and repaired", "not")], 0
    with tempfile.TemporaryDirectory(prefix="soak-", dir=_MEMORY if _MEMORY.is_dir() else None) as name:
        store = make_store(Path(name))
        for what in DAMAGES:
            cases = n if what == "flip" else -(-n // 5)
            found = []
            with progress_bar(cases, what, " cases") as bar:
                for case in range(first, first + cases):
                    found.append(damage_and_repair(store, what, case))
                    bar.update(1)
                    if found[-1].problem:
                        click.echo(f"{what} {case}: {found[-1].what}: {found[-1].problem}")
            same, bad = (
                sum(each.what.endswith("same bytes") for each in found),
                sum(bool(each.problem) for each in found),
            )
            rows.append((what, f"{cases:,}", str(same), f"{cases - same - bad:,}", str(bad)))
            wrong += bad
    click.echo("\n".join(["", *aligned(rows)]))
    sys.exit(1 if wrong else 0)


@main.command(cls=Command, epilog=_KILLS)
@click.option("--n", type=click.IntRange(1), default=1000, show_default=True, help="Kills.")
@click.option("--seed", type=int, default=0, show_default=True, help="Other moments.")
def kills(n: int, seed: int) -> None:
    """Kill passes N times; exit status 1 if what one leaves is damaged, or a store does not end as if nothing had happened."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name, progress_bar(n, "kills", " kills") as bar:
        wrong = kill_passes(Path(name), n, seed, bar.update)
    click.echo("\n".join(wrong) or f"{n} kills: every store whole after each, and the same bytes at the end.")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    FORKS.set_forkserver_preload(["tests.soak.kinds", "torch._dynamo"])
    main()
