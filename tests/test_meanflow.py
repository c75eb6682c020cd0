"""MeanFlow against its definition, retyped row by row in float64 with derivatives from reverse mode."""

import pytest
import torch
from test_objective import NULL, make_batch, make_flow
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from soflow import Batch, MeanFlow, SolutionFlow
from soflow.guidance import cfg_decay
from soflow.models import DiT
from soflow.slope import slope


def expected_losses(flow: SolutionFlow, batch: Batch, objective: MeanFlow) -> tuple[Tensor, Tensor, Tensor]:
    """The loss to back-propagate, and the mean squared errors of rows with s = t and of the others."""
    total, errors = torch.zeros((), dtype=torch.float64), []
    for b in range(len(batch)):
        x_0, x_1, t, s, label = (v[b : b + 1] for v in (batch.x_0, batch.x_1, batch.t, batch.s, batch.labels))
        s = t if b < batch.num_velocity else s
        if flow.path == "linear":
            z, v = (1 - t) * x_0 + t * x_1, x_1 - x_0
        else:
            angle = torch.pi / 2 * t
            z = torch.cos(angle) * x_0 + torch.sin(angle) * x_1
            v = torch.pi / 2 * (torch.cos(angle) * x_1 - torch.sin(angle) * x_0)
        null = torch.tensor([NULL])
        if batch.null_mask[b]:
            label = null
        elif objective.cfg_scale > 1:
            # omega v + kappa u(c) + (1 - omega - kappa) u(null), the scale of both being omega / (1 - kappa)
            scale = 1 + (objective.cfg_scale - 1) * cfg_decay(t, objective.cfg_decay_time)
            kappa = 1 - objective.mix_ratio
            omega = scale * (1 - kappa)
            with torch.no_grad():
                u_c, u_null = flow.network(z, t, t, label), flow.network(z, t, t, null)
            v = omega * v + kappa * u_c + (1 - omega - kappa) * u_null
        with sdpa_kernel(SDPBackend.MATH):
            u, du_dt = torch.autograd.functional.jvp(
                lambda z, t, s=s, label=label: flow.network(z, t, s, label),
                (z, t),
                (v, torch.ones_like(t)),
                create_graph=True,
            )
        error = u - (v - (t - s) * du_dt).detach()
        mse = error.square().mean()
        total = total + mse * (mse.detach() + objective.loss_eps) ** -objective.loss_p
        errors.append(mse.detach())
    nv = batch.num_velocity
    return total / len(batch), torch.stack(errors[:nv]).mean(), torch.stack(errors[nv:]).mean()


@pytest.mark.parametrize("path", ["linear", "trig"])
@pytest.mark.parametrize(("cfg_scale", "mix_ratio"), [(1.0, 1.0), (3.0, 1.0), (3.0, 0.25)])
def test_losses_and_gradients(path, cfg_scale, mix_ratio):
    flow, batch = make_flow(path), make_batch()
    objective = MeanFlow(cfg_scale, 0.6, mix_ratio, loss_p=0.75, loss_eps=0.02)
    out = objective(flow, batch)
    total, velocity_mse, consistency_mse = expected_losses(flow, batch, objective)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    ours, expected = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (out.loss, total))
    torch.testing.assert_close(out.loss, total, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.velocity_mse, velocity_mse, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(out.consistency_mse, consistency_mse, rtol=1e-9, atol=1e-10)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("num_velocity", [0, 6])
def test_either_kind_of_rows_alone(num_velocity):
    flow, batch = make_flow(), make_batch(num_velocity=num_velocity)
    out = MeanFlow(3.0, 0.8, 0.25)(flow, batch)
    kind = out.velocity_loss if num_velocity else out.consistency_loss
    torch.testing.assert_close(out.loss.detach(), kind)
    assert out.velocity_mse + out.consistency_mse == (out.velocity_mse if num_velocity else out.consistency_mse)


def test_the_target_is_the_limit_of_soflows_slope():
    """With the gap going to zero, SoFlow's slope is the error of MeanFlow's identity: both learn the same function."""
    flow, batch = make_flow(), make_batch(num_velocity=0, r=1e-9)
    objective = MeanFlow()
    x_t, v_t = objective.point(flow, batch)
    labels = torch.where(batch.null_mask, NULL, batch.labels)
    with torch.no_grad():
        gap = (batch.t - batch.s)[:, None, None, None]
        error = flow.network(x_t, batch.t, batch.s, labels) - v_t + gap * objective.derivative(flow, batch, x_t, v_t)
    q = slope(flow, x_t, v_t, batch.t, batch.t - 1e-9, batch.s, labels).q
    torch.testing.assert_close(-error, q, rtol=1e-6, atol=1e-7)


def test_unconditional_batch():
    flow, batch = make_flow(), make_batch()
    unlabelled = Batch(batch.x_0, batch.x_1, batch.t, batch.l, batch.s, None, batch.null_mask, 2)
    null = Batch(batch.x_0, batch.x_1, batch.t, batch.l, batch.s, torch.full((6,), NULL), batch.null_mask, 2)
    torch.testing.assert_close(MeanFlow(3.0)(flow, unlabelled).loss, MeanFlow(1.0)(flow, null).loss)


def test_what_has_no_mean_velocity_is_refused():
    with pytest.raises(ValueError, match="parameterization: got 'trig', expected 'euler'"):
        MeanFlow()(make_flow("linear", "trig"), make_batch())
    flow = make_flow()
    flow.network.dropout = 0.3
    with pytest.raises(ValueError, match=r"dropout: got 0\.3, expected 0"):
        MeanFlow()(flow, make_batch())


def test_derivative_needs_no_gradient_and_leaves_none():
    torch.manual_seed(0)
    flow, batch = SolutionFlow(DiT(4, 2, 2, 16, 2, 2, NULL).double()), make_batch()
    x_t, v_t = MeanFlow().point(flow, batch)
    assert not MeanFlow().derivative(flow, batch, x_t, v_t).requires_grad
