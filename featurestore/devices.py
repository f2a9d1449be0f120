"""Where a network runs and in which precision, so that the same input gives the same bits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from featurestore.errors import FeatureStoreError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU; FeatureStoreError if a device asked for by name is not there."""
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if name == "auto":
        name = next(kind for kind, available in there.items() if available())
    elif not there[name]():
        built = torch.version.cuda if name == "cuda" else torch.backends.mps.is_built()
        why = "no such device answers" if built else f"this torch {torch.__version__} was built without it"
        raise FeatureStoreError(f"`device` {name}: {why}. Use `device` cpu, or auto to take what there is.")
    return torch.device(name)


@contextmanager
def reproducible() -> Iterator[None]:
    """fp32 means fp32 (no TF32), and the same images give the same bits on the same GPU; settings are restored."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32
    cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32 = False, True, False, False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark, matmul.allow_tf32 = before
