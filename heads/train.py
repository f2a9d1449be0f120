"""Train one head on cached rows. The loop is all here: forward, loss, backward, step, and where the best weights are kept."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open

from featurestore.errors import FeatureStoreError
from heads.checkpoints import write_tensors
from heads.evaluation import raw_logits
from heads.features import Features
from heads.models.base import Head

PRECISIONS = ("fp32", "tf32", "bf16")
AUGMENTATIONS = ("", "flip")
_ADVICE = "Try a smaller learning rate (`lr`), and check the layer's rows: pipelines/verify_store.py finds NaN in them."


PACE_AFTER = 3.0  # seconds into the first epoch when the pace is told: that of a large head takes minutes
ORDERS = ("random", "blocks")
_BLOCK = 256  # items that are read together in ``order`` blocks: as many as a shard has by default
_MIXED = 8  # blocks whose examples are mixed
STOP = threading.Event()  # Ctrl-C reaches only the main thread; runs in other threads look here before every step


@dataclass(frozen=True)
class Settings:
    """How a head is trained. ``precision`` is that of the bridge's products: fp32; on a GPU tf32 (all products); or bf16.

    ``epochs`` at most, fewer when the validation loss has not fallen for ``patience`` of them. ``permute`` shows the
    three items of each trial in a new random order every epoch. ``threads`` changes the order of sums, hence last bits.
    ``order`` random draws an epoch's examples from all, ``blocks`` from a few stretches of the store at a time (``epoch_order``).
    With ``finetune_from``, a layer or ``input``, the backbone is trained from there on too, at ``backbone_lr``; ``augment`` flip:
    on training photographs that are mirrored at random, anew each epoch. FeatureStoreError for impossible values of these.
    """

    lr: float = 5e-4
    batch_size: int = 256
    epochs: int = 100
    patience: int = 10
    seed: int = 0
    permute: bool = False
    precision: str = "fp32"
    device: str = "cpu"
    threads: int = 0
    finetune_from: str | None = None
    backbone_lr: float | None = None
    augment: str = ""
    order: str = "random"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise FeatureStoreError(f"`order` {self.order!r} is not possible; it is one of {', '.join(ORDERS)}.")
        if self.precision not in PRECISIONS:
            raise FeatureStoreError(
                f"`precision` {self.precision!r} is not possible; it is one of {', '.join(PRECISIONS)}."
            )
        if self.augment not in AUGMENTATIONS:
            raise FeatureStoreError(f"`augment` {self.augment!r} is not possible; it is flip, or left out.")
        if self.backbone_lr is not None and not 0 < self.backbone_lr < float("inf"):
            raise FeatureStoreError(f"`backbone_lr` {self.backbone_lr!r} is not a number above zero.")
        idle = "backbone_lr" if self.backbone_lr is not None else "augment" if self.augment else ""
        if idle and self.finetune_from is None:
            raise FeatureStoreError(
                f"`{idle}` {getattr(self, idle)} is for fine-tuning: give `finetune_from` a layer, or leave it out."
            )


@dataclass(frozen=True)
class Examples:
    """What is learned: ``items`` (n, places) int64 numbers of a ``Features``, ``labels`` (n,) int64, and who is in which part."""

    items: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    def of(self, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Items and labels of a part."""
        return self.items[part], self.labels[part]


@dataclass(frozen=True)
class Epoch:
    """One line of the metrics: mean cross-entropy (with the penalty, in training) and accuracy, 0 … 1."""

    epoch: int
    train_loss: float
    train_accuracy: float
    validation_loss: float
    validation_accuracy: float
    examples_per_second: float
    seconds: float
    best: bool


@dataclass(frozen=True)
class Pace:
    """The speed in the first epoch so far but for its first step, and how long the training part of an epoch takes at it."""

    examples_per_second: float
    epoch_seconds: float


@dataclass(frozen=True)
class Preparation:
    """Photographs that have gone through the frozen part of a network before its other part is trained."""

    done: int
    total: int


Progress = Epoch | Pace | Preparation
Report = Callable[[Epoch | Pace], None]


@dataclass
class TrainingState:
    """Training after a number of whole epochs. ``best`` holds the weights with the lowest validation loss so far."""

    history: list[Epoch] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    best_epoch: int = 0
    best_loss: float = float("inf")

    @property
    def epoch(self) -> int:
        """Epochs finished."""
        return len(self.history)


class NonFiniteLossError(FeatureStoreError):
    """The loss became NaN or infinite: nothing after it would mean anything."""


