"""One batch through the network: pixels in, rows as they are stored out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from featurestore.errors import FeatureStoreError
from featurestore.photos.loading import Batch
from featurestore.photos.recipes import Recipe


class NonFiniteError(FeatureStoreError):
    """An activation that is NaN or infinite."""


@dataclass(frozen=True)
class Outputs:
    """A batch's rows on their way to the disk: (n, elements) per layer, and each layer's smallest and largest value.

    On a GPU the copies may still be running; ``wait`` before looking.
    """

    rows: dict[str, torch.Tensor]
    extremes: torch.Tensor
    wait: Callable[[], Any]


def compute(
    network: torch.nn.Module,
    recipe: Recipe,
    pixels: torch.Tensor,
    device: torch.device,
    dtype: torch.dtype,
    stored: Mapping[str, np.dtype],
) -> Outputs:
    """One forward pass: uint8 pixels (n, size, size, 3) to stored rows. Does not wait for the GPU."""
    with torch.inference_mode():
        inputs = recipe.normalise(pixels.to(device, non_blocking=True)).to(dtype)
        outputs: dict[str, torch.Tensor] = network(inputs)
        rows, extremes = {}, []
        for name, values in outputs.items():
            kept = values.to(getattr(torch, stored[name].name)).flatten(1).contiguous()  # C, H, W order
            extremes.append(torch.stack(torch.aminmax(kept)).float())  # NaN and infinity both survive into it
            rows[name] = _to_host(kept)
        limits = _to_host(torch.stack(extremes))
    if device.type != "cuda":
        return Outputs(rows, limits, lambda: None)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))  # of the device asked for, which need not be torch's current one
    return Outputs(rows, limits, event.synchronize)


def _to_host(values: torch.Tensor) -> torch.Tensor:
    if values.device.type != "cuda":
        return values.cpu()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def refuse_non_finite(batch: Batch, outputs: Outputs) -> None:
    """NonFiniteError if an activation of the batch is NaN or infinite; ``outputs`` have arrived."""
    if bool(torch.isfinite(outputs.extremes).all()):
        return
    for name, values in outputs.rows.items():
        bad = (~torch.isfinite(values)).sum(dim=1)
        if bad.any():
            first = int(torch.nonzero(bad)[0])
            raise NonFiniteError(
                f"layer {name!r} of {batch.photos[first]} has {int(bad[first])} NaN or infinite activations "
                f"({int((bad > 0).sum())} images of this batch have some). Nothing of this batch was stored. "
                "Half precision overflows at 65504: try `precision` bf16 or fp32 and `dtype` float32; "
                "if that is what you use, look at the weights."
            )
