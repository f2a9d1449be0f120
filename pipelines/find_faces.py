"""Find the face in each photograph: its box and five landmarks, as a table."""

from pathlib import Path

import click

from pipelines._cli import Command, asked_cluster, note_left_out, progress_bar, scheduler_option, tasks_of

SOME_MISSED = 3  # exit status; 1 is an error, after which there is no table

EPILOG = r"""
Examples:

  python pipelines/find_faces.py photos --out faces.csv

  # then: faces upright by their landmarks (dlib-chip), or cut to their boxes
  python pipelines/cache_layers.py --layers descriptor --images faces.csv --backbone dlib_resnet_v1 --weights packaged
  python pipelines/cache_layers.py --layers fc7-relu --images faces.csv --boxes faces.csv --weights vgg_face.pth

  # photographs of several people
  python pipelines/find_faces.py photos --out faces.csv --several all

  # many photographs, searched by the workers of a Dask cluster
  python pipelines/find_faces.py photos --out faces.csv --scheduler tcp://127.0.0.1:8786

Run it again with more photographs, or after an interruption: faces of unchanged photographs are taken from the table.
Exit status: 0 if a face was found in every photograph, 3 if the table lacks some, which are listed.
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("images", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("faces.csv"),
    show_default=True,
    help="Table to write: face_id, view, path, box, landmarks.",
)
@click.option(
    "--sheet",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Contact sheet (PNG) of the faces. [default: as --out, ending in .png]",
)
@click.option(
    "--several",
    type=click.Choice(["largest", "all", "stop"]),
    default="largest",
    show_default=True,
    help="Of several faces in a photograph: take the largest; all, each as a view of its own; or stop.",
)
@click.option(
    "--pattern",
    metavar="REGEX",
    help="How keys are read from paths: a regular expression with groups face and view, or `folders`, `heads`.",
)
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    metavar="N",
    help="Photographs of more pixels count as ones that cannot be read. [default: 102 million; of WebP half]",
)
@scheduler_option
def main(
    images: Path,
    out: Path,
    sheet: Path | None,
    several: str,
    pattern: str | None,
    max_pixels: int | None,
    scheduler: str | None,
) -> None:
    """Find the face in each photograph of IMAGES, a folder or a CSV with face_id, view, path."""
    from featurestore.photos import detection
    from featurestore.photos.keys import find_faces

    photographs = find_faces(images, pattern)
    with (
        asked_cluster(scheduler) as client,
        progress_bar(len(photographs.table), "finding faces", " photographs") as bar,
    ):
        found = detection.detect_faces(
            photographs,
            several,  # type: ignore[arg-type]
            out,
            save=out,
            progress=bar.update,
            max_pixels=max_pixels,
            **tasks_of(client),
        )
    table = found.faces.table
    click.echo(f"{detection.note(found, len(photographs.table))}.\nTable: {out}")
    if found.interrupted:
        click.echo("Stopped. Run the same command again to go on.")
        click.get_current_context().exit(130)
    if len(table):
        sheet = sheet or out.with_suffix(".png")
        shown = detection.write_sheet(table, sheet)
        click.echo(f"Contact sheet: {sheet}" + (f", {shown} of {len(table)} faces" if shown < len(table) else ""))
    note_left_out(photographs.left_out, "left out, because they do not match --pattern")
    note_left_out(found.several, f"found to show several faces, of which {several} were taken")
    note_left_out(found.missed, "left out of the table")
    if found.missed:
        click.get_current_context().exit(SOME_MISSED)


if __name__ == "__main__":
    main()
