"""Convert a checkpoint of any known format to safetensors with its origin."""

from pathlib import Path

import click

from pipelines._cli import Command, complete_backbones

EPILOG = r"""
Examples:

  python pipelines/convert_weights.py VGG_FACE.t7
  python pipelines/convert_weights.py packaged --backbone dlib_resnet_v1
  python pipelines/convert_weights.py resnet50_ft_weight.pkl --backbone resnet50_ft --out weights/resnet50_ft.safetensors

The file is recognised by its content; `packaged` stands for that of an installed Python package.
Its origin, sha256 and licence are written into the new one.
"""


@click.command(cls=Command, epilog=EPILOG)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--backbone",
    shell_complete=complete_backbones,
    metavar="NAME",
    help="The network it belongs to. [default: the one that it fits]",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="[default: FILE with the ending .safetensors, here for `packaged`]",
)
@click.option("--overwrite", is_flag=True, help="Replace --out if it is there.")
def main(file: Path, backbone: str | None, out: Path | None, overwrite: bool) -> None:
    """Read the checkpoint FILE (.pth, LuaTorch .t7, HDF5, VGGFace2 .pkl, dlib .dat …) and write it as .safetensors."""
    from featurestore.checkpoints.convert import convert, recognise
    from featurestore.checkpoints.packaged import PACKAGED, packaged_file
    from featurestore.networks.registry import get_backbone

    target = out or file.with_suffix(".safetensors")
    if str(file) == PACKAGED:
        if backbone is None:
            raise click.UsageError(
                f"{PACKAGED} needs the network whose weights are meant, such as --backbone dlib_resnet_v1."
            )
        file = packaged_file(get_backbone(backbone))
        target = out or Path(file.with_suffix(".safetensors").name)
    fitting = [backbone] if backbone else recognise(file)
    spec = get_backbone(fitting[0])
    weights = convert(file, spec, target, overwrite)
    click.echo(f"{target}: {len(weights.keys)} tensors of {' or '.join(fitting)}, read as {weights.layout}")
    if weights.absent:
        click.echo(
            f"  {len(weights.absent)} keys of the network's end are not in it: {', '.join(sorted(weights.absent))}"
        )
    for note in weights.notes:
        click.echo(f"  note: {note}")
    click.echo(f"  sha256 of {file.name}: {weights.identity}\n  {spec.licence}")


if __name__ == "__main__":
    main()
