"""A pickle of torch's read without running it: tensors are built, whatever else it names becomes an object that does nothing."""

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch


class Inert:
    """Stands for an object of a class that is not looked up. Whatever a pickle does to it has no effect."""

    def __new__(cls, *_: Any, **__: Any) -> "Inert":
        """One, whatever the arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> "Inert":
        """Itself."""
        return self

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, *_: Any) -> None:
        """As of a list, or of a class derived from it."""

    extend = add = append


def load(path: Path, mmap: bool) -> tuple[Any, list[str]]:
    """What ``torch.load`` gives with ``Inert`` for all that is no tensor, dict, list, text or number; and the names of those.

    Raises whatever a damaged file raises. Only for files that torch refused with UnpicklingError under ``weights_only``:
    TorchScript and tar archives, which it would open in other ways, raise other errors there.
    """
    names: list[str] = []

    class Unpickler(_Unpickler):
        def __init__(self, file: Any, **options: Any) -> None:
            super().__init__(file, names, **options)

    reader = SimpleNamespace(
        __name__="inert", Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader, mmap=mmap)
    return content, list(dict.fromkeys(names))


class _Unpickler(pickle._Unpickler):  # the one in Python: a memo number takes no memory of its size there
    def __init__(self, file: Any, names: list[str], **options: Any) -> None:
        super().__init__(file, **options)
        self._names = names
        self._known, self._inert = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._known[module, name]
        except KeyError:
            self._names.append(f"{module}.{name}")
            return self._inert

    def __setattr__(self, name: str, value: Any) -> None:
        """torch sets ``persistent_load``, which would compare a saved module's source with a file."""
        if name == "persistent_load":
            super().__setattr__(name, lambda pid: _storage(value, pid))
        else:
            super().__setattr__(name, value)


def _storage(load: Callable[[Any], Any], pid: Any) -> Any:
    if isinstance(pid, tuple) and len(pid) > 1 and pid[0] in ("module", b"module"):
        return pid[1]
    return load(pid)


def _stand_ins() -> tuple[dict[tuple[str, str], Any], type[Inert]]:
    """What a pickle may name, made for each file, since a pickle may also set attributes of what it names."""

    class Kept(OrderedDict[Any, Any]):
        def __setstate__(self, state: Any) -> None:
            pass

    class Nothing(Inert):
        pass

    def tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
        return torch._utils._rebuild_tensor(storage, offset, size, stride)

    def parameter(data: Any, *_: Any) -> Any:
        return data

    utils = "torch._utils"
    known: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): Kept,
        (utils, "_rebuild_tensor"): tensor,
        (utils, "_rebuild_tensor_v2"): tensor,
        (utils, "_rebuild_parameter"): parameter,
        (utils, "_rebuild_parameter_with_state"): parameter,
    }
    return known, Nothing
