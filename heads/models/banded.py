"""Short convolutions of long, narrow signals as matrix products.

The conv decision block slides kernels of 50 to 100 taps, with one or two channels, over 4,096 positions. Convolution
libraries are built for many channels; here they reach a few GFLOP/s. So a signal is cut into blocks, and the kernel
becomes a banded (Toeplitz) matrix: a block of outputs is the product of the band with the blocks of inputs that it
touches. That multiplies by some zeros of the band and still is several times faster, because it is all matrix
product, without a copied window. Same mathematics, another order of the sums.
"""

from typing import Any

import torch
import torch.nn.functional as F


class _BlockProduct(torch.autograd.Function):
    """y[r] = bias + Σ_q blocks[r + q] @ band_q, where band_q are ``width`` rows of ``band`` each.

    ``blocks`` (R, width) are consecutive; the band reaches as many of them as it is long. The last rows of y lack the
    blocks after the end, so their outputs that need them are meaningless, as are those that reach into the next sample.
    """

    @staticmethod
    def forward(ctx: Any, blocks: torch.Tensor, band: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        rows, width = blocks.shape
        out = torch.addmm(bias, blocks, band[:width])
        for q, start in enumerate(range(width, len(band), width), start=1):
            part = band[start : start + width]
            out[: rows - q].addmm_(blocks[q:, : len(part)], part)
        ctx.save_for_backward(blocks, band)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        blocks, band = ctx.saved_tensors
        rows, width = blocks.shape
        to_blocks = gradient @ band[:width].t() if ctx.needs_input_grad[0] else None
        to_band = torch.empty_like(band)
        torch.mm(blocks.t(), gradient, out=to_band[:width])
        for q, start in enumerate(range(width, len(band), width), start=1):
            part = band[start : start + width]
            torch.mm(blocks[q:, : len(part)].t(), gradient[: rows - q], out=to_band[start : start + width])
            if to_blocks is not None:
                to_blocks[q:, : len(part)].addmm_(gradient[: rows - q], part.t())
        return to_blocks, to_band, gradient.sum(0)


def _band(kernel: torch.Tensor, block: int, stride: int) -> torch.Tensor:
    """The kernel (o, k) laid out ``block`` times, each ``stride`` further down: (stride * (block - 1) + k, block * o)."""
    out, taps = kernel.shape
    height = stride * (block - 1) + taps
    # Rows of length height + stride, cut again at length height: each begins ``stride`` later in the one before it.
    padded = F.pad(kernel, (0, height + stride - taps)).unsqueeze(1).expand(out, block, height + stride)
    shifted = padded.reshape(out, -1)[:, : block * height].reshape(out, block, height)
    return shifted.permute(2, 1, 0).reshape(height, block * out)


def convolve(
    signals: torch.Tensor, kernel: torch.Tensor, bias: torch.Tensor, stride: int, valid: int, block: int | None
) -> torch.Tensor:
    """A one-dimensional convolution of ``signals`` (n, length, channels) with ``kernel`` (o, taps, channels).

    Only the first ``valid`` positions of the signals are looked at. Returns (n, length', o), channels running fastest, of
    which the first ``(valid - taps) // stride + 1`` positions are the result. ``block`` outputs are computed as one
    product; there are then more positions after the result, finite numbers that nothing may look at. With ``block`` None
    a whole signal is one product, and there are none: better for short signals, where most of the band is not zero.
    """
    n, length, channels = signals.shape
    outputs = (valid - kernel.shape[1]) // stride + 1
    if block is None:
        band = _band(kernel.flatten(1), outputs, stride * channels)
        flat = signals[:, :valid].reshape(n, -1)[:, : len(band)]
        return torch.addmm(bias.repeat(outputs), flat, band).view(n, outputs, -1)
    short = -length % (block * stride)
    if short:
        signals = F.pad(signals, (0, 0, 0, short))
    blocks = signals.reshape(-1, block * stride * channels)
    band = _band(kernel.flatten(1), block, stride * channels)
    product: torch.Tensor = _BlockProduct.apply(blocks, band, bias.repeat(block))
    return product.view(n, -1, kernel.shape[0])
