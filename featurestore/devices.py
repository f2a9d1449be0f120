"""Where a network runs and in which precision, so that the same input gives the same bits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from featurestore.errors import FeatureStoreError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_MOST_DIGITS = 4  # of a device's number


def choose_device(name: str) -> torch.device:
    """``cpu``, ``mps``, ``cuda``, one of several such as ``cuda:1``, or ``auto``: CUDA, then MPS, then the CPU.

    FeatureStoreError if a device asked for by name is not there.
    """
    there: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if name == "auto":
        name = next(kind for kind, available in there.items() if available())
    kind, colon, number = name.partition(":")
    if kind not in there or (colon and not (kind == "cuda" and number.isdecimal() and len(number) < _MOST_DIGITS)):
        raise FeatureStoreError(
            f"`device` {name!r} is none of auto, cpu, mps, cuda, or cuda:N with the number N of one."
        )
    if not there[kind]():
        built = torch.version.cuda if kind == "cuda" else torch.backends.mps.is_built()
        why = "no such device answers" if built else f"this torch {torch.__version__} was built without it"
        raise FeatureStoreError(f"`device` {name}: {why}. Use `device` cpu, or auto to take what there is.")
    if colon and int(number) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        known = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise FeatureStoreError(f"`device` {name}: there {'is' if count == 1 else 'are'} {count} here. Use {known}.")
    return torch.device(name)


def fast_precision(device: torch.device) -> str:
    """``bf16`` where the device has arithmetic of its own for bfloat16 (AMX, AVX512_BF16; CUDA from Ampere on), else ``fp32``.

    Elsewhere bfloat16 is emulated, and slower than float32.
    """
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and bool({"amx_bf16", "avx512_bf16"} & _processor())
    return "bf16" if fast else "fp32"


def _processor() -> set[str]:
    """What the processor can do, by torch's names; nothing where torch does not tell."""
    told: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return {name for name, has in told.items() if has is True}


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
