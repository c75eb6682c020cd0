import math

import pytest
import torch

from soflow.paths import path_coefficients, slope_coefficients, solution_coefficients, velocity_factor

TIMES = torch.linspace(0, 1, 11, dtype=torch.float64)


@pytest.mark.parametrize("path", ["linear", "trig"])
def test_path_runs_from_data_to_noise(path):
    ends = path_coefficients(path, torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends.alpha_t, torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(ends.beta_t, torch.tensor([0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("path", ["linear", "trig"])
def test_path_derivatives(path):
    t = TIMES.clone().requires_grad_()
    alpha_t, beta_t, dalpha_t, dbeta_t = path_coefficients(path, t)
    for value, derivative in ((alpha_t, dalpha_t), (beta_t, dbeta_t)):
        (expected,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, expected)


@pytest.mark.parametrize("parameterization", ["euler", "trig"])
def test_solution_at_its_own_time_is_the_identity(parameterization):
    a_tt, b_tt = solution_coefficients(parameterization, TIMES.float(), TIMES.float())
    assert (a_tt == 1).all()
    assert (b_tt == 0).all()


@pytest.mark.parametrize("parameterization", ["euler", "trig"])
def test_velocity_factor_is_the_derivative_of_b(parameterization):
    s = TIMES.clone().requires_grad_()
    a_ts, b_ts = solution_coefficients(parameterization, TIMES, s)
    (ds_b,) = torch.autograd.grad(b_ts.sum(), s, retain_graph=True)
    torch.testing.assert_close(ds_b, torch.full_like(s, velocity_factor(parameterization)))
    if a_ts.requires_grad:
        (ds_a,) = torch.autograd.grad(a_ts.sum(), s)
        torch.testing.assert_close(ds_a, torch.zeros_like(s), atol=1e-15, rtol=0)


@pytest.mark.parametrize("parameterization", ["euler", "trig"])
@pytest.mark.parametrize("r", [1.0, 0.1, 1e-3])
def test_slope_coefficients_are_the_divided_difference(parameterization, r):
    t = torch.tensor([0.9, 0.6, 0.3], dtype=torch.float64)
    s = torch.tensor([0.1, 0.2, 0.0], dtype=torch.float64)
    l = t + (s - t) * r
    x, v, F_t, dF = torch.tensor([[0.3, -1.2, 0.5], [1.0, 0.4, -2.0], [0.7, 0.1, 0.2], [0.01, -0.3, 0.05]]).double()
    (a_ts, b_ts), (a_ls, b_ls) = (solution_coefficients(parameterization, time, s) for time in (t, l))
    f_t, f_l = a_ts * x + b_ts * F_t, a_ls * (x + v * (l - t)) + b_ls * (F_t + dF)
    c = slope_coefficients(parameterization, t, l, s)
    q = c[:, 0] * x + c[:, 1] * v + c[:, 2] * F_t + c[:, 3] * dF
    torch.testing.assert_close(q, (f_t - f_l) / (t - l), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gap", [1e-1, 1e-4, 1e-6])
def test_slope_coefficients_do_not_cancel(gap):
    """float32 equals float64 on the same float32 times, at gaps where a subtraction would lose every digit."""
    t, s = torch.tensor([0.6, 0.95]), torch.tensor([0.2, 0.01])
    l = t - gap
    exact = slope_coefficients("trig", t.double(), l.double(), s.double())
    torch.testing.assert_close(slope_coefficients("trig", t, l, s).double(), exact, rtol=1e-6, atol=1e-6)
    euler = slope_coefficients("euler", t, l, s).double()
    torch.testing.assert_close(
        euler, slope_coefficients("euler", t.double(), l.double(), s.double()), rtol=1e-6, atol=0
    )


def test_trig_slope_tends_to_the_derivative():
    t, s = torch.tensor([0.6], dtype=torch.float64), torch.tensor([0.2], dtype=torch.float64)
    c = slope_coefficients("trig", t, t - 1e-9, s)
    angle = math.pi / 2 * (0.2 - 0.6)
    assert c[0, 0] == pytest.approx(math.pi / 2 * math.sin(angle), rel=1e-6)
    assert c[0, 2] == pytest.approx(-math.pi / 2 * math.cos(angle), rel=1e-6)
