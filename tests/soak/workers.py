"""Processes that read case after case, watched from outside: time, memory, what they raise, and whether anything ran.

A worker is forked from a process that has imported everything (``tests.commands``) and lives on from case to case. Only Python's
own calls are seen by the audit hook, not those of libraries in C.
"""

import faulthandler
import os
import re
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from tests.commands import FORKS, ROOT

MOST_SECONDS = 10.0
MOST_BYTES = 1 << 30  # above what the worker had at its start
_ADDRESSES = 6 << 30  # bytes that it can reserve beyond that before it gets no more
_TO_WRITE = 0.5  # seconds, for a stack
_CASES = 20_000  # of one worker
READ, REFUSED = "read", "refused"
OUTCOMES = (
    READ,
    REFUSED,
    "other exception",
    f"over {MOST_SECONDS:.0f} s",
    "over 1 GiB",
    "crashed",
    "ran code",
    "wrote outside",
)
_RUNS = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "pty.spawn",
    "socket.connect",
)
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Outcome:
    """What became of a case: one of ``OUTCOMES``; ``detail`` says where. ``bytes`` is above the worker's start."""

    number: int
    seed_file: str = ""
    what: str = READ
    detail: str = ""
    seconds: float = 0.0
    bytes: int = 0
    last: bool = False  # of its worker

    @property
    def is_finding(self) -> bool:
        return self.what not in (READ, REFUSED)


class Watch:
    """Notes what is run, and what is written outside of ``folder``; and does not let it happen."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[tuple[str, str]] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in _RUNS:
            self._note("ran code", f"{event} {args!r:.200}")
        elif event in _CHANGES or (event == "open" and (args[2] or 0) & _WRITES):
            self._refuse_outside(event, args[0])

    def _refuse_outside(self, event: str, path: Any) -> None:
        if isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith((self.folder or "", "/dev/null")):
            return
        self._note("wrote outside", f"{event} {path!r:.200}")

    def _note(self, what: str, detail: str) -> None:
        self.seen.append((what, detail))
        raise PermissionError(f"refused by the soak: {detail}")


def _memory(name: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def _limit_memory() -> None:
    """So that a worker ends rather than the machine."""
    most = _memory("VmSize") + _ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def work(kind: str, seed: int, seeds: Path, folder: Path, part: slice, connection: Connection) -> None:
    """Reads the cases whose numbers come from ``connection``, and sends that it is ready and then their outcomes.

    It first reads its ``part`` of the seeds, which imports what is needed; undamaged files that cannot be read end the soak.
    """
    from tests.soak.cases import make_case, read_seeds
    from tests.soak.kinds import READERS

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(ROOT))
    import torch

    torch.set_num_threads(1)
    files = read_seeds(seeds / kind)
    empty, place = folder / "empty", folder / "case"
    empty.mkdir(parents=True)
    os.chdir(empty)
    for name in list(files)[part]:
        try:
            READERS[kind](seeds / kind / name, name)
        except Exception as error:
            if type(error).__name__ != "FeatureStoreError" or not name.startswith("dlib"):
                connection.send(f"{kind}/{name}, which is not damaged: {type(error).__name__}: {error}")
                raise
    stacks = (folder / "stack").open("w")
    faulthandler.enable(stacks)  # where it crashes
    faulthandler.register(signal.SIGUSR1, stacks)  # what takes so long
    watch = Watch()
    start = _memory("VmRSS")
    _limit_memory()
    connection.send("")
    for i in range(1, _CASES + 1):
        try:
            number = connection.recv()
        except EOFError:
            return
        case = make_case(kind, number, seed, files)
        place.mkdir()
        case.write(place)
        outcome = _read(lambda case=case: READERS[kind](place, case.seed_file), watch, place, start)
        left = os.listdir(empty)
        if left and not outcome.is_finding:
            outcome = replace(outcome, what="wrote outside", detail=f"{left!r} in the current folder")
        shutil.rmtree(place)
        last = i == _CASES or bool(left) or _memory("VmRSS") > start + MOST_BYTES // 2
        connection.send(replace(outcome, number=number, seed_file=case.seed_file, last=last))
        if last:
            return


def _read(read: Callable[[], object], watch: Watch, folder: Path, start: int) -> Outcome:
    Path("/proc/self/clear_refs").write_text("5")  # the largest memory so far is forgotten
    watch.seen.clear()
    what, detail, begun = READ, "", time.perf_counter()
    watch.folder = f"{os.path.realpath(folder)}/"
    try:
        read()
    except Exception as error:
        what, detail = _raised(error)
    finally:
        watch.folder = None
    seconds, peak = time.perf_counter() - begun, max(0, _memory("VmHWM") - start)
    if peak > MOST_BYTES:
        what, detail = "over 1 GiB", f"{peak / 2**30:.1f} GiB, {detail or what}"
    if watch.seen:
        what, detail = watch.seen[0]
    return Outcome(0, "", what, detail, seconds, peak)


def _raised(error: Exception) -> tuple[str, str]:
    from featurestore.errors import FeatureStoreError

    if isinstance(error, FeatureStoreError):
        return REFUSED, ""
    return "other exception", f"{type(error).__name__} at {place_of(error)}: {' '.join(str(error).split())[:150]}"


def place_of(error: BaseException) -> str:
    """The last line of the project that it came through, and of the library where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT) and "/tests/" not in frame.filename]
    chosen = ours[-1] if ours else frames[-1]
    name = Path(chosen.filename)
    where = f"{name.relative_to(ROOT) if name.is_relative_to(ROOT) else name}:{chosen.lineno} {chosen.name}"
    inner = frames[-1]
    return where if inner is chosen else f"{where} ({Path(inner.filename).name} {inner.name})"


