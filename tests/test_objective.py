"""The objective against formulas retyped from the paper, in float64, with torch.autograd for the gradients."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from soflow import Batch, FlowMatching, MeanFlow, Objective, SolutionFlow, middle_time
from soflow.guidance import cfg_decay
from soflow.models import DiT, build_network

NULL = 5


def make_flow(path: str = "linear", parameterization: str = "euler") -> SolutionFlow:
    torch.manual_seed(0)
    network = DiT(4, 2, 2, 16, 2, 2, NULL).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return SolutionFlow(network, path, parameterization)


def make_batch(num: int = 6, num_velocity: int = 2, r: float = 0.1, dtype: torch.dtype = torch.float64) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x_0, x_1 = torch.randn(2, num, 2, 4, 4, generator=generator, dtype=dtype)
    t, s = torch.rand(2, num, generator=generator, dtype=dtype).sort(0, descending=True).values
    labels = torch.arange(num) % NULL
    null_mask = torch.arange(num) % 3 == 1
    return Batch(x_0, x_1, t, middle_time(t, s, r), s, labels, null_mask, num_velocity)


def angle(u: Tensor) -> Tensor:
    return math.pi / 2 * u


def coefficients(parameterization: str, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    if parameterization == "euler":
        return torch.ones_like(t), s - t
    return torch.cos(angle(s - t)), torch.sin(angle(s - t))


def expected_losses(flow: SolutionFlow, batch: Batch, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Row by row: sum of the losses to back-propagate, mean squared velocity error, mean squared slope."""
    velocity_rows, slope_rows, total = [], [], torch.zeros((), dtype=torch.float64)
    factor = 1.0 if flow.parameterization == "euler" else math.pi / 2
    for b in range(len(batch)):
        x_0, x_1, t, l, s = (v[b : b + 1] for v in (batch.x_0, batch.x_1, batch.t, batch.l, batch.s))
        if flow.path == "linear":
            x_t, v_t = (1 - t) * x_0 + t * x_1, x_1 - x_0
        else:
            x_t = torch.cos(angle(t)) * x_0 + torch.sin(angle(t)) * x_1
            v_t = math.pi / 2 * (torch.cos(angle(t)) * x_1 - torch.sin(angle(t)) * x_0)
        is_velocity, is_null = b < batch.num_velocity, bool(batch.null_mask[b])
        label = None if batch.labels is None else batch.labels[b : b + 1]
        trained_label = label if label is None or not is_null else torch.tensor([NULL])
        target = v_t
        if label is not None and objective.cfg_scale > 1 and not is_null:
            with torch.no_grad():
                uncond = factor * flow.network(x_t, t, t, torch.tensor([NULL]))
                cond = factor * flow.network(x_t, t, t, label)
            g = cfg_decay(t, objective.cfg_decay_time) * (objective.cfg_scale - 1)
            target = objective.mix_ratio * (v_t + g * (v_t - uncond)) + (1 - objective.mix_ratio) * cond
        if is_velocity:
            error = factor * flow.network(x_t, t, t, trained_label) - target
            mse = error.square().mean()
            weight = 1 / (factor * (mse.detach() + objective.loss_eps) ** objective.loss_p)
            total = total + weight * mse
            velocity_rows.append(mse)
        else:
            F_t = flow.network(x_t, t, s, trained_label)
            a_ts, b_ts = coefficients(flow.parameterization, t, s)
            a_ls, b_ls = coefficients(flow.parameterization, l, s)
            x_l = x_t + target * (l - t)
            with torch.no_grad():
                f_l = a_ls * x_l + b_ls * flow.network(x_l, l, s, trained_label)
                q = (a_ts * x_t + b_ts * F_t - f_l) / (t - l)
                weight = (q.square().mean() + objective.loss_eps) ** -objective.loss_p
            total = total + torch.sign(b_ts) * (F_t * q * weight).mean()
            slope_rows.append(q.square().mean())
    return total.squeeze() / len(batch), torch.stack(velocity_rows).mean(), torch.stack(slope_rows).mean()


