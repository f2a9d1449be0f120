"""Train heads on cached layers: odd-one-out heads from trials, the multi-view head from face identities."""

# heads, featurestore and torch are imported inside the functions that need them: --help and tab completion stay instant.
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from heads.registry import HEADS
from pipelines._cli import DEMO_IMAGES, DEMO_STORE, Command, as_typed, kept_memory, progress_bar
from pipelines._params import Device, Expression, Finite, Pairs, Rank
from pipelines._training_text import accuracy_text, comparison_text, faulty_file, group_text, plan_text, progress_text

if TYPE_CHECKING:
    from featurestore import FeatureStoreError
    from heads.grid import Grid, GridRequest
    from heads.runs import Run
    from heads.train import Progress

DEMO_TRIALS = DEMO_IMAGES / "trials.csv"
DEFAULT_OUT = Path("store/runs")
EPILOG = r"""
Examples:

  # the demo store and its simulated observers
  python pipelines/train_heads.py --layers maxp_5_3 fc7-relu --heads conv similarity --lr 5e-4 --seeds 0 1 2

  # your judgments, tested on faces that no training trial shows
  python pipelines/train_heads.py --store store/photos.zarr --trials photos_trials.csv \
      --layers fc7-relu --heads similarity --split face --where "gender == 'female'"

  # few trials are left where faces are never seen: test every face once, in three folds
  python pipelines/train_heads.py --store store/photos.zarr --trials photos_trials.csv \
      --layers fc7-relu --heads similarity --split face --folds 3

  # which face is it? trained on some views, tested on others
  python pipelines/train_heads.py --store store/photos.zarr --layers fc7-relu --heads identity

  # go on with the network's last blocks unfrozen, from rows of relu_5_1 if they are cached, else from the photographs
  python pipelines/train_heads.py --store store/photos.zarr --trials photos_trials.csv --layers fc7-relu --heads conv \
      --finetune-from relu_5_1 --weights vgg_face.pth
  python pipelines/cache_layers.py --layers fc7-relu --images photos --store store/photos.zarr --weights store/runs/NAME

  # are two layers different? the same trials, head by head
  python pipelines/train_heads.py --compare maxp_5_3 fc7-relu

  # what would be trained? what does a head look like?
  python pipelines/train_heads.py --layers maxp_5_3 --heads conv --dry-run
  python pipelines/train_heads.py --layers fc7-relu --heads conv --draw store/conv.svg

Run it again after an interruption: finished runs are read, unfinished ones are resumed to the same result.
"""


def _complete_layers(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from featurestore import FeatureStore, FeatureStoreError

    try:
        store = FeatureStore.open(ctx.params.get("store") or DEMO_STORE)
    except (FeatureStoreError, OSError):
        return []
    names = {name for source in store.sources.values() for name in source.layers}
    return [CompletionItem(name) for name in sorted(names) if name.startswith(incomplete)]


def _complete_heads(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=note) for name, note in HEADS.items() if name.startswith(incomplete)]