class Worker:
    """One process, and the case that it is reading."""

    def __init__(self, kind: str, seed: int, seeds: Path, folder: Path, part: slice) -> None:
        self.connection, theirs = FORKS.Pipe()
        self.number: int | None = None
        self.since = time.monotonic()
        self.ready = False
        self.folder, self.part = folder, part
        shutil.rmtree(folder, ignore_errors=True)
        self.process = FORKS.Process(target=work, args=(kind, seed, seeds, folder, part, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, number: int) -> None:
        self.number, self.since = number, time.monotonic()
        self.connection.send(number)

    def outcome(self) -> Outcome | None:
        """Of its case, if that has come to an end; None if it has become ready. RuntimeError if it could not begin."""
        try:
            told = self.connection.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            if self.number is None:
                raise RuntimeError(f"a worker ended before its first case, with status {code}") from None
            name = signal.Signals(-code).name if code < 0 else f"status {code}"
            detail = f"{name} at {self._stack()}"
            return Outcome(self.number, what="crashed", detail=detail, seconds=self._seconds(), last=True)
        if isinstance(told, str):
            if told:
                raise RuntimeError(told)
            self.ready = True
            return None
        self.number = None
        return told

    def overdue(self) -> Outcome | None:
        """The end of a case that takes too long."""
        if self.number is None or self._seconds() <= MOST_SECONDS or self.connection.poll():
            return None
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        os.kill(self.process.pid or 0, signal.SIGUSR1)
        time.sleep(_TO_WRITE)
        detail = f"at {self._stack()}: {int(text.split('VmHWM:')[1].split()[0]) / 2**20:.1f} GiB"
        self.stop()
        return Outcome(self.number, what=OUTCOMES[3], detail=detail, seconds=self._seconds(), last=True)

    def _stack(self) -> str:
        """The last line of the project, and the function that was running, as faulthandler writes them."""
        lines = re.findall(r'File "(.*)", line (\d+) in (\S+)', (self.folder / "stack").read_text())
        ours = [f"{name.removeprefix(f'{ROOT}/')}:{line} {f}" for name, line, f in lines if name.startswith(str(ROOT))]
        return f"{next(iter(ours), '')} ({lines[0][2]})" if lines else "no line of Python"

    def _seconds(self) -> float:
        return time.monotonic() - self.since

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def outcomes(
    kind: str, seed: int, numbers: Iterator[int], seeds: Path, folder: Path, workers: int
) -> Iterator[Outcome]:
    """Of the cases ``numbers``, in the order in which they end."""
    team = [Worker(kind, seed, seeds, folder / f"{kind}-{i}", slice(i, None, workers)) for i in range(workers)]
    try:
        while team:
            for worker in [worker for worker in team if worker.connection in wait([w.connection for w in team], 0.5)]:
                ended = worker.outcome()
                if ended:
                    yield ended
                    if ended.last:
                        worker = _replaced(team, worker, kind, seed, seeds)
                if worker.ready:
                    _next(team, worker, numbers)
            for worker in list(team):
                late = worker.overdue()
                if late:
                    yield late
                    _replaced(team, worker, kind, seed, seeds)
    finally:
        for worker in team:
            worker.stop()


def _next(team: list[Worker], worker: Worker, numbers: Iterator[int]) -> None:
    number = next(numbers, None)
    if number is None:
        worker.stop()
        team.remove(worker)
    else:
        worker.give(number)


def _replaced(team: list[Worker], worker: Worker, kind: str, seed: int, seeds: Path) -> Worker:
    worker.stop()
    new = Worker(kind, seed, seeds, worker.folder, worker.part)
    team[team.index(worker)] = new
    return new


def make_seeds(folder: Path) -> None:
    """All seeds, in ``folder``; in a process of its own, since threads of torch and forks do not go together."""
    from tests.soak.seeds import write_seeds

    write_seeds(folder)


def read_again(kind: str, number: int, seed: int, place: Path, out: Path | None) -> None:
    """One case, and the traceback of what it raises, or of what it does when its time is over."""
    from featurestore.errors import FeatureStoreError
    from tests.soak.cases import make_case, read_seeds
    from tests.soak.kinds import READERS

    case = make_case(kind, number, seed, read_seeds(place / "seeds" / kind))
    folder = out or place / "case"
    case.write(folder)
    whole = place / "seeds" / kind / case.seed_file
    changed = [name for name, content in case.files.items() if content != (whole / name).read_bytes()]
    print(f"{kind} {number}, made of {case.seed_file}: damaged {', '.join(changed)}; replaced {dict(case.odd)}")
    sys.stdout.flush()
    _limit_memory()
    faulthandler.enable()
    faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
    try:
        READERS[kind](folder, case.seed_file)
    except FeatureStoreError as error:
        print(f"refused: {error}")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    else:
        print("read.")
