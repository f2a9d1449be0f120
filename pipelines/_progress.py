"""Progress of Dask's tasks on this machine."""

import time
from collections.abc import Callable
from typing import Any

from dask.callbacks import Callback

_SOON = 1.0  # seconds


class TaskProgress(Callback):
    """Shows a bar, which ``make(total)`` gives, for each computation within its context that takes longer than a moment."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.make = make
        self.bar: Any = None
        self.total, self.done, self.started = 0, 0, 0.0

    def _start_state(self, graph: Any, state: Any) -> None:
        self.total = sum(len(state[name]) for name in ("ready", "waiting"))
        self.done, self.started = 0, time.monotonic()

    def _posttask(self, key: Any, result: Any, graph: Any, state: Any, worker: Any) -> None:
        self.done += 1
        if self.bar is not None:
            self.bar.update(1)
        elif self.done < self.total and time.monotonic() - self.started > _SOON:
            self.bar = self.make(self.total).__enter__()
            self.bar.update(self.done)

    def _finish(self, graph: Any, state: Any, failed: bool) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None