def train(
    head: Head,
    features: Features,
    examples: Examples,
    settings: Settings,
    checkpoint: "Checkpoint | None" = None,
    report: Report = lambda line: None,
) -> TrainingState:
    """Train ``head`` in place and leave it with its best weights, in eval mode.

    ``head`` has its initial weights, which count as epoch 0: training never ends with worse ones by validation loss.
    Without validation examples the last epoch's are kept. Given the same head, examples and settings, and the same
    number of threads, the weights are the same bit for bit on the CPU, also when ``checkpoint`` resumes a killed run.
    ``report`` gets every epoch, and once the pace, if the first epoch is not over after ``PACE_AFTER`` seconds.
    Raises NonFiniteLossError with epoch and step.
    """
    head.to(features.device).train()
    if head.wants_statistics:
        head.standardise(*features.statistics(examples.items[examples.train]))
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    if not weights:
        head.eval()
        return TrainingState()
    optimizer = torch.optim.Adam(_groups(head, weights, settings), lr=settings.lr, fused=True)
    state = checkpoint.restore(head, optimizer) if checkpoint else None
    if state is None:
        state = TrainingState()
        state.best_loss, _ = validate(head, features, examples, epoch=0)
        state.best = _copy(head)
    pace: Report | None = report
    with _precision(head, settings):
        while state.epoch < settings.epochs and state.epoch - state.best_epoch < settings.patience:
            line = train_epoch(head, features, examples, settings, optimizer, state.epoch + 1, pace)
            pace = None
            loss, right = validate(head, features, examples, state.epoch + 1)
            best = not len(examples.validation) or loss < state.best_loss
            state.history.append(replace(line, validation_loss=loss, validation_accuracy=right, best=best))
            if best:
                state.best_loss, state.best_epoch = loss, state.epoch
                _copy(head, state.best)
            report(state.history[-1])
            if checkpoint:
                checkpoint.save_if_due(head, optimizer, state)
    head.load_state_dict(state.best)
    head.eval()
    return state


def _groups(head: Head, weights: list[torch.nn.Parameter], settings: Settings) -> list[dict[str, Any]]:
    """``weights`` with their learning rates: the head's, and the backbone's if it has part of one."""
    backbone = {id(weight) for weight in head.backbone_parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if id(weight) not in backbone]},
        {"params": [weight for weight in weights if id(weight) in backbone], "lr": settings.backbone_lr},
    ]
    return [group for group in groups if group["params"]]


def epoch_order(examples: Examples, order: str, rng: np.random.Generator) -> np.ndarray:
    """The training examples, int64, as an epoch shows them: in random order.

    In that of ``blocks`` those are mixed whose first items are in one of 8 blocks, drawn at random, of 256 items that follow
    each other in the store; then those of the next 8. For heads on single items every row is read so; of a trial's the first.
    """
    shown = rng.permutation(examples.train)
    if order == "random":
        return shown
    blocks = examples.items[shown].reshape(len(shown), -1)[:, 0] // _BLOCK
    turns = rng.permutation(int(blocks.max(initial=0)) + 1) // _MIXED
    return shown[np.argsort(turns[blocks], kind="stable")]


def train_epoch(
    head: Head,
    features: Features,
    examples: Examples,
    settings: Settings,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    pace: Report | None = None,
) -> Epoch:
    """One pass over the training examples, in an order that depends on seed and epoch alone; validation is left NaN.

    ``pace`` is told the speed once, ``PACE_AFTER`` seconds from the start.
    """
    start = time.perf_counter()
    rng = np.random.default_rng([settings.seed, epoch])
    generator = torch.Generator(features.device).manual_seed(settings.seed * 1_000_003 + epoch)
    gather = features.augmented(settings.seed, epoch)
    items, labels = examples.of(epoch_order(examples, settings.order, rng))
    if settings.permute and head.n_places == 3:
        items, labels = _permuted(items, labels, rng)
    total, right = 0.0, 0
    parts = torch.from_numpy(items).split(settings.batch_size)
    batches = features.gathered((part.unique(return_inverse=True) for part in parts), gather)
    for step, (rows, (_, places)) in enumerate(batches, start=1):
        if STOP.is_set():
            raise FeatureStoreError("stopped; run the same command again to go on.")
        first = (step - 1) * settings.batch_size
        wanted = torch.from_numpy(labels[first : first + settings.batch_size]).to(features.device)
        optimizer.zero_grad()
        loss, logits = head.accumulate(rows, places.to(features.device), wanted, generator)
        value = float(loss)
        if not np.isfinite(value):
            raise NonFiniteLossError(
                f"the loss became {value} in epoch {epoch}, step {step}, at learning rate {settings.lr:g}. {_ADVICE}"
            )
        optimizer.step()
        total += value * len(wanted)
        right += int((logits.argmax(1) == wanted).sum())
        now = time.perf_counter()
        if step == 1:
            second_step = now  # the first one also makes room for gradients and moments
        elif pace and now - start >= PACE_AFTER:
            rate = (first + len(wanted) - settings.batch_size) / (now - second_step)
            pace(Pace(rate, len(items) / rate))
            pace = None
    seconds = time.perf_counter() - start
    return Epoch(
        epoch=epoch,
        train_loss=total / len(items),
        train_accuracy=right / len(items),
        validation_loss=float("nan"),
        validation_accuracy=float("nan"),
        examples_per_second=len(items) / seconds,
        seconds=seconds,
        best=False,
    )


