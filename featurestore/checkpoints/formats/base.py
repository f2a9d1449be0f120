"""What every checkpoint format gives: named tensors, read when they are asked for; and the errors of untrusted files."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from featurestore.errors import FeatureStoreError

MOST_TENSORS = 10_000  # in a file: networks have hundreds
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")  # under which training scripts keep a state dict


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, and how to read it (on the CPU, in the file's own dtype)."""

    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class TensorFile:
    """A file's tensors by the names that it gives them, in its order.

    ``kind`` is the format's name in messages, ``notes`` what the user should know of the file.
    """

    path: Path
    kind: str
    tensors: dict[str, Stored]
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name."""
        return {name: stored.shape for name, stored in self.tensors.items()}


def unwrap(path: Path, content: Any, kind: type) -> dict[str, Any]:
    """Names to values of ``kind``, out of a state dict or the checkpoint around one."""
    if isinstance(content, dict):
        content = next((content[name] for name in WRAPPERS if isinstance(content.get(name), dict)), content)
    if not isinstance(content, dict) or not all(isinstance(value, kind) for value in content.values()):
        raise FeatureStoreError(f"{path} is not a state dict (keys to tensors) but a {type(content).__name__}.")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def refuse_many(path: Path, n: int) -> None:
    """FeatureStoreError for more tensors than any network has."""
    if n > MOST_TENSORS:
        raise FeatureStoreError(f"{path} holds {n:,} tensors, and no network has more than {MOST_TENSORS:,}.")


def damaged(path: Path, reason: object) -> FeatureStoreError:
    """The error for a file that ends early or contradicts itself."""
    first = (str(reason).splitlines() or [type(reason).__name__])[0]  # MemoryError and EOFError say nothing
    return FeatureStoreError(f"{path} is damaged or incomplete: {first.rstrip('.')}. Fetch it again.")


def runs_code(path: Path, what: str) -> FeatureStoreError:
    """The error for a file that holds more than numbers."""
    return FeatureStoreError(
        f"{path} holds more than tensors and was not loaded, because such a file can run code: {what} "
        "Save its state dict alone: torch.save(model.state_dict(), FILE)."
    )
