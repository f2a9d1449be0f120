"""Explain a head's choices: which pixels of the photographs they depend on, whether that is true, and in which facial regions."""

# heads, featurestore and torch are imported inside the functions that need them: --help and tab completion stay instant.
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from heads.explain.names import METHODS
from pipelines._cli import Command, asked_cluster, kept_memory, progress_bar, scheduler_option, tasks_of
from pipelines._params import Device, Expression

if TYPE_CHECKING:
    import pandas as pd
    from distributed import Client

    from heads.explain.archive import Archive
    from heads.explain.job import ExplainPlan
    from heads.explain.regions import RegionsOf

DEFAULT_RUNS, DEFAULT_OUT = Path("store/runs"), Path("store/explanations")
EPILOG = r"""
Examples:

  # 50 of the trials that a head was tested on, by two methods
  python pipelines/explain_heads.py --run fc7-relu-similarity-lr0.0005-seed0-1a2b3c4d --method lrp grad-cam

  # what would that cost? Nothing is written
  python pipelines/explain_heads.py --run NAME --method integrated-gradients --n 200 --dry-run

  # many trials, explained by the workers of a Dask cluster
  python pipelines/explain_heads.py --run NAME --n 2000 --scheduler tcp://127.0.0.1:8786

  # by facial region, from the landmarks of pipelines/find_faces.py or from a mask of your own
  python pipelines/explain_heads.py --run NAME --landmarks store/photos_faces.csv
  python pipelines/explain_heads.py --run NAME --mask regions.png --mask-names regions.csv

  # photographs for the next experiment: the most relevant tenth hidden, and a random tenth
  python pipelines/explain_heads.py --run NAME --method lrp --export-masked store/masked

  # two heads or layers, region by region, on the same trials
  python pipelines/explain_heads.py --compare store/explanations/A store/explanations/B

Run it again after an interruption, or with more methods: maps that are there are not computed again.
"""


def _complete_runs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    found = sorted(path.parent.name for path in Path(ctx.params.get("runs") or DEFAULT_RUNS).glob("*/result.json"))
    return [CompletionItem(name) for name in found if name.startswith(incomplete)]


def _complete_methods(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name, help=note) for name, note in METHODS.items() if name.startswith(incomplete)]


