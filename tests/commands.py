"""The commands as a user runs them, each in a process of its own.

The processes are forked from one that has imported everything, so that a command begins in a moment instead of in three
seconds; ``tests/pipelines/test_start.py`` starts each as a script, from nothing.
"""

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.imports"])


def command(script: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``pipelines/<script>.py`` with ``arguments`` to its end."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(script, *arguments, cwd=cwd or ROOT, outputs=outputs)
        process.join()
        line = [script, *map(str, arguments)]
        code = process.exitcode if process.exitcode is not None else 1
        return subprocess.CompletedProcess(line, code, *(path.read_text("utf-8") for path in outputs))


def start(
    script: str, *arguments: object, cwd: Path = ROOT, outputs: tuple[Path, Path] | None = None
) -> multiprocessing.Process:
    """Begin it; its output goes to the two files, or where the tests' own goes."""
    line = list(map(str, arguments))
    process = FORKS.Process(target=_run, args=(script, line, cwd, outputs, dict(os.environ)))
    process.start()
    return process


def _run(script: str, line: list[str], cwd: Path, outputs: tuple[Path, Path] | None, environment: dict) -> None:
    for number, path in enumerate(outputs or (), start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout.reconfigure(line_buffering=False)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    try:
        importlib.import_module(f"pipelines.{script}").main(line, prog_name=f"{script}.py")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
