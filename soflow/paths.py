"""Coefficients of the path between data and noise, and of the solution f(x, t, s) = a(t, s) x + b(t, s) F(x, t, s).

Times are tensors of any float dtype and shape; every result has theirs. t = 1 is noise, t = 0 is data.
Source: arXiv 2512.15657, path and parameterization.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Path = Literal["linear", "trig"]
Parameterization = Literal["euler", "trig"]

QUARTER_TURN = math.pi / 2.0


class PathCoefficients(NamedTuple):
    """x_t = alpha_t x_0 + beta_t x_1 and v_t = dalpha_t x_0 + dbeta_t x_1."""

    alpha_t: Tensor
    beta_t: Tensor
    dalpha_t: Tensor
    dbeta_t: Tensor


def path_coefficients(path: Path, t: Tensor) -> PathCoefficients:
    """Return alpha, beta and their time derivatives: 1 - t and t, or cos and sin of pi t / 2."""
    if path == "linear":
        ones = torch.ones_like(t)
        return PathCoefficients(1.0 - t, t, -ones, ones)
    cos, sin = torch.cos(QUARTER_TURN * t), torch.sin(QUARTER_TURN * t)
    return PathCoefficients(cos, sin, -QUARTER_TURN * sin, QUARTER_TURN * cos)


def solution_coefficients(parameterization: Parameterization, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return a(t, s) and b(t, s): 1 and s - t, or cos and sin of pi (s - t) / 2; exactly 1 and 0 at s = t."""
    if parameterization == "euler":
        return torch.ones_like(t), s - t
    angle = QUARTER_TURN * (s - t)
    return torch.cos(angle), torch.sin(angle)


def velocity_factor(parameterization: Parameterization) -> float:
    """Return db/ds at s = t, so that the velocity is velocity_factor * F(x, t, t); da/ds is 0 there."""
    return 1.0 if parameterization == "euler" else QUARTER_TURN


def slope_coefficients(parameterization: Parameterization, t: Tensor, l: Tensor, s: Tensor) -> Tensor:
    """Return c, (B, 4), with (f_t - f_l) / (t - l) = c_x x_t + c_v v + c_F F_t + c_d dF.

    f_l is taken at x_l = x_t + v (l - t), and dF = F(x_l, l, s) - F(x_t, t, s). The differences a_t - a_l and b_t - b_l
    are in closed form, never subtracted. t, l, s: (B,), l < t.
    """
    gap = t - l
    a_ls, b_ls = solution_coefficients(parameterization, l, s)
    if parameterization == "euler":
        da_ts, db_ts = torch.zeros_like(t), -torch.ones_like(t)
    else:
        # cos A - cos B and sin A - sin B with A - B = -pi / 2 (t - l), by the sum-to-product identities
        middle = QUARTER_TURN * 0.5 * ((s - t) + (s - l))
        chord = 2.0 * torch.sin(QUARTER_TURN * 0.5 * gap) / gap
        da_ts, db_ts = torch.sin(middle) * chord, -torch.cos(middle) * chord
    return torch.stack((da_ts, a_ls, db_ts, -b_ls / gap), dim=1)
