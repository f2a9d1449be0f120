"""Freed memory kept by the process: page faults are counted, not timed, in fresh processes."""

import ctypes
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import ROOT, command
from tests.conftest import write_photographs

GLIBC = hasattr(ctypes.CDLL(None), "gnu_get_libc_version")
OPTIONS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")

# Ten rounds of buffers of 48 MiB: page faults of them, and bytes that the process holds afterwards beyond what it had before.
ROUNDS = """
import json, resource, sys, threading
from pathlib import Path
import numpy as np
{imports}

def held():
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024

def round():
    a = np.ones(12 << 20, np.float32)
    b = a + 1
    del a
    return (b * 2)[0]

def rounds():
    round(), round()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        round()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

start = held()
said = {call}
found = []
if "thread" in sys.argv:
    thread = threading.Thread(target=lambda: found.append(rounds()))
    thread.start(), thread.join()
else:
    found.append(rounds())
kept = held() - start
{after}
print(json.dumps(dict(said=said, faults=found[0], kept=kept, left=held() - start)))
"""
KEEP = "from featurestore.memory import give_back_memory, keep_freed_memory"


def run(imports: str = "", call: str = "''", after: str = "", *arguments: str, **environment: str) -> dict:
    """What the rounds found, in a process without settings of the allocator but those of ``environment``."""
    code = ROUNDS.format(imports=imports, call=call, after=after)
    plain = {name: value for name, value in os.environ.items() if name not in (*OPTIONS, "GLIBC_TUNABLES")}
    plain |= {"PYTHONPATH": str(ROOT), "NUMPY_MADVISE_HUGEPAGE": "0", **environment}
    line = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(line, env=plain, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def kept(*arguments: str, **environment: str) -> dict:
    return run(KEEP, "keep_freed_memory()", "give_back_memory()", *arguments, **environment)


@pytest.mark.skipif(not GLIBC, reason="another allocator than glibc's")
def test_large_buffers_are_used_again_and_given_back() -> None:
    plain, ours = run(), kept()
    assert plain["faults"] > 10_000
    assert ours["faults"] < plain["faults"] / 100
    assert ours["kept"] < 2.5 * (48 << 20)  # two buffers are in use at once
    assert ours["left"] < 8 << 20
    assert "used again, about as many as were in use at once" in ours["said"]


@pytest.mark.skipif(not GLIBC, reason="another allocator than glibc's")
def test_in_another_thread_too() -> None:
    plain, ours = run("", "''", "", "thread"), kept("thread")
    assert ours["faults"] < plain["faults"] / 2  # glibc limits a thread's heap to 64 MiB, which holds one of the two
    assert ours["left"] < 64 << 20


@pytest.mark.skipif(not GLIBC, reason="another allocator than glibc's")
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, "MALLOC_TRIM_THRESHOLD_=131072"),
        ({"MALLOC_MMAP_MAX_": "65536"}, "MALLOC_MMAP_MAX_=65536"),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.check=0:glibc.malloc.mmap_threshold=131072"},
            "glibc.malloc.mmap_threshold in",
        ),
    ],
)
def test_what_the_user_has_set_stays(setting: dict[str, str], said: str) -> None:
    ours = kept(**setting)
    assert said in ours["said"]
    assert ours["faults"] > 10_000


@pytest.mark.skipif(not GLIBC, reason="another allocator than glibc's")
@pytest.mark.parametrize(
    "setting", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.perturb=0"}]
)
def test_other_settings_of_the_user_stay_beside_it(setting: dict[str, str]) -> None:
    assert kept(**setting)["faults"] < 1_000


@pytest.mark.skipif(not GLIBC, reason="another allocator than glibc's")
def test_importing_changes_nothing() -> None:
    imports = (
        "import featurestore.caching.run, heads.schedule, heads.train, pipelines.cache_layers, pipelines.train_heads"
    )
    assert run(imports)["faults"] > 10_000


@pytest.mark.skipif(not GLIBC, reason="another allocator than glibc's")
def test_a_preloaded_allocator_is_left_alone(tmp_path: Path) -> None:
    source = tmp_path / "other.c"
    source.write_text(
        "#include <stddef.h>\nextern void *__libc_malloc(size_t);\nvoid *malloc(size_t n) { return __libc_malloc(n); }\n"
    )
    library = tmp_path / "other.so"
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no C compiler")
    ours = kept(LD_PRELOAD=str(library))
    assert "as the system's allocator has it" in ours["said"]
    assert ours["faults"] > 10_000


def test_plans_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    images = write_photographs(tmp_path / "p", 2, 1)
    line = ["--layers", "relu_1_1", "--images", images, "--weights", "random:0", "--store", tmp_path / "s.zarr"]
    done = command("cache_layers", *line, "--device", "cpu", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "\n  buffers   freed ones of up to 1.0 GiB are kept" in done.stdout or not GLIBC
