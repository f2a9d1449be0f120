"""The direction of imports, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT

ORDER = ["featurestore", "heads", "pipelines"]  # each may import itself and what stands before it


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", ORDER)
def test_imports_run_one_way(package: str) -> None:
    later = set(ORDER[ORDER.index(package) + 1 :]) | {"tests"}
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & later, f"{path} imports {imported(path) & later}"


@pytest.mark.parametrize(
    "module",
    [
        "featurestore",
        "featurestore.networks.registry",
        "heads",
        "pipelines.cache_layers",
        "pipelines.convert_weights",
        "pipelines.train_heads",
        "pipelines.verify_store",
    ],
)
def test_naming_things_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'pandas', 'zarr', 'dask', 'cv2') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_a_list_of_layers_builds_no_weights() -> None:
    """VGG-Face's are 553 MiB; on the meta device they have shapes and nothing else."""
    code = (
        "import torch, resource; from featurestore.networks.registry import get_backbone\n"
        "from featurestore.networks.shapes import layer_shapes\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "layer_shapes(get_backbone('resnet50_ft')); before = peak()\n"
        "layer_shapes(get_backbone('vggface')); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 100 * 1024  # KiB
