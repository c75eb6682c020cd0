"""The slope q of the solution along the trajectory: the finite difference that training takes, and its exact limit."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from soflow.flow import SolutionFlow
from soflow.kernels import reference
from soflow.paths import slope_coefficients, solution_coefficients

Lookahead = Literal["difference", "two_pass"]
LOOKAHEADS: tuple[Lookahead, ...] = ("two_pass", "difference")


class Slope(NamedTuple):
    """F_t = F(x, t, s), dF = F(x + v (l - t), l, s) - F_t and the slope q they give, all (B, C, H, W)."""

    F_t: Tensor
    dF: Tensor
    q: Tensor


@torch.no_grad()
def slope(
    flow: SolutionFlow,
    x: Tensor,
    v: Tensor,
    t: Tensor,
    l: Tensor,
    s: Tensor,
    labels: Tensor | None = None,
    *,
    lookahead: Lookahead = "difference",
) -> Slope:
    """Return the slope q = (f(x, t, s) - f(x + v (l - t), l, s)) / (t - l), without gradient.

    x, v: (B, C, H, W).  t, l, s: (B,), s <= l < t.  lookahead: "difference" takes dF from difference propagation,
    "two_pass" evaluates F twice and subtracts.
    """
    dx = v * (l - t).view(-1, 1, 1, 1)
    if lookahead == "difference":
        F_t, dF = flow.network.forward_difference(x, dx, t, l - t, s, labels)
    else:
        F_t = flow.network(x, t, s, labels)
        dF = flow.network(x + dx, l, s, labels) - F_t
    c = slope_coefficients(flow.parameterization, t, l, s).view(-1, 4, 1, 1, 1).unbind(1)
    return Slope(F_t, dF, c[0] * x + c[1] * v + c[2] * F_t + c[3] * dF)


def exact_slope(flow: SolutionFlow, x: Tensor, v: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the limit of `slope` as l goes to t: d f(x + v (l - t), l, s) / d l at l = t, (B, C, H, W).

    By forward-mode differentiation, so the network must compute with the reference ops, and without dropout.
    """

    def solve(x: Tensor, t: Tensor) -> Tensor:
        F_t = flow.network(x, t, s, labels)
        return reference.solution_map(x, F_t, *solution_coefficients(flow.parameterization, t, s))

    # the fused kernels of attention have no forward mode
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(solve, (x, t), (v, torch.ones_like(t)))[1]
