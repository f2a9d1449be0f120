"""What an explanation costs, beside bare passes of the same network, and what it holds in memory.

python -m tests.benchmarks.bench_explain                 # everything, about 10 minutes on two cores
python -m tests.benchmarks.bench_explain --only speed    # one section
python -m tests.benchmarks.bench_explain --markdown      # the table as docs/benchmarks.md shows it
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from featurestore import FeatureStore
from featurestore.demo.dataset import make_faces
from featurestore.text import human_bytes
from heads.explain.job import ExplainRequest, plan_explanation
from heads.explain.methods import METHODS, Trial
from heads.explain.run import explain
from heads.legs import Legs
from heads.registry import draw_head
from tests.benchmarks.measure import (
    ROOT,
    Line,
    compare,
    in_fresh_process,
    peak_anonymous,
    rate,
    run_sections,
    section_options,
)

_WANTED = {"grad-cam": 1.2, "lrp": 2.0}  # times three bare passes forward and backward
_TRIALS = (100, 1000)


def command(script: str, *arguments: object) -> None:
    """One of the commands, in a process of its own."""
    line = [sys.executable, str(ROOT / "pipelines" / f"{script}.py"), *map(str, arguments)]
    subprocess.run(line, check=True, capture_output=True, cwd=ROOT)


def speed(folder: Path) -> list[Line]:
    """Triplets/s on VGG-Face (seeded weights) with a conv head on maxp_5_3, against the network alone on its photographs."""
    make_faces(folder / "faces", 3, 1, n_trials=10)
    command(
        *("cache_layers", "--images", folder / "faces" / "faces.csv", "--store", folder / "vgg.zarr"),
        *("--layers", "maxp_5_3", "--weights", "random:0"),
    )
    source = FeatureStore.open(folder / "vgg.zarr").source()
    legs = Legs(source, draw_head("conv", source.layer("maxp_5_3").shape, 0), "maxp_5_3")
    trial = Trial(legs, legs.pixels(np.arange(3)), 0)
    photographs = trial.inputs()[0].detach().split(1)

    def bare() -> None:
        for photograph in photographs:
            leaf = photograph.clone().requires_grad_()
            legs.backbone(leaf)["maxp_5_3"].sum().backward()

    def ours(name: str) -> Callable[[], float]:
        return lambda: rate(lambda: METHODS[name].function(trial), 1)

    return [
        compare(
            f"{name} of a triplet, VGG-Face with a conv head, against three bare passes forward and backward",
            ours(name), lambda: rate(bare, 1), 1 / times, "/s", rounds=7,
        )
        for name, times in _WANTED.items()
    ]  # fmt: skip


def memory(folder: Path) -> list[Line]:
    """Peak anonymous memory of explaining 1,000 trials against 100, each in a fresh process."""
    make_faces(folder / "faces", 20, 4, n_trials=10)
    command(
        *(
            "cache_layers",
            "--images",
            folder / "faces" / "faces.csv",
            "--store",
            folder / "dlib.zarr",
            "--layers",
            "block4_3",
        ),
        *("--backbone", "dlib_resnet_v1", "--recipe", "dlib-whole", "--weights", "random:0"),
    )
    command(
        *("train_heads", "--store", folder / "dlib.zarr", "--layers", "block4_3", "--heads", "zero-shot"),
        *("--trials", "same-person", "--n-trials", 7000, "--out", folder / "runs"),
    )
    (run,) = (folder / "runs").glob("*zero-shot*")
    few, many = (
        int(in_fresh_process("tests.benchmarks.bench_explain", ["--memory-of", str(run), "--n", str(n)]))
        for n in _TRIALS
    )
    what = f"memory of explaining {_TRIALS[1]:,} trials against {_TRIALS[0]}, dlib_resnet_v1, grad-cam and input-x-gradient"
    return [Line(what, human_bytes(many), human_bytes(few), many / few, "<= 1.1", many / few <= 1.1)]


def memory_child(run: Path, n: int) -> int:
    """Peak RssAnon in bytes."""
    request = ExplainRequest(run, ["grad-cam", "input-x-gradient"], n=n, checks=False)
    return peak_anonymous(lambda: explain(plan_explanation(request), run.parent / f"explained-{n}"))


SECTIONS: dict[str, Callable[[Path], list[Line]]] = {"speed": speed, "memory": memory}


@click.command()
@section_options(SECTIONS)
@click.option("--memory-of", type=click.Path(path_type=Path), hidden=True)
@click.option("--n", type=int, hidden=True)
def main(only: tuple[str, ...], markdown: bool, memory_of: Path | None, n: int) -> None:
    """Explanations beside bare passes of the network."""
    if memory_of:
        click.echo(memory_child(memory_of, n))
        return
    run_sections(SECTIONS, only, markdown)


if __name__ == "__main__":
    main()
