"""bridge and convolutions over the stacked pairs, as published"""

import torch
import torch.nn.functional as F
from torch import nn

from heads.models.banded import convolve
from heads.models.triplet import TripletHead

# Channels in and out, kernel (height, width), stride (height, width), by width of the bridge. The signal is the stack of
# the rows x1, x2, x1, x3, x2, x3; its width goes 4047, 1974, 938, 280, 67, 3 and 251, 152, 53, 3.
CONV_KERNELS: dict[int, tuple[tuple[int, int, tuple[int, int], tuple[int, int]], ...]] = {
    4096: (
        (1, 2, (2, 50), (2, 1)),
        (2, 2, (3, 100), (1, 2)),
        (2, 1, (1, 100), (1, 2)),
        (1, 1, (1, 100), (1, 3)),
        (1, 1, (1, 80), (1, 3)),
        (1, 1, (1, 65), (1, 1)),
    ),
    300: (
        (1, 2, (2, 50), (2, 1)),
        (2, 2, (3, 100), (1, 1)),
        (2, 1, (1, 100), (1, 1)),
        (1, 1, (1, 51), (1, 1)),
    ),
}
_BLOCKS = {4096: (64, 32, 32, None, None, None), 300: (50, None, None, None)}  # outputs to one product; measured
_CHUNK = {4096: 64, 300: 256}  # triplets at a time, so that their signals fit the processor's caches; measured


class ConvDecision(nn.Sequential):
    """Convolutions over the stacked pairs x1 x2, x1 x3, x2 x3, with ReLU between them: (n, 3, width) to (n, 3)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.chunk = width, _CHUNK[width]
        for i, (channels_in, channels_out, kernel, stride) in enumerate(CONV_KERNELS[width]):
            if i:
                self.append(nn.ReLU())
            self.append(nn.Conv2d(channels_in, channels_out, kernel, stride))

    def reset(self, generator: torch.Generator) -> None:
        """Turn round kernels whose weights sum to less than zero, and start biases at zero; the drawn numbers stay.

        What a kernel sees is never negative: with a negative sum or bias it would answer below zero everywhere, its ReLU
        would never open, and with one or two channels to a layer nothing could be learned at all.
        """
        with torch.no_grad():
            for convolution in self.convolutions[:-1]:
                signs = convolution.weight.sum((1, 2, 3), keepdim=True).sign()
                convolution.weight.mul_(torch.where(signs < 0, -1.0, 1.0))
                _bias(convolution).zero_()

    def published_modules(self, block: int) -> dict[str, str]:
        """See ``Head.published_modules``."""
        places = [i for i, module in enumerate(self) if isinstance(module, nn.Conv2d)]
        names = [f"conv_d_{block + 2}_{number}" for number in range(1, len(places))]
        return {str(i): name for i, name in zip(places, [*names, f"conv_d_{block + 3}_1"], strict=True)}

    @property
    def convolutions(self) -> list[nn.Conv2d]:
        """The layers with weights, first to last."""
        return [module for module in self if isinstance(module, nn.Conv2d)]

    def forward(self, bridged: torch.Tensor) -> torch.Tensor:
        """Plainly: (n, 3, width) to logits (n, 3)."""
        stacked = bridged[:, [0, 1, 0, 2, 1, 2]].unsqueeze(1)  # (n, 1, 6, width)
        for module in self:
            stacked = module(stacked)
        return stacked.flatten(1)  # (n, 1, 1, 3) to (n, 3)

    def fast(self, bridged: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The same from (3, n, width), the three items first, by matrix products."""
        first, *later = self.convolutions
        block, *blocks = _BLOCKS[self.width]
        _, n, width = bridged.shape
        # The first kernel's two rows meet one item each, so a pair's signal is a sum of two that know one item.
        upper, lower = first.weight[:, 0, 0, :, None], first.weight[:, 0, 1, :, None]
        above = convolve(bridged[:2].reshape(2 * n, width, 1), upper, torch.zeros_like(_bias(first)), 1, width, block)
        below = convolve(bridged[1:].reshape(2 * n, width, 1), lower, _bias(first), 1, width, block)
        (a1, a2), (b2, b3) = (signal.view(2, n, -1, 2).unbind(0) for signal in (above, below))
        valid = width - first.kernel_size[1] + 1
        kept = a1.shape[1] if blocks[0] else valid
        signal = torch.stack([(a + b)[:, :kept] for a, b in ((a1, b2), (a1, b3), (a2, b3))], dim=2)
        signal = signal.flatten(2)  # (n, positions, 3 pairs × 2 channels)
        for convolution, block in zip(later, blocks, strict=True):
            stride, taps = convolution.stride[1], convolution.kernel_size[1]
            kernel = convolution.weight.permute(0, 3, 2, 1).flatten(2)  # (out, taps, pair × channel)
            signal = convolve(F.relu(signal), kernel, _bias(convolution), stride, valid, block)
            valid = (valid - taps) // stride + 1
        return signal[:, :valid, 0]


def _bias(convolution: nn.Conv2d) -> torch.Tensor:
    assert convolution.bias is not None  # torch's type allows it
    return convolution.bias


def build(shape: tuple[int, ...], parallel: bool = False) -> TripletHead:
    """``parallel``: one bridge for each of the three places, not a shared one."""
    return TripletHead(shape, ConvDecision, parallel)