def _complete_compared(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    runs = sorted(path.parent.name for path in Path(ctx.params.get("out") or DEFAULT_OUT).glob("*/result.json"))
    return [CompletionItem(name) for name in runs if name.startswith(incomplete)]


@click.command(cls=Command, epilog=EPILOG)
@click.option(
    "--layers", multiple=True, metavar="NAME …", shell_complete=_complete_layers, help="Cached layers. [default: all]"
)
@click.option(
    "--heads",
    multiple=True,
    metavar="NAME …",
    default=("conv", "similarity"),
    shell_complete=_complete_heads,
    help=f"Any of {', '.join(HEADS)}. zero-shot is always added to triplet heads. [default: conv similarity]",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    default=DEMO_STORE,
    show_default=True,
    help="A store made by pipelines/cache_layers.py.",
)
@click.option("--source", metavar="NAME", help="Which source of the store, if it holds several.")
@click.option(
    "--trials",
    metavar="FILE|same-person",
    help="CSV or Parquet with face_1, face_2, face_3, odd (or head1 … head_odd), or same-person to make "
    "trials from the keys. [default for the demo store: its own]",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="At faulty trials: stop and list them, or leave them out and keep them as a CSV in --out.",
)
@click.option(
    "--n-trials", type=click.IntRange(1), default=5000, show_default=True, help="How many same-person trials to make."
)
@click.option(
    "--where",
    multiple=True,
    type=Expression(),
    metavar="EXPR …",
    help='Conditions on columns of trials or items, e.g. "yaw <= 30".',
)
@click.option("--view", metavar="NAME", help="The view that was shown, for trials that do not say.")
@click.option(
    "--session-view", multiple=True, type=Pairs(), metavar="SESSION=VIEW …", help="The view shown in each session."
)
@click.option(
    "--session-source",
    multiple=True,
    type=Pairs(),
    metavar="SESSION=SOURCE …",
    help="The source of each session's items.",
)
@click.option(
    "--split",
    metavar="trial|face|view|FILE",
    help="What training and test trials do not share, or the file of a saved split. [default: trial; view for identity]",
)
@click.option(
    "--split-seed",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Seed of the split, independent of --seeds.",
)
@click.option(
    "--fractions",
    nargs=3,
    type=float,
    default=(0.70, 0.15, 0.15),
    show_default=True,
    help="Shares of training, validation and test.",
)
@click.option(
    "--folds",
    type=click.IntRange(2),
    metavar="K",
    help="Train each head K times, so that every face (view, triplet) is tested once, and pool the answers.",
)
@click.option(
    "--hold-out",
    multiple=True,
    metavar="NAME …",
    help="Faces or views to test on, instead of drawing them. A comma within a name is written \\,",
)
@click.option(
    "--lr",
    multiple=True,
    type=Finite(zero=False),
    default=(5e-4,),
    metavar="RATE …",
    help="Learning rates of Adam. [default: 5e-4]",
)
@click.option(
    "--seeds",
    multiple=True,
    type=click.IntRange(0, 2**31 - 1),
    default=(0,),
    metavar="N …",
    help="Seeds of initial weights and of the order of trials. [default: 0]",
)
@click.option(
    "--batch-size", type=click.IntRange(1), default=256, show_default=True, help="Trials in one training step."
)
@click.option("--epochs", type=click.IntRange(1), default=100, show_default=True, help="Largest number of epochs.")
@click.option(
    "--patience",
    type=click.IntRange(1),
    default=10,
    show_default=True,
    help="Stop after so many epochs without a lower validation loss.",
)
@click.option(
    "--order",
    type=click.Choice(["random", "blocks"]),
    default="random",
    show_default=True,
    help="Of an epoch's examples. blocks: from eight stretches of 256 items at a time, for disks that are slow at random reads.",
)
@click.option("--permute", is_flag=True, help="Show the three faces of each trial in a new order every epoch.")
@click.option(
    "--parallel-bridge", is_flag=True, help="conv, fc: one bridge for each of the three places, not a shared one."
)
@click.option(
    "--rank",
    type=Rank(),
    default=64,
    show_default=True,
    help="similarity: rank of the map's difference from the identity, or full.",
)
@click.option(
    "--measure",
    type=click.Choice(["cosine", "dot"]),
    default="cosine",
    show_default=True,
    help="similarity, zero-shot: how two faces are compared.",
)
@click.option(
    "--l2",
    "--pull",
    "l2",
    type=Finite(zero=True),
    default=1e-2,
    show_default=True,
    help="similarity: L2 penalty on the map's difference from the identity. --pull is its earlier name.",
)
@click.option(
    "--finetune-from",
    metavar="LAYER|input",
    help="Then go on with each head and the network from this layer to the head's, or all of it: its weights are trained too.",
)
@click.option(
    "--backbone-lr",
    type=Finite(zero=False),
    metavar="RATE",
    help="With --finetune-from: learning rate of the network's part. [default: a tenth of --lr]",
)
@click.option(
    "--augment",
    type=click.Choice(["flip"]),
    default=None,
    help="With --finetune-from: mirror training photographs at random, anew each epoch. [default: as they are]",
)
@click.option(
    "--weights",
    metavar="FILE",
    help="With --finetune-from: the network's weights, if the store's layers were made with a file.",
)
@click.option(
    "--backbone",
    metavar="NAME",
    help="With --finetune-from: the store's network is my_module:build_model, whose code may be run.",
)
@click.option(
    "--device",
    type=Device(),
    default="auto",
    show_default=True,
    help="Device that heads are trained on.",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "tf32", "bf16"]),
    default="auto",
    show_default=True,
    help="Of the bridge's matrix products in training. auto: as such runs in --out, else bf16 where the device is fast at it, "
    "else fp32; tf32 needs a GPU.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Runs trained at the same time. [default: 1 for large heads, else one for each core]",
)
@click.option(
    "--scheduler",
    default="processes",
    show_default=True,
    metavar="threads|processes|ADDRESS",
    help="How a grid runs in parallel: on this machine, or on a Dask cluster that sees the same files.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_OUT,
    show_default=True,
    help="Folder that the runs are written to.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option(
    "--compare",
    multiple=True,
    metavar="A B …",
    shell_complete=_complete_compared,
    help="Test finished runs of --out against each other on the same trials, in pairs, and stop: names of runs, layers, or "
    "LAYER:HEAD.",
)
@click.option(
    "--draw",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Print a summary of the first head, draw it as .svg or .png, and stop.",
)
def main(
    jobs: int | None, scheduler: str, dry_run: bool, draw: Path | None, compare: tuple[str, ...], **options: Any
) -> None:
    """Train heads on cached layers and print a table of them; the backbone stays as it is, unless --finetune-from is given."""
    if compare:
        _compare(options["out"], compare)
        return
    request = _request(**options)
    from featurestore.memory import give_back_memory
    from heads.grid import plan_grid
    from heads.schedule import default_jobs, run_grid, share_threads

    grid = plan_grid(request)
    if draw:
        _draw(grid, draw)
        return
    jobs = jobs or default_jobs(grid)
    kept = kept_memory(options["device"])
    click.echo(f"Plan{' (nothing is run)' if dry_run else ''}\n{as_typed(plan_text(grid, jobs, kept))}\n")
    if dry_run:
        return
    grid.refuse_if_full(jobs)
    _keep_faulty(grid)
    failed: list[tuple[Run, FeatureStoreError]] = []
    with progress_bar(grid.runs, "training", " runs", alike=False) as bar:
        say = (
            bar.write if sys.stderr.isatty() else click.echo
        )  # a bar is redrawn around each line, which a log need not see

        def seen(label: str, line: "Progress") -> None:
            say(progress_text(label, line))

        def died(run: "Run") -> None:
            say(
                f"{run.label} | its worker process died; it is tried again from its last saved state, four times at most"
            )

        def done(run: "Run", result: "dict[str, Any] | FeatureStoreError") -> None:
            if isinstance(result, dict):
                say(f"{run.label}: {accuracy_text(result)}")
            else:
                failed.append((run, result))
            give_back_memory()
            bar.update()

        run_grid(share_threads(grid.parts, jobs), grid.out, jobs, scheduler, seen, done, died)
    _report(grid)
    if failed:
        click.echo(f"\n{len(failed)} runs failed:", err=True)
        for run, error in failed:
            click.echo(f"  {run.label}: {as_typed(str(error))}", err=True)
        click.get_current_context().exit(1)


