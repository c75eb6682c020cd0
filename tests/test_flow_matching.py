import pytest
import torch
from test_objective import make_batch, make_flow

from soflow import FlowMatching, Objective


@pytest.mark.parametrize(("path", "parameterization"), [("linear", "euler"), ("trig", "trig"), ("linear", "trig")])
@pytest.mark.parametrize(("cfg_scale", "mix_ratio"), [(1.0, 1.0), (3.0, 1.0), (3.0, 0.25)])
def test_losses_and_gradients_are_those_of_soflows_velocity_rows(path, parameterization, cfg_scale, mix_ratio):
    flow, batch = make_flow(path, parameterization), make_batch(num_velocity=6)
    settings = (cfg_scale, 0.6, mix_ratio, 0.75, 0.02)
    out, same = FlowMatching(*settings)(flow, batch), Objective(*settings)(flow, batch)
    assert out.loss == same.loss
    assert out.velocity_mse == same.velocity_mse
    assert out.consistency_mse == 0
    parameters = [p for p in flow.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad(o.loss, parameters, allow_unused=True) for o in (out, same)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_loss_is_the_weighted_error_of_the_velocity():
    """Without guidance, against the definition: mean over rows of |F(x_t, t, t) - (x_1 - x_0)|^2, weighted."""
    flow, batch = make_flow(), make_batch(num_velocity=6)
    out = FlowMatching(loss_p=0.75, loss_eps=0.02)(flow, batch)
    labels = torch.where(batch.null_mask, 5, batch.labels)
    t = batch.t[:, None, None, None]
    v_pred = flow.network((1 - t) * batch.x_0 + t * batch.x_1, batch.t, batch.t, labels)
    mse = (v_pred - (batch.x_1 - batch.x_0)).square().flatten(1).mean(1)
    torch.testing.assert_close(out.loss, (mse * (mse.detach() + 0.02) ** -0.75).mean())


def test_consistency_rows_are_refused():
    with pytest.raises(ValueError, match="num_velocity: got 2 of 6 rows, expected all of them"):
        FlowMatching()(make_flow(), make_batch(num_velocity=2))
