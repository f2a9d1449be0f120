"""The pass of every network beside its bare forward pass, and what the networks tell of real photographs.

python -m tests.benchmarks.bench_networks                  # everything, about 10 minutes on two cores
python -m tests.benchmarks.bench_networks --only identify  # one section
python -m tests.benchmarks.bench_networks --markdown       # the table as the README shows it
"""

from collections.abc import Callable
from pathlib import Path

import click
import torch

from featurestore import FeatureStore, identification_table
from featurestore.caching.extractor import load_extractor
from featurestore.caching.job import CachingRequest, prepare_job
from featurestore.caching.planning import make_plan
from featurestore.caching.run import cache_layers
from featurestore.checkpoints.weights import open_weights
from featurestore.networks.hooks import HookedNetwork
from featurestore.networks.registry import get_backbone, get_recipe
from featurestore.networks.shapes import with_input_size
from featurestore.photos.keys import find_faces
from featurestore.store.writer import store_lock
from tests.benchmarks.bench_store import BATCH, make_photographs
from tests.benchmarks.measure import Line, compare, rate, run_sections
from tests.conftest import SHARED

# Layers of each network: two on the way and its descriptor, or what stands for one; and photographs for a round of seconds.
NETWORKS = {
    "vggface": (["maxp_5_3", "fc7-relu", "descriptor"], 64),
    "inception_resnet_v1": (["repeat_1", "mixed_7a", "descriptor"], 320),
    "resnet50_ft": (["layer2", "layer4", "descriptor"], 128),
    "senet50_ft": (["layer2", "layer4", "descriptor"], 128),
    "dlib_resnet_v1": (["block3_3", "pooled", "descriptor"], 640),
    "torchvision:convnext_tiny": (["features.3", "features.7", "avgpool"], 128),
    "timm:resnet50": (["layer2", "layer4", "descriptor"], 128),
}
HOOKED = "tests.benchmarks.vision_transformer:build"  # captured by hooks; its bare forward has none
HOOKED_LAYERS, HOOKED_N = ["layers.3", "layers.11", "layernorm"], 128
HOOKED_RECIPE = 'size = 224\nresize = "pil"\nchannels = "RGB"\nmean = 127.5\nscale = 127.5\n'
HELD_OUT = ["8", "9", "10"]
WHOLE = {"dlib_resnet_v1": "dlib-whole"}  # its own recipe needs faces, and made-up photographs have none


def pass_rate(images: Path, store: Path, backbone: str, layers: list[str], recipe: str | None = None) -> float:
    """Images per second of the pass, its network loaded."""
    request = CachingRequest(
        store, find_faces(images), layers, "random:0", backbone=backbone, recipe=recipe, batch_size=BATCH, device="cpu"
    )
    job = prepare_job(request)
    with store_lock(store, "benchmark"):
        summary = cache_layers(job, make_plan(job))
    return summary.computed / summary.seconds


def speed(folder: Path) -> list[Line]:
    """The pass (decode, compute, store) against forward passes alone of the same cut, channels-last network."""
    (folder / "vit.toml").write_text(HOOKED_RECIPE)
    hooked = _speed(folder, HOOKED, HOOKED_LAYERS, HOOKED_N, str(folder / "vit.toml"))
    return [*(_speed(folder, name, layers, n, WHOLE.get(name)) for name, (layers, n) in NETWORKS.items()), hooked]


def _speed(folder: Path, name: str, layers: list[str], n: int, recipe: str | None = None) -> Line:
    images = make_photographs(folder / f"photographs-{n}", n)
    spec = get_backbone(name)
    size = (get_recipe(recipe) if recipe else spec.default_recipe()).size
    spec = with_input_size(spec, size)
    cut = load_extractor(spec, layers, open_weights("random:0", spec), torch.device("cpu"), torch.float32)
    if isinstance(cut, HookedNetwork):
        cut = cut.network
    inputs = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
    rounds = iter(range(10**9))

    def ours() -> float:
        return pass_rate(images, folder / f"{name.replace(':', '-')}-{next(rounds)}.zarr", name, layers, recipe)

    def bare() -> float:
        with torch.inference_mode():
            return rate(lambda: cut(inputs), BATCH, n // BATCH)

    return compare(f"the pass of {name}, 3 layers, against its bare forward loop", ours, bare, 0.95, "images/s", 3)


def identify(folder: Path) -> list[Line]:
    """The ORL photographs through all networks into one store; who is it, by nearest neighbour on held-out views?"""
    photographs = SHARED / "data" / "orl_faces"
    if not photographs.is_dir():
        click.echo("left out: the ORL photographs (shared/data/orl_faces) are not on this machine", err=True)
        return []
    store = folder / "all.zarr"
    for name, (layers, _) in NETWORKS.items():
        pass_rate(photographs, store, name, layers)
    table = identification_table(FeatureStore.open(store), HELD_OUT)
    return [
        Line(
            f"{row.backbone}, {row.layer}: who is it, of 40, by nearest neighbour ({row.weights})",
            f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]",
            f"chance {row.chance:.3f}",
            row.accuracy / row.chance,
            "above chance",
            row.low > row.chance,
        )
        for row in table.itertuples()
    ]


SECTIONS: dict[str, Callable[[Path], list[Line]]] = {"speed": speed, "identify": identify}


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="Only these sections.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
def main(only: tuple[str, ...], markdown: bool) -> None:
    """Compare each network's pass with its bare forward loop; nothing is asserted."""
    run_sections(SECTIONS, only, markdown)


if __name__ == "__main__":
    main()