def _request(
    store: Path,
    out: Path,
    trials: str | None,
    session_view: tuple[tuple[str, str], ...],
    session_source: tuple[tuple[str, str], ...],
    batch_size: int,
    epochs: int,
    patience: int,
    permute: bool,
    order: str,
    precision: str,
    device: str,
    parallel_bridge: bool,
    augment: str | None,
    **rest: Any,
) -> "GridRequest":
    if not store.exists() and store == DEMO_STORE:
        raise click.UsageError(
            f"there is no {DEMO_STORE}. Make the demo store (`make demo`, or pipelines/cache_layers.py --layers maxp_5_3 "
            "fc7-relu), or give --store."
        )
    if trials is None and store == DEMO_STORE:
        trials = str(DEMO_TRIALS)
    if precision == "tf32" and device == "cpu":
        raise click.UsageError("--precision tf32 needs a GPU; on the CPU choose fp32 or bf16.")
    from featurestore.devices import choose_device
    from heads.grid import GridRequest
    from heads.train import Settings
    from heads.trials.matching import Sessions

    chosen = choose_device(device)
    settings = Settings(
        batch_size=batch_size,
        epochs=epochs,
        patience=patience,
        permute=permute,
        order=order,
        precision="fp32" if precision == "auto" else precision,
        device=str(chosen),
    )
    sessions = Sessions(dict(session_view), dict(session_source))
    return GridRequest(
        store=store,
        out=out,
        trials=trials,
        sessions=sessions,
        settings=settings,
        parallel=parallel_bridge,
        augment=augment or "",
        precision="auto" if precision == "auto" else None,
        **rest,
    )