def validate(head: Head, features: Features, examples: Examples, epoch: int) -> tuple[float, float]:
    """Mean cross-entropy and accuracy of the validation part after ``epoch``; NaN if there is none."""
    items, labels = examples.of(examples.validation)
    if not len(items):
        return float("nan"), float("nan")
    logits = raw_logits(head, features, items)
    loss = float(F.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels)))
    if not np.isfinite(loss):
        raise NonFiniteLossError(f"the validation loss is {loss} after epoch {epoch}. {_ADVICE}")
    return loss, float((logits.argmax(axis=1) == labels).mean())


class Checkpoint:
    """The whole state of an unfinished run in one safetensors file, replaced at most every ``every`` seconds."""

    def __init__(self, path: Path, identity: str, every: float = 60.0) -> None:
        self.path, self.identity, self.every = path, identity, every
        self._saved = time.monotonic()

    def save_if_due(self, head: Head, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Save after an epoch, unless the last time is less than ``every`` seconds ago."""
        if time.monotonic() - self._saved >= self.every:
            self.save(head, optimizer, state)

    def save(self, head: Head, optimizer: torch.optim.Optimizer, state: TrainingState) -> None:
        """Write everything that the next epoch depends on. Random numbers depend on seed and epoch, so none are kept."""
        tensors = {f"weights.{name}": tensor for name, tensor in head.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in state.best.items()}
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{i}.{name}": tensor for name, tensor in moments.items()}
        history = [asdict(epoch) for epoch in state.history]
        about = {"history": history, "best_epoch": state.best_epoch, "best_loss": state.best_loss}
        write_tensors(self.path, tensors, {"identity": self.identity, "progress": json.dumps(about)})
        self._saved = time.monotonic()

    def restore(self, head: Head, optimizer: torch.optim.Optimizer) -> TrainingState | None:
        """Put ``head`` and ``optimizer`` where they were; None if there is no state of this very run."""
        if not self.path.is_file():  # a pipe would hang
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("identity") != self.identity:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            about = json.loads(metadata["progress"])
            head.load_state_dict(_under(tensors, "weights."))
            adam: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in _under(tensors, "adam.").items():
                number, _, slot = name.partition(".")
                adam.setdefault(int(number), {})[slot] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": adam})
            history = [Epoch(**line) for line in about["history"]]
            return TrainingState(history, _under(tensors, "best."), about["best_epoch"], about["best_loss"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise FeatureStoreError(
                f"{self.path}, the state of an unfinished run, is damaged: {error}. Delete it to start this run again."
            ) from None

    def remove(self) -> None:
        """A finished run needs no state."""
        self.path.unlink(missing_ok=True)


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _copy(head: Head, into: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The head's weights apart from it; into the same memory if there is some."""
    if not into:
        return {name: tensor.detach().clone() for name, tensor in head.state_dict().items()}
    for name, tensor in head.state_dict().items():
        into[name].copy_(tensor)
    return into


def _permuted(items: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Every triplet in a random order of its own, and where the odd one is then."""
    orders = rng.random(items.shape).argsort(axis=1)
    return np.take_along_axis(items, orders, axis=1), (orders == labels[:, None]).argmax(axis=1)


@contextmanager
def _precision(head: Head, settings: Settings) -> Iterator[None]:
    """The precision of the bridge's products while training."""
    before = torch.get_float32_matmul_precision()
    head.low_precision = settings.precision == "bf16"
    if settings.device != "cpu":
        torch.set_float32_matmul_precision("high" if settings.precision == "tf32" else "highest")
    try:
        yield
    finally:
        head.low_precision = False
        torch.set_float32_matmul_precision(before)
