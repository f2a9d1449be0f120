"""Progress of Dask's tasks on this machine."""

from collections.abc import Callable
from typing import Any

from dask.callbacks import Callback


class TaskProgress(Callback):
    """Shows a bar, which ``make(total)`` gives, for each computation of several tasks within its context."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.make = make
        self.bar: Any = None

    def _start_state(self, graph: Any, state: Any) -> None:
        total = sum(len(state[name]) for name in ("ready", "waiting"))
        if total > 1 and self.bar is None:
            self.bar = self.make(total).__enter__()

    def _posttask(self, key: Any, result: Any, graph: Any, state: Any, worker: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def _finish(self, graph: Any, state: Any, failed: bool) -> None:
        if self.bar is not None:
            self.bar.__exit__(None, None, None)
            self.bar = None