@click.command(cls=Command, epilog=EPILOG)
@click.option("--run", metavar="NAME", shell_complete=_complete_runs, help="A finished run of --runs, or its folder.")
@click.option(
    "--runs",
    type=click.Path(path_type=Path, file_okay=False),
    default=DEFAULT_RUNS,
    show_default=True,
    help="Folder of runs.",
)
@click.option(
    "--method",
    "methods",
    multiple=True,
    default=("grad-cam", "lrp"),
    metavar="NAME …",
    shell_complete=_complete_methods,
    help=f"Any of {', '.join(METHODS)}. [default: grad-cam lrp]",
)
@click.option(
    "--trials",
    default="test",
    show_default=True,
    metavar="test|FILE",
    help="Those that the run was tested on, or a file.",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="At faulty trials of a file: stop and list them, or leave them out.",
)
@click.option("--n", type=click.IntRange(1), default=50, show_default=True, help="How many of them, drawn by --seed.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the trials drawn.")
@click.option(
    "--where",
    multiple=True,
    type=Expression(),
    metavar="EXPR …",
    help='Conditions on columns of the trials, e.g. "correct".',
)
@click.option(
    "--explain",
    "explained",
    type=click.Choice(["margin", "logit"]),
    default="margin",
    show_default=True,
    help="The choice's logit, or its margin over the runner-up.",
)
@click.option("--head-only", is_flag=True, help="Explain the head's choice alone, not the answer where that differs.")
@click.option("--maps", metavar="LAYER", help="Layer whose maps Grad-CAM weights. [default: the last of 5 × 5 places]")
@click.option(
    "--steps", type=click.IntRange(2), default=64, show_default=True, help="integrated-gradients: points on the path."
)
@click.option("--no-checks", is_flag=True, help="Leave deletion, insertion and shuffled weights out.")
@click.option("--store", type=click.Path(path_type=Path), help="Where the store is now, if it was moved.")
@click.option("--weights", metavar="FILE", help="The network's weights, for a source that was made from a file.")
@click.option("--backbone", metavar="NAME", help="A network of your own that may be imported, my_module:build_model.")
@click.option("--device", type=Device(), default="auto", show_default=True, help="Device that the network runs on.")
@click.option(
    "--landmarks",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="CSV of pipelines/find_faces.py, for regions of the face. [default: the source's own landmarks, if it has some]",
)
@click.option(
    "--mask",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="PNG of regions, or a CSV face_id,view,mask.",
)
@click.option(
    "--mask-names",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="CSV of the mask's regions: label,name or colour,name.",
)
@click.option("--figures", type=click.IntRange(0), default=6, show_default=True, help="How many trials are drawn.")
@click.option(
    "--export-masked",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help="Write photographs with the most relevant parts hidden, by the first method, and with as many random ones.",
)
@click.option(
    "--hide",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the area that --export-masked hides.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help=f"Folder of the results. [default: {DEFAULT_OUT}/NAME; with --compare the first one]",
)
@click.option(
    "--compare",
    multiple=True,
    type=click.Path(path_type=Path, file_okay=False),
    metavar="A B …",
    help="Compare the regions of explained runs, folders of --out, on the trials that they share, and stop.",
)
@scheduler_option
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
def main(
    run: str | None,
    runs: Path,
    out: Path | None,
    no_checks: bool,
    head_only: bool,
    landmarks: Path | None,
    mask: Path | None,
    mask_names: Path | None,
    figures: int,
    export_masked: Path | None,
    hide: float,
    compare: tuple[Path, ...],
    scheduler: str | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Explain a trained head's choices by attribution maps of the photographs, with checks of whether they are true."""
    given = landmarks, mask, mask_names
    if (mask is None) != (mask_names is None):
        raise click.UsageError("--mask needs --mask-names, which says what its regions are called, and the reverse.")
    if compare:
        _compare(compare, options["store"], given, out or compare[0])
        return
    if run is None:
        raise click.UsageError("say which run is explained: --run NAME, a folder of --runs (tab completes it).")
    from featurestore.figures import check_ending
    from heads.explain.job import ExplainRequest, plan_explanation

    if figures:
        check_ending("figure.png")
    folder = Path(run) if Path(run).is_dir() else runs / run
    request = ExplainRequest(folder, persons=not head_only, checks=not no_checks, **options)
    kept = kept_memory(options["device"])
    plan = plan_explanation(request)
    out = out or DEFAULT_OUT / folder.name
    click.echo(f"Plan{' (nothing is run)' if dry_run else ''}\n{_plan_text(plan, out, kept)}\n")
    if dry_run:
        return
    plan.refuse_if_full(out)
    if export_masked and len(plan.legs) > 1:
        raise click.UsageError("--export-masked is for trials of one source; choose them with --where.")
    regions_of = _regions(plan, given)
    with asked_cluster(scheduler, packages=("featurestore", "heads")) as client:
        archive = _explain(plan, out, client)
    _report(plan, archive, out, regions_of)
    if figures:
        _draw(plan, out, min(figures, len(plan)))
    if export_masked:
        from heads.explain.archive import open_maps
        from heads.explain.stimuli import export_masked as export

        table = export(open_maps(out), plan.methods[0].name, plan.any_legs.source, export_masked, share=hide)
        click.echo(f"{len(table)} photographs: {export_masked}, listed in {export_masked / 'masked.csv'}")


def _plan_text(plan: "ExplainPlan", out: Path, kept: str) -> str:
    from featurestore.text import human_bytes, human_duration

    legs, about, tuned = plan.any_legs, plan.attributes, plan.config.get("settings", {}).get("finetune_from")
    other = " and of the answer where it differs" if plan.request.persons else ""
    lines = [
        f"run        {plan.request.run.name}: {about['head']} on {about['layer']}",
        f"network    {legs.weights.backbone.name}, weights {about['weights']}, recipe {legs.recipe.name}"
        + (f"; fine-tuned from {tuned}" if tuned else ""),
        f"trials     {len(plan)} of {plan.request.trials}, {plan.photographs} photographs",
        f"explained  the {plan.request.explained} of the head's choice{other}",
        f"methods    {', '.join(method.name for method in plan.methods)}"
        + (f"; maps of {legs.maps}" if any(method.needs == "maps" for method in plan.methods) else ""),
        f"checks     {'deletion, insertion, shuffled weights' if plan.request.checks else 'none'}",
        f"takes      about {human_duration(plan.seconds)}, up to {human_bytes(plan.maps_bytes)} in {out}",
        *([f"buffers    {kept}"] if kept else []),
    ]
    return "\n".join(f"  {line}" for line in lines)


def _explain(plan: "ExplainPlan", out: Path, client: "Client | None") -> "Archive":
    from featurestore.memory import give_back_memory
    from heads.explain.run import explain

    with progress_bar(plan.photographs, "comparing with cached rows", " photographs") as compared:
        plan.check(compared.update)
    with progress_bar(len(plan), "explaining", " trials") as explained:
        archive = explain(plan, out, explained.update, **tasks_of(client))
    give_back_memory()
    return archive


def _regions(plan: "ExplainPlan", given: tuple[Path | None, ...]) -> "RegionsOf | None":
    """Of the source of all trials; None where nothing says where regions are."""
    from heads.explain.regions import find_regions

    if len(plan.legs) > 1:
        return None
    regions_of = find_regions(plan.any_legs.source, *given)
    if regions_of is not None:
        for face, view in {key for keys in plan.keys for key in keys}:
            regions_of(face, view)  # what does not fit is said before hours of computing
    return regions_of


def _report(plan: "ExplainPlan", archive: "Archive", out: Path, regions_of: "RegionsOf | None") -> None:
    """Tables of the checks and of the regions: on the screen, and as CSV."""
    from heads.explain import run as steps
    from heads.run_files import write_csv

    kept = []

    def keep(name: str, table: "pd.DataFrame", title: str, told: "pd.DataFrame | None" = None) -> None:
        write_csv(out / f"{name}.csv", table)
        kept.append(f"{name}.csv")
        click.echo(f"\n{title}\n{_as_text(table if told is None else told)}")

    complete = steps.completeness(plan, archive)
    if len(complete):
        keep(
            "completeness",
            complete,
            "Sum of relevance: by which share it is off what is explained (median), and share of trials within 1 %",
        )
    if plan.request.checks:
        write_csv(out / "curves.csv", steps.curve_table(plan, archive))
        kept.append("curves.csv")
        tests = steps.curve_tests(plan, archive)
        keep(
            "deletion",
            tests,
            "Mean margin with the relevant hidden (deletion) or shown (insertion), less that of other orders",
        )
        with progress_bar(None, "shuffling weights", " stages") as bar:
            shuffled = steps.shuffled_table(plan, bar.update)
        keep("shuffled", shuffled, "Rank correlation with the maps of shuffled weights, mean of n trials")
        for method in sorted(set(shuffled.loc[~shuffled["explains"], "method"])):
            click.echo(f"{method} does not explain the network: its maps hardly change when the weights are shuffled.")
    if regions_of is not None:
        from heads.explain.archive import open_maps
        from heads.explain.regions import region_table

        regions = region_table(open_maps(out), regions_of)
        head = regions[regions["choice"] == "head"]
        told = head[["method", "region", "n", "share", "share_low", "share_high", "area", "density"]]
        keep("regions", regions, "Share of relevance by region, with intervals over faces", told)
        write_csv(out / "regions_by_view.csv", region_table(open_maps(out), regions_of, by="view"))
        kept.append("regions_by_view.csv")
    else:
        why = "the source has no landmarks" if len(plan.legs) == 1 else "the trials are of several sources"
        click.echo(
            f"\nNo regions: {why}. They come from --landmarks (pipelines/find_faces.py) or --mask, and of one source."
        )
    click.echo(f"\nKept in {out}: maps.zarr, {', '.join(kept)}")


def _as_text(table: "pd.DataFrame") -> str:
    return str(table.to_string(index=False, na_rep="", float_format=lambda value: f"{value:.3g}"))


def _draw(plan: "ExplainPlan", out: Path, n: int) -> None:
    from heads.explain.drawing import draw_explanation

    paths = draw_explanation(plan, out, n)
    click.echo(f"Figures: {', '.join(str(path.relative_to(out)) for path in paths)}")


def _compare(folders: tuple[Path, ...], store: Path | None, given: tuple[Path | None, ...], out: Path) -> None:
    from featurestore import FeatureStore
    from heads.explain.archive import open_maps
    from heads.explain.regions import compare_regions, find_regions
    from heads.run_files import write_csv

    alike = len({folder.name for folder in folders}) < len(folders)
    runs = {str(folder) if alike else folder.name: open_maps(folder) for folder in folders}
    regions = {}
    for name, maps in runs.items():
        source = FeatureStore.open(store or maps.attrs["store"]).source(maps.attrs["sources"][0])
        found = find_regions(source, *given)
        if found is None:
            raise click.UsageError(f"{name} is of a source without landmarks: give --landmarks or --mask.")
        regions[name] = found
    table, differences = compare_regions(runs, regions)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "compared_regions.csv", table)
    write_csv(out / "compared_differences.csv", differences)
    click.echo(_as_text(differences[differences["choice"] == "head"].drop(columns="choice")))
    click.echo(f"Kept in {out}: compared_regions.csv, compared_differences.csv")


if __name__ == "__main__":
    main()
