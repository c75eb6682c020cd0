"""Classifier-free guidance inside training: its strength, and the mix with the network's own prediction, per row."""

from typing import NamedTuple

import torch
from torch import Tensor

DECAY_RATE = 0.025


def cfg_decay(t: Tensor, decay_time: float) -> Tensor:
    """Return d(t): 1 for t <= decay_time, else 1 - exp(-0.025 u / (1 - u)), u = (1 - t) / (1 - decay_time).

    u is clamped to [0, 1 - 1e-6]; all ones where decay_time >= 1. Fades the guidance out towards pure noise with a
    velocity field that stays smooth. Source: arXiv 2512.15657, CFG decay.
    """
    if decay_time >= 1.0:
        return torch.ones_like(t)
    u = ((1.0 - t) / (1.0 - decay_time)).clamp(0.0, 1.0 - 1e-6)
    return torch.where(t <= decay_time, torch.ones_like(t), -torch.expm1(-DECAY_RATE * u / (1.0 - u)))


class RowGuidance(NamedTuple):
    """Per row: v = m (v_t + g (v_t - v_uncond)) + (1 - m) v_cond, with strength g and mix m, both (B,)."""

    strength: Tensor
    mix: Tensor


def row_guidance(
    t: Tensor, null_mask: Tensor, cfg_scale: float, cfg_decay_time: float, mix_ratio: float
) -> RowGuidance:
    """Return g = d(t) (cfg_scale - 1) and m = mix_ratio; rows of the null mask take the raw velocity, g = 0, m = 1."""
    strength = torch.where(null_mask, 0.0, cfg_decay(t, cfg_decay_time) * (cfg_scale - 1.0))
    return RowGuidance(strength, torch.where(null_mask, torch.ones_like(t), mix_ratio))