@pytest.mark.parametrize("lookahead", ["difference", "two_pass"])
@pytest.mark.parametrize(("path", "parameterization"), [("linear", "euler"), ("trig", "trig"), ("linear", "trig")])
@pytest.mark.parametrize(("cfg_scale", "mix_ratio"), [(1.0, 1.0), (3.0, 1.0), (3.0, 0.25)])
def test_losses_and_gradients(path, parameterization, cfg_scale, mix_ratio, lookahead):
    flow, batch = make_flow(path, parameterization), make_batch()
    if cfg_scale == 1.0:
        # no guidance, but rows of the null mask still train the null label
        assert batch.null_mask.any()
    objective = Objective(cfg_scale, 0.6, mix_ratio, loss_p=0.75, loss_eps=0.02, lookahead=lookahead)
    out = objective(flow, batch)
    total, velocity_mse, consistency_mse = expected_losses(flow, batch, objective)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    ours, expected = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (out.loss, total))
    torch.testing.assert_close(out.loss, total, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(out.velocity_mse, velocity_mse.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(out.consistency_mse, consistency_mse, rtol=1e-8, atol=1e-10)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_loss_is_the_weighted_sum_of_its_parts():
    out = Objective(3.0, 0.8, 0.25)(make_flow(), make_batch(6, 2))
    torch.testing.assert_close(out.loss.detach(), (2 * out.velocity_loss + 4 * out.consistency_loss) / 6)
    assert not out.velocity_loss.requires_grad


@pytest.mark.parametrize("lookahead", ["difference", "two_pass"])
def test_statistics_of_the_look_ahead(lookahead):
    """Unguided, dx = v (l - t); every third row is so near to its s that l is at the least gap."""
    flow, batch = make_flow(), make_batch(7, 2)
    s = torch.where(torch.arange(7) % 3 == 0, batch.t - 1e-4, batch.s)
    batch = replace(batch, s=s, l=middle_time(batch.t, s, 0.1))
    out = Objective(lookahead=lookahead)(flow, batch)
    rows = slice(2, None)
    t, l = batch.t[rows], batch.l[rows]
    x_t = (1 - t)[:, None, None, None] * batch.x_0[rows] + t[:, None, None, None] * batch.x_1[rows]
    dx = (batch.x_1 - batch.x_0)[rows] * (l - t)[:, None, None, None]
    labels = torch.where(batch.null_mask, NULL, batch.labels)[rows]
    with torch.no_grad():
        dF = flow.network(x_t + dx, l, s[rows], labels) - flow.network(x_t, t, s[rows], labels)
    expected = torch.tensor([dx.square().sum() / 5, dF.square().sum() / 5, 2 / 5], dtype=torch.float64)
    torch.testing.assert_close(out.watched, expected)
    assert not out.watched.requires_grad
    none = Objective(lookahead=lookahead)(flow, make_batch(4, 4))
    assert torch.equal(none.watched, torch.zeros(3, dtype=torch.float64))


def test_unconditional_batch():
    flow, objective = make_flow(), Objective(3.0)
    unlabelled = replace(make_batch(), labels=None)
    null = replace(unlabelled, labels=torch.full((6,), NULL))
    torch.testing.assert_close(objective(flow, unlabelled).loss, Objective(1.0)(flow, null).loss)


def test_consistency_gradient_is_half_that_of_the_weighted_square():
    flow, batch = make_flow(), make_batch(num_velocity=0)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    ours = torch.autograd.grad(Objective()(flow, batch).loss, parameters)
    labels = torch.where(batch.null_mask, NULL, batch.labels)
    t, l = batch.t[:, None, None, None], batch.l[:, None, None, None]
    x_t, v_t = (1 - t) * batch.x_0 + t * batch.x_1, batch.x_1 - batch.x_0
    with torch.no_grad():
        f_l = flow.solve(x_t + v_t * (l - t), batch.l, batch.s, labels)
    q = (flow.solve(x_t, batch.t, batch.s, labels) - f_l) / (t - l)
    square = q.square().flatten(1).mean(1)
    # d q / d F = b / (t - l); the weight divides by its size, and by (mean q^2 + eps)^p
    weight = (t - l).flatten() / (batch.t - batch.s) / (square.detach() + 0.01)
    half = torch.autograd.grad(0.5 * (weight * square).mean(), parameters)
    for a, b in zip(ours, half, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"cfg_scale": 0.5}, "cfg_scale: got 0.5"), ({"lookahead": "jvp"}, "lookahead: got 'jvp'")],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Objective(**arguments)


