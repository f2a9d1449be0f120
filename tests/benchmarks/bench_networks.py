"""The pass of every network beside its bare forward pass, and beside what two cores that do everything allow.

python -m tests.benchmarks.bench_networks --markdown   # about 20 minutes on two cores
"""

import math
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch

from featurestore.caching.extractor import load_extractor
from featurestore.caching.job import CachingJob, CachingRequest, prepare_job
from featurestore.caching.planning import make_plan
from featurestore.caching.run import cache_layers, photos_to_append
from featurestore.caching.stream import decoding_threads
from featurestore.checkpoints.weights import open_weights
from featurestore.networks.hooks import HookedNetwork
from featurestore.photos.keys import find_faces
from featurestore.photos.loading import batches
from featurestore.store.lock import store_lock
from featurestore.store.writer import SourceWriter
from tests.benchmarks.bench_store import BATCH, make_photographs
from tests.benchmarks.measure import Line, compare, rate, run_sections, section_options

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
WHOLE = {"dlib_resnet_v1": "dlib-whole"}  # its own recipe needs faces, and made-up photographs have none


def request_for(images: Path, store: Path, backbone: str, layers: list[str], recipe: str | None) -> CachingRequest:
    """With seeded weights, on the CPU."""
    return CachingRequest(
        store, find_faces(images), layers, "random:0", backbone=backbone, recipe=recipe, batch_size=BATCH, device="cpu"
    )


def pass_rate(images: Path, store: Path, backbone: str, layers: list[str], recipe: str | None = None) -> float:
    """Images per second of the pass, its network loaded."""
    job = prepare_job(request_for(images, store, backbone, layers, recipe))
    with store_lock(store, "benchmark"):
        summary = cache_layers(job, make_plan(job))
    return summary.computed / summary.seconds


def speed(folder: Path) -> list[Line]:
    """The pass (decode, compute, store) against forward passes alone, and against what shared cores allow."""
    (folder / "vit.toml").write_text(HOOKED_RECIPE)
    hooked = _speed(folder, HOOKED, HOOKED_LAYERS, HOOKED_N, str(folder / "vit.toml"))
    lines = [
        line for name, (layers, n) in NETWORKS.items() for line in _speed(folder, name, layers, n, WHOLE.get(name))
    ]
    return lines + hooked


def _speed(folder: Path, name: str, layers: list[str], n: int, recipe: str | None = None) -> list[Line]:
    """Beside the forward loop of the same cut, channels-last network; and beside decoding, forward and writing each alone, their
    times added: the limit where the same cores do all three."""
    images = make_photographs(folder / f"photographs-{n}", n)
    job = prepare_job(request_for(images, folder / "alone.zarr", name, layers, recipe))
    cut = load_extractor(job.spec, layers, open_weights("random:0", job.spec), torch.device("cpu"), torch.float32)
    if isinstance(cut, HookedNetwork):
        cut = cut.network
    size = job.recipe.size
    inputs = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
    rounds = iter(range(10**9))

    def ours() -> float:
        return pass_rate(images, folder / f"{name.replace(':', '-')}-{next(rounds)}.zarr", name, layers, recipe)

    def bare() -> float:
        with torch.inference_mode():
            return rate(lambda: cut(inputs), BATCH, n // BATCH)

    def limit() -> float:
        alone = bare(), rate(lambda: _decode(job), n), rate(lambda: _write(job, n), n)
        return 1 / sum(1 / each for each in alone)

    what = f"the pass of {name}, 3 layers, against"
    return [
        compare(f"{what} its bare forward loop", ours, bare, 0.95, "images/s", 3),
        compare(f"{what} forward, decoding and writing added", ours, limit, 0.95, "images/s", 3),
    ]


def _decode(job: CachingJob) -> None:
    photos = photos_to_append(job, make_plan(job))
    threads, slots = decoding_threads(job), len(photos)
    for _ in batches(photos, job.recipe, slots=slots, next_row=0, batch_size=BATCH, workers=threads, skip=False):
        pass


def _write(job: CachingJob, n: int) -> None:
    """``n`` rows of every layer, as shards that are flushed to disk."""
    with TemporaryDirectory(dir=job.request.store.parent) as folder:
        writer = SourceWriter(Path(folder) / "s.zarr", "bench", {})
        for name in job.layers:
            shape = job.shapes[name]
            writer.add_layer(name, shape, "float32", "none", n)
            rows = np.zeros((BATCH, math.prod(shape)), np.float32)
            shard = writer.open_shard(name, 0, end=n)
            for first in range(0, n, BATCH):
                shard.write(range(first, min(first + BATCH, n)), rows[: min(BATCH, n - first)])
            shard.commit()


SECTIONS: dict[str, Callable[[Path], list[Line]]] = {"speed": speed}


@click.command()
@section_options(SECTIONS)
def main(only: tuple[str, ...], markdown: bool) -> None:
    """Compare each network's pass with its bare forward loop; nothing is asserted."""
    run_sections(SECTIONS, only, markdown)


if __name__ == "__main__":
    main()
