"""The slope against functions whose derivative is known, and its exact limit against networks in float64."""

import math

import pytest
import tiny
import torch
from torch import Tensor

from soflow import SolutionFlow
from soflow.models import Network
from soflow.slope import LOOKAHEADS, exact_slope, slope


class Formula(Network):
    """F(x, t, s) = x^2 sin(t) + s, which every network test can differentiate by hand."""

    num_classes = 0

    def bf16_modules(self) -> tuple[()]:
        return ()

    def forward_flops(self) -> int:
        return 0

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: None = None, augment_labels: None = None) -> Tensor:
        t, s = t[:, None, None, None], s[:, None, None, None]
        return x * x * torch.sin(t) + s

    def forward_difference(self, x, dx, t, dt, s, labels=None, augment_labels=None):
        F_t = self(x, t, s)
        return F_t, self(x + dx, t + dt, s) - F_t


def rows(num: int = 3, channels: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, v = torch.randn(2, num, channels, 8, 8, generator=generator, dtype=torch.float64)
    s, t = torch.rand(2, num, generator=generator, dtype=torch.float64).sort(0).values
    return x, v, t, s


@pytest.mark.parametrize("parameterization", ["euler", "trig"])
def test_exact_slope_of_a_formula(parameterization):
    x, v, t, s = rows()
    t_, s_ = t[:, None, None, None], s[:, None, None, None]
    F_t = x * x * torch.sin(t_) + s_
    dF_dl = 2 * x * v * torch.sin(t_) + x * x * torch.cos(t_)
    if parameterization == "euler":
        expected = v - F_t + (s_ - t_) * dF_dl
    else:
        quarter = math.pi / 2
        cos, sin = torch.cos(quarter * (s_ - t_)), torch.sin(quarter * (s_ - t_))
        expected = quarter * sin * x + cos * v - quarter * cos * F_t + sin * dF_dl
    q = exact_slope(SolutionFlow(Formula(), parameterization=parameterization), x, v, t, s)
    torch.testing.assert_close(q, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("parameterization", ["euler", "trig"])
def test_slope_is_the_divided_difference(parameterization, lookahead):
    flow, (x, v, t, s) = SolutionFlow(Formula(), parameterization=parameterization), rows()
    l = t + 0.3 * (s - t)
    f_t, f_l = flow.solve(x, t, s), flow.solve(x + v * (l - t)[:, None, None, None], l, s)
    found = slope(flow, x, v, t, l, s, lookahead=lookahead)
    torch.testing.assert_close(found.q, (f_t - f_l) / (t - l)[:, None, None, None], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.F_t, flow.network(x, t, s))


@pytest.mark.parametrize("name", ["DiT", "UNet"])
@pytest.mark.parametrize("parameterization", ["euler", "trig"])
def test_slope_goes_to_its_exact_limit_in_first_order(name, parameterization):
    flow, (x, v, t, s) = SolutionFlow(tiny.network(name).double(), parameterization=parameterization), rows()
    labels = torch.tensor([3, 1, 10]) if name == "DiT" else None
    exact = exact_slope(flow, x, v, t, s, labels)
    assert not exact.requires_grad
    errors = [(slope(flow, x, v, t, t + r * (s - t), s, labels).q - exact).norm() for r in (2e-4, 1e-4)]
    assert errors[1] < 1e-2 * exact.norm()
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.02)
