"""Times of the training rows, and the schedule of the gap ratio r that places the middle time."""

import math
from typing import Literal

import torch
from torch import Tensor

GapMethod = Literal["const", "linear", "cosine", "exponential"]

# Least distance of s and l from t: the slope divides by t - l.
MIN_GAP = 1e-4


def gap_ratio(step: int, total_steps: int, gap_init: float, gap_end: float, method: GapMethod) -> float:
    """Return r(k, K) at the 0-based `step` k of `total_steps` K.

    const: r_end; linear and cosine: from r_init to r_end; exponential: r_init (r_end / r_init)^(k / K).
    Source: arXiv 2512.15657, schedules of r(k, K).
    """
    progress = step / total_steps
    if method == "const":
        return gap_end
    if method == "linear":
        return gap_init + (gap_end - gap_init) * progress
    if method == "cosine":
        return gap_end + (gap_init - gap_end) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if method == "exponential":
        return gap_init * (gap_end / gap_init) ** progress
    raise ValueError(f"method: got {method!r}, expected const, linear, cosine or exponential")


def middle_time(t: Tensor, s: Tensor, r: float | Tensor) -> Tensor:
    """Return l = min(t + (s - t) r, t - 1e-4), (B,): the time the look-ahead steps to.  t, s: (B,)."""
    return torch.minimum(t + (s - t) * r, t - MIN_GAP)


def at_least_gap(t: Tensor, l: Tensor) -> Tensor:
    """Return whether `middle_time` put l at the least gap below t, (B,) bool.  t, l: (B,)."""
    return l >= t - MIN_GAP


def logit_normal(z: Tensor, mean: float, std: float) -> Tensor:
    """Return sigmoid(std z + mean), the logit-normal time of a standard normal z."""
    return torch.sigmoid(z * std + mean)


def ordered_times(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return t = max(a, b) and s = min(a, b), as MeanFlow draws them."""
    return torch.maximum(a, b), torch.minimum(a, b)


def consistency_times(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return t = max(t, 1e-4) and s = min(s, t - 1e-4): drawn independently, s may lie at the least gap below t."""
    t = t.clamp(min=MIN_GAP)
    return t, torch.minimum(s, t - MIN_GAP)