def test_two_evaluations_with_dropout_are_refused():
    flow, batch = make_flow(), make_batch()
    flow.network.dropout = 0.3
    with pytest.raises(ValueError, match=r"lookahead: got 'two_pass' with dropout 0\.3"):
        Objective(lookahead="two_pass")(flow, batch)
    Objective(lookahead="two_pass")(flow.eval(), batch)


@pytest.mark.parametrize("mix_ratio", [0.25, 1.0])
def test_every_call_of_a_row_has_its_draw_keys(mix_ratio):
    """So that guidance drops what the trained call drops, and draws nothing from the global generator."""
    flow = make_flow()
    batch = replace(make_batch(), draw_keys=torch.arange(18).view(6, 3))
    seen: list[Tensor] = []
    flow.network.register_forward_pre_hook(
        lambda _, args, named: seen.append([*args, *named.values()][-1]), with_kwargs=True
    )
    Objective(3.0, 0.8, mix_ratio, lookahead="two_pass")(flow, batch)
    both = torch.cat((batch.draw_keys, batch.draw_keys[2:]))
    expected = [batch.draw_keys if mix_ratio == 1.0 else both, batch.draw_keys, batch.draw_keys[2:]]
    assert len(seen) == 3
    assert all(torch.equal(keys, wanted) for keys, wanted in zip(seen, expected, strict=True))


@pytest.mark.parametrize(
    ("objective", "num_velocity", "num_calls"),
    [(Objective(lookahead="two_pass"), 2, 2), (MeanFlow(), 2, 2), (FlowMatching(), 6, 1)],
)
def test_every_call_of_a_row_is_told_its_augmentation(objective, num_velocity, num_calls):
    """All rows, then those that look ahead; and their draw keys, but for MeanFlow, which has no dropout."""
    shape = {"input_size": 4, "in_channels": 2, "model_channels": 8, "channel_mult": (1,), "num_blocks": 1}
    network = build_network("UNet", **shape, attn_resolutions=(), dropout=0.0).double()
    told, keys = torch.randn(6, 6, dtype=torch.float64), torch.arange(18).view(6, 3)
    batch = replace(make_batch(6, num_velocity), labels=None, augment_labels=told, draw_keys=keys)
    seen: list[tuple[Tensor, ...]] = []
    network.register_forward_pre_hook(lambda _, args: seen.append(args[4:]))
    objective(SolutionFlow(network), batch)
    rows = (slice(None), slice(num_velocity, None))[:num_calls]
    for conditions, part in zip(seen, rows, strict=True):
        assert torch.equal(conditions[0], told[part])
        if not isinstance(objective, MeanFlow):
            assert torch.equal(conditions[1], keys[part])


@pytest.mark.parametrize(
    ("objective", "calls"),
    [
        # of 12 rows: 12 without label, 6 with; three times 12 for forward and backward; and 6 differences
        (Objective(3.0, 0.8, 0.25), 12 + 6 + 36 + 6),
        (Objective(3.0, 0.8, 1.0), 12 + 36 + 6),
        (Objective(), 36 + 6),
        (MeanFlow(), 36 + 12),
        (FlowMatching(3.0, 0.8, 0.25), 12 + 36),
    ],
)
def test_operations_of_a_step(objective, calls):
    """The count that MFU uses against torch's of forward and backward, where attention is a small part."""
    flow = SolutionFlow(DiT(4, 2, 2, 128, 4, 2, NULL))
    num_velocity = 12 if isinstance(objective, FlowMatching) else 6
    assert objective.step_calls(12, num_velocity, conditional=True) == calls
    assert objective.step_calls(12, num_velocity, conditional=False) == calls - (objective.cfg_scale > 1) * (
        12 if num_velocity == 12 or objective.mix_ratio == 1 else 18
    )
    batch = make_batch(12, num_velocity, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        objective(flow, batch).loss.backward()
    # torch counts one more product per row of a derivative: with the tangent of the weight, which is zero
    calls += 6 * isinstance(objective, MeanFlow)
    assert counter.get_total_flops() == pytest.approx(calls * flow.network.forward_flops(), rel=0.05)