def _keep_faulty(grid: "Grid") -> None:
    if grid.trials is not None and len(grid.trials.faulty):
        from heads.run_files import write_csv

        write_csv(faulty_file(grid), grid.trials.faulty)


def _report(grid: "Grid") -> None:
    from heads.runs_table import write_runs_table

    _, summary = write_runs_table(grid.out)
    names = {run.name(task) for task, runs in grid.parts for run in runs}
    if len(summary):
        summary = summary[[bool(names & set(runs.split())) for runs in summary["runs"]]]
    pooled = {name for runs in summary["runs"] for name in runs.split()} if len(summary) else set()
    if names - pooled:
        click.echo(
            f"\n{len(names - pooled)} runs are of folds whose others are missing, so nothing is pooled; see runs.csv."
        )
    for _, group in summary.groupby("group") if len(summary) else ():
        click.echo(f"\n{group_text(group)}")
    click.echo(
        f"\nSummary: {grid.out / 'summary.csv'}. All runs: {grid.out / 'runs.csv'}. Curves: tensorboard --logdir {grid.out}"
    )


def _compare(out: Path, names: tuple[str, ...]) -> None:
    from heads.comparison import compare
    from heads.run_files import write_csv

    table = compare(out, names)
    write_csv(out / "comparison.csv", table)
    click.echo(f"{comparison_text(table)}\nKept: {out / 'comparison.csv'}")


def _draw(grid: "Grid", path: Path) -> None:
    from featurestore import FeatureStore
    from heads.describe import draw, summary
    from heads.finetuning import unloaded_finetuned_head
    from heads.registry import build_head

    each = [(task, run) for task, runs in grid.parts for run in runs]
    trained = [pair for pair in each if pair[1].head != "zero-shot"]
    task, run = next((pair for pair in trained if pair[1].kind in grid.finetuning), [*trained, *each][0])
    shape = FeatureStore.open(task.store).source(task.sources[0]).layer(run.layer).shape
    faces = {"faces": list(task.classes)} if run.head == "identity" else {}
    head = build_head(run.head, shape, **run.options, **faces)
    if run.kind in grid.finetuning:
        head = unloaded_finetuned_head(grid.finetuning[run.kind].part, head, run.backbone)
    click.echo(summary(head))
    click.echo(f"{run.label} is drawn in {draw(head, path)}.")


if __name__ == "__main__":
    main()
