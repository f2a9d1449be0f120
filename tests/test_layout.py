"""The direction of imports, circles, and what importing costs."""

import ast
import importlib
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.commands import ROOT, command

PACKAGES = ("featurestore", "heads", "pipelines")  # each may import itself and what stands before it
GROUND = (
    "errors",
    "text",
    "files",
    "keys",
    "versions",
    "devices",
    "memory",
    "intervals",
    "cluster",
    "discovery",
    "conditions",
    "safe_pickle",
    "pickle_nesting",
)
# What each folder of featurestore may import beside itself and the modules of the ground; pipelines and heads may import all.
BELOW = {
    "remote": (),
    "photos": ("remote",),
    "store": ("remote",),
    "networks": ("photos",),
    "checkpoints": ("networks", "photos"),
    "caching": ("checkpoints", "demo", "networks", "photos", "remote", "store"),
    "queries": ("photos", "store"),
    "figures": ("photos", "queries", "store"),
    "demo": (),
}


@cache
def modules() -> dict[str, Path]:
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imports(module: str, known: dict[str, Path]) -> set[str]:
    """The project's own modules that one imports, inside functions too; those for type checkers alone are left out."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative imports hide the direction"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else str(node.module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(known[module].read_text("utf-8")))
    return {name for name in found if name in known and name != module}


@cache
def graph() -> dict[str, set[str]]:
    return {module: imports(module, modules()) for module in modules()}


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of modules that reach each other."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {module: reached(module) for module in graph}
    return {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}


def test_no_module_imports_itself_in_a_circle() -> None:
    assert not circles(graph())
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}  # it would find one


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way(package: str) -> None:
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    for module, names in graph().items():
        if module.partition(".")[0] == package:
            upward = {name for name in names if name.partition(".")[0] in later}
            assert not upward, f"{module} imports {upward}"


@pytest.mark.parametrize("folder", sorted(BELOW))
def test_folders_of_featurestore_import_one_way(folder: str) -> None:
    assert (ROOT / "featurestore" / folder / "__init__.py").exists()
    allowed = {folder, *GROUND, *BELOW[folder]}
    for module, names in graph().items():
        if module.startswith(f"featurestore.{folder}."):
            upward = {name for name in names if name != "featurestore" and name.split(".")[1] not in allowed}
            assert not upward, f"{module} imports {upward}"


def test_every_module_of_featurestore_has_its_place() -> None:
    places = {module.split(".")[1] for module in modules() if module.startswith("featurestore.")}
    assert places == {*GROUND, *BELOW}


@pytest.mark.parametrize("module", [f"featurestore.{name}" for name in GROUND])
def test_the_ground_imports_nothing_above_it(module: str) -> None:
    assert not {name for name in graph()[module] if name.split(".")[1] not in GROUND}


@pytest.mark.parametrize(
    "module",
    [
        "featurestore",
        "featurestore.networks.registry",
        "heads",
        "heads.registry",
        "pipelines.cache_layers",
        "pipelines.convert_weights",
        "pipelines.compare_networks",
        "pipelines.find_faces",
        "pipelines.name_faces",
        "pipelines.store_info",
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


def test_another_operating_system_is_refused_with_the_reason() -> None:
    code = "import sys; sys.platform = 'win32'; import featurestore"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "runs on Linux and macOS" in done.stderr.splitlines()[-1]


def test_the_library_names_arguments_as_python_has_them() -> None:
    """In backticks, which a command prints as its option; whole command lines are for the shell."""
    for module, path in modules().items():
        if module.startswith("pipelines"):
            continue
        tree = ast.parse(path.read_text("utf-8"))
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, documented) and ast.get_docstring(node)
        }
        pieces = {id(piece) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for piece in node.values}
        for node in ast.walk(tree):
            if id(node) in docs | pieces:
                continue
            whole = ast.unparse(node) if isinstance(node, ast.JoinedStr) else getattr(node, "value", "")
            if not isinstance(node, ast.JoinedStr | ast.Constant) or not isinstance(whole, str):
                continue
            assert not re.search(r"(?<![-\w])--[a-z]", whole) or "pipelines/" in whole, f"{module}: {whole}"


def test_a_command_names_its_options() -> None:
    done = command("cache_layers", "--layers", "conv_1_1", "--images", "nowhere", "--weights", "random:0")
    assert "Check the path given with --images." in done.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_import_what_there_is(path: Path) -> None:
    """They are not run here, and name functions that may move."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in PACKAGES:
            found = importlib.import_module(node.module)
            missing = [each.name for each in node.names if not hasattr(found, each.name)]
            assert not missing, f"{path.name} imports {missing} from {node.module}"
