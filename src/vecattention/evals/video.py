"""How much two videos differ: PSNR and SSIM, as the published comparison computes them.

Frames are compared one by one in [0, 1] and averaged over the video. SSIM takes an 11 x 11 uniform window at every
pixel, with zeros beyond the edges, C1 = 0.01^2 and C2 = 0.03^2, and the mean over pixels and channels
(Wang et al. 2004, with a uniform instead of a Gaussian window).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

WINDOW = 11
LEAST = 1e-10


def psnr(one: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, mean over frames; 100 for equal videos.

    Args:
        one, other: uint8 [T, H, W, 3].

    Raises:
        TypeError, ValueError: not such tensors, or of different shapes.

    Example:
        >>> black = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
        >>> psnr(black, black), round(psnr(black, black + 255), 3)
        (100.0, 0.0)
    """
    _check(one, other)
    error = ((one.double() - other.double()) / 255).pow(2).flatten(1).mean(1)
    return float((-10 * error.clamp(min=LEAST).log10()).mean())


def ssim(one: Tensor, other: Tensor) -> float:
    """Structural similarity, mean over frames, pixels and channels; 1 for equal videos.

    Args:
        one, other: uint8 [T, H, W, 3].

    Raises:
        TypeError, ValueError: not such tensors, or of different shapes.

    Example:
        >>> noise = torch.randint(256, (1, 32, 32, 3), dtype=torch.uint8)
        >>> round(ssim(noise, noise), 6), ssim(noise, 255 - noise) < 0
        (1.0, True)
    """
    _check(one, other)
    total = 0.0
    for a, b in zip(one, other, strict=True):
        total += float(_similar(*(x.permute(2, 0, 1)[None].double() / 255 for x in (a, b))))
    return total / len(one)


def _similar(x: Tensor, y: Tensor) -> Tensor:
    c1, c2 = 0.01**2, 0.03**2
    mean_x, mean_y = _mean(x), _mean(y)
    var_x, var_y = _mean(x * x) - mean_x**2, _mean(y * y) - mean_y**2
    both = _mean(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return (above / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean()


def _mean(x: Tensor) -> Tensor:
    return avg_pool2d(x, WINDOW, stride=1, padding=WINDOW // 2)


def _check(one: Tensor, other: Tensor) -> None:
    for name, video in (("one", one), ("other", other)):
        if not isinstance(video, Tensor) or video.dtype != torch.uint8:
            kind = video.dtype if isinstance(video, Tensor) else type(video).__name__
            raise TypeError(
                f"{name} is {kind}, wanted a uint8 tensor [T, H, W, 3]; convert it with torch.as_tensor(...)"
            )
        if video.ndim != 4 or video.shape[3] != 3 or not len(video):
            raise ValueError(f"{name} has shape {tuple(video.shape)}, wanted [T, H, W, 3], T >= 1; permute the axes")
    if one.shape != other.shape:
        raise ValueError(f"other has shape {tuple(other.shape)}, wanted {tuple(one.shape)} like one; make both alike")
