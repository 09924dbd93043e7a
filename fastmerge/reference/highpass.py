"""FR-Merging's filter: a delta matrix loses the low frequencies of its two-dimensional spectrum before it is merged.

"FREE-Merging: Fourier Transform for Model Merging with Lightweight Experts", arXiv 2411.16815, and the code released
with it, which has another filter than the paper. For a matrix [H, W], its spectrum by fft2 without a shift, the
coefficient at row y and column x, and everything compared in float64:

    ideal:      D = ratio * min(H, W) / 2
                dropped where min(y, H - y)^2 + min(x, W - x)^2 < D^2                    the paper's high-pass
    official:   distance = sqrt((y - H // 2)^2 + (x - W // 2)^2)     R = ratio * min(H, W)
                kept where distance <= R; doubled where, further, distance == min(H, W) // 10

    filtered = the real part of ifft2(mask * fft2(x))

The released code adds two masks, one up to and one from the distance min(H, W) // 10 on: on the ring itself both are 1.
For odd sides its mask differs at k and -k, and taking the real part makes of it the mean of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor


def highpass_mask(height: int, width: int, ratio: float, mode: str) -> Tensor:
    """What each coefficient of fft2 is multiplied by, float64[height, width]: 0, 1 or, on the ring, 2."""
    side = min(height, width)
    y = torch.arange(height, dtype=torch.float64)[:, None]
    x = torch.arange(width, dtype=torch.float64)[None]
    if mode == "ideal":
        cutoff = ratio * side / 2
        squared = torch.minimum(y, height - y) ** 2 + torch.minimum(x, width - x) ** 2
        return (squared >= cutoff * cutoff).to(torch.float64)
    distance = ((y - height // 2) ** 2 + (x - width // 2) ** 2).sqrt()
    kept = distance <= ratio * side
    return kept * (1.0 + (distance == side // 10))


def highpass(x: Tensor, ratio: float, mode: str, out: Tensor) -> None:
    """Filter each matrix of `x` [..., H, W] into `out`: in float64, rounded to float32 and from there to `out`'s dtype.

    Where the mask is 1 everywhere the result is x itself.
    """
    if x.numel() == 0:
        return
    mask = highpass_mask(x.shape[-2], x.shape[-1], ratio, mode).to(x.device)
    if bool((mask == 1).all()):
        out.copy_(x)
    else:
        filtered = torch.fft.ifft2(torch.fft.fft2(x.to(torch.float64)) * mask).real
        out.copy_(filtered.to(torch.float32))
