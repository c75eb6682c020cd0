"""The audit against functions whose bias is known by hand, and its predictions against networks."""

import dataclasses
import math

import pytest
import test_trainer
import tiny
import torch
from torch import Tensor

from soflow import SolutionFlow, checkpoint
from soflow.audit import (
    CANDIDATES_PER_SAMPLE,
    GAPS,
    LEAST_SPAN,
    WAYS,
    AuditError,
    GapErrors,
    Rows,
    audit,
    choose_steps,
    crossing,
    draw_batch,
    fit_order,
    measure,
)
from soflow.data import epoch_order, open_source
from soflow.kernels import reference
from soflow.models import Network
from soflow.paths import slope_coefficients
from soflow.rounding import ROUNDED, rounded
from soflow.run_folder import RunError
from soflow.slope import exact_slope, slope
from soflow.step import build_objective
from soflow.times import MIN_GAP

HALVES = tuple(2.0**-k for k in range(1, 11))


class InTime(Network):
    """F(x, t, s) = 3 t^power in every pixel."""

    num_classes = 0

    def bf16_modules(self) -> tuple[()]:
        return ()

    def forward_flops(self) -> int:
        return 0

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power

    def forward(self, x: Tensor, t: Tensor, s: Tensor, labels: None = None, augment_labels: None = None) -> Tensor:
        return 3 * (t**self.power)[:, None, None, None].expand_as(x)

    def forward_difference(self, x, dx, t, dt, s, labels=None, augment_labels=None):
        F_t = self(x, t, s)
        return F_t, self(x + dx, t + dt, s) - F_t


def rows(num: int = 16) -> Rows:
    x, v = torch.randn(2, num, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    # sixteenths: with gaps that are powers of 2 every l is exact in float32
    t, s = torch.linspace(0.5, 0.96875, 16)[:num], torch.linspace(0.0, 0.234375, 16)[:num]
    return Rows(x, v, t, s, None)


def errors(r: float, bias: float, noise: float) -> GapErrors:
    return GapErrors(r, bias, dict.fromkeys(WAYS, noise), dict.fromkeys(WAYS, noise))


def test_bias_of_a_network_linear_in_time():
    """q = v - F_l + (t - s) dF / (t - l) misses its limit v - F_t - (t - s) F' by F_t - F_l = (t - l) F'."""
    at = rows()
    found = measure(SolutionFlow(InTime(1)), at, HALVES, step=7, r_of_step=0.25)
    t, s = at.t.double()[:, None, None, None], at.s.double()[:, None, None, None]
    limit = at.v - 3 * t - 3 * (t - s)
    for got in found.gaps:
        expected = (3 * (t - s) * got.r).expand_as(limit).norm() / limit.norm()
        assert got.bias == pytest.approx(expected.item(), rel=1e-12)
    assert found.order == pytest.approx(1.0, abs=1e-10)
    assert (found.step, found.r, found.at(0.24).r) == (7, 0.25, 0.25)


def test_bias_of_a_network_quadratic_in_time_is_of_first_order_only_where_the_gap_is_small():
    found = measure(SolutionFlow(InTime(2)), rows(), HALVES, 1, 0.25)
    assert found.order == pytest.approx(1.0, abs=0.02)
    assert found.gaps[0].bias < 0.95 * found.gaps[1].bias * 2


def test_constant_network_has_neither_bias_nor_noise_by_difference():
    found = measure(SolutionFlow(InTime(0)), rows(), HALVES, 1, 0.25)
    assert [got.bias for got in found.gaps] == [0.0] * len(HALVES)
    assert math.isnan(found.order)
    assert all(got.noise["difference fp32"] < 1e-7 for got in found.gaps)


@pytest.mark.parametrize("name", ["DiT", "UNet"])
@pytest.mark.parametrize("parameterization", ["euler", "trig"])
def test_noise_is_as_predicted(name, parameterization):
    flow = SolutionFlow(tiny.network(name), parameterization=parameterization)
    before = {key: value.clone() for key, value in flow.state_dict().items()}
    found = measure(flow, rows(8), GAPS, 1, 0.1)
    assert all(torch.equal(value, before[key]) for key, value in flow.state_dict().items())
    assert list(found.F_error) == list(ROUNDED)
    for got in found.gaps:
        assert got.noise.keys() == got.predicted.keys() == set(WAYS)
        for way in WAYS:
            # two evaluations round the more alike the nearer they are
            assert 0.25 < got.noise[way] / got.predicted[way] < 4, (way, got.r)
    by_gap = {got.r: got.noise for got in found.gaps}
    for precision in ROUNDED:
        two_pass = by_gap[GAPS[-3]][f"two_pass {precision}"] / by_gap[GAPS[2]][f"two_pass {precision}"]
        assert two_pass == pytest.approx(GAPS[2] / GAPS[-3], rel=0.6)
        difference = by_gap[GAPS[-1]][f"difference {precision}"] / by_gap[GAPS[2]][f"difference {precision}"]
        assert difference == pytest.approx(1.0, rel=0.3)
    assert found.order == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("parameterization", ["euler", "trig"])
def test_predictions_are_those_of_the_formulas(parameterization):
    """And the noise is beside the exact slope at the same gap, not beside its limit."""
    flow, at, r = SolutionFlow(tiny.network("DiT"), parameterization=parameterization), rows(8), 0.125
    (found,) = measure(flow, at, (r,), 1, r).gaps
    exact, rough = rounded(flow, "fp64"), rounded(flow, "bf16")
    x, v, t, s = (value.double() for value in (at.x_t, at.v, at.t, at.s))
    l = t + (s - t) * r

    def norms(tensor: Tensor) -> Tensor:
        return tensor.double().flatten(1).norm(dim=1)

    with torch.no_grad():
        size = exact_slope(exact, x, v, t, s).norm()
        q = slope(exact, x, v, t, l, s)
        e = norms(rough.network(at.x_t, at.t, at.s) - exact.network(x, t, s))
        _, _, c_F, c_d = slope_coefficients(parameterization, t, l, s).unbind(1)
        two_pass = torch.stack(((c_F - c_d) * e, c_d * e)).norm()
        difference = torch.stack((c_F * e, c_d * norms(q.dF) * e / norms(q.F_t))).norm()
        noise = (slope(rough, at.x_t, at.v, at.t, l.float(), at.s).q - q.q).norm()
    assert found.predicted["two_pass bf16"] == pytest.approx(float(two_pass / size), rel=1e-6)
    assert found.predicted["difference bf16"] == pytest.approx(float(difference / size), rel=1e-6)
    assert found.noise["difference bf16"] == pytest.approx(float(noise / size), rel=1e-3)


def test_diverged_network_is_refused():
    flow = SolutionFlow(tiny.network("DiT"))
    with torch.no_grad():
        flow.network.final_layer.linear.weight.fill_(math.nan)
    with pytest.raises(AuditError, match="step 5: the slope of the network is not finite"):
        measure(flow, rows(2), (0.1,), 5, 0.1)


def test_order_of_a_power_law():
    law = [errors(r, 0.3 * r**1.5, 0.0) for r in (0.05, 0.01, 0.001)]
    assert fit_order([errors(1.0, 9.0, 0.0), *law]) == pytest.approx(1.5)
    assert math.isnan(fit_order([errors(0.01, 0.0, 0.0), *law[:1]]))


def test_crossing_of_power_laws():
    gaps = [errors(r, r, 1e-4 / r) for r in (1.0, 0.1, 0.003, 0.001)]
    assert crossing(gaps, "two_pass bf16") == pytest.approx(0.01)
    assert crossing(gaps[2:], "two_pass bf16") == 0.003
    assert math.isnan(crossing(gaps[:2], "two_pass bf16"))
    assert math.isnan(crossing([errors(0.1, 0.1, 0.0)], "two_pass bf16"))
    assert math.isnan(crossing([errors(0.1, 0.0, 0.1)], "two_pass bf16"))


def test_rows_are_those_of_training_that_lie_far_enough_apart(tmp_path):
    config = tiny.config(tmp_path)
    source = open_source(config.data)
    batch, again = draw_batch(config, source, 20, 5), draw_batch(config, open_source(config.data), 20, 5)
    assert len(batch) == 20
    assert batch.num_velocity == 0
    assert (batch.t - batch.s >= LEAST_SPAN).all()
    for field in dataclasses.fields(batch):
        ours, same = getattr(batch, field.name), getattr(again, field.name)
        assert torch.equal(ours, same) if isinstance(ours, Tensor) else ours == same
    # the first of 40 are the 20
    assert torch.equal(draw_batch(config, source, 40, 5).t[:20], batch.t)
    assert not torch.equal(draw_batch(config, source, 20, 6).x_1, batch.x_1)
    candidates, _, _ = source.read(epoch_order(len(source), 5, 0)[: 20 * CANDIDATES_PER_SAMPLE])
    assert all((candidates == image).flatten(1).all(1).any() for image in batch.x_0)


def test_rows_of_an_unconditional_run_have_no_labels(tmp_path):
    config = tiny.config(tmp_path, "network.num_classes=0", "objective={fm_ratio: 0.5}")
    assert draw_batch(config, open_source(config.data), 8, 5).labels is None


def test_times_that_never_lie_apart_are_refused(tmp_path):
    config = tiny.config(tmp_path, "times.s_mean=6.0", "times.t_mean=-2.0")
    with pytest.raises(AuditError, match=r"times: got \d+ of 64 rows with t - s of at least 0.1, expected 4"):
        draw_batch(config, open_source(config.data), 4, 0)


def test_audit_over_training(tmp_path):
    config = tiny.config(tmp_path, "train.checkpoint_every=3", "optim.lr=1e-2")
    run = test_trainer.train(config).folder.path
    found = list(audit(run, "all", samples=4, seed=1))
    assert [one.step for one in found] == [3, 6, 8]
    assert found[-1].r == pytest.approx(0.1 * 0.02 ** (7 / 8))
    assert {*GAPS, found[-1].r} == {got.r for got in found[-1].gaps}
    assert list(audit(run, "newest", 4, 1)) == found[-1:]
    assert list(audit(run, [6, 3], 4, 1)) == found[:2]
    assert list(audit(run, "newest", 4, 2)) != found[-1:]
    assert found[0].gaps != found[1].gaps
    with pytest.raises(AuditError, match=r"checkpoint of step 4, expected one of 3, 6, 8"):
        audit(run, [3, 4], 4, 1)


def test_the_audit_takes_the_weights_of_training_and_the_guided_velocity(tmp_path, monkeypatch):
    config = tiny.config(tmp_path, "ema.decay=0.999")
    run, measured = test_trainer.train(config).folder, []
    monkeypatch.setattr("soflow.audit.measure", lambda flow, rows, *rest: measured.append((flow, rows)))
    list(audit(run.path, "newest", samples=16, seed=1))
    ((flow, at),) = measured
    saved = checkpoint.read(run.checkpoints / "step-00000008").model
    assert all(torch.equal(tensor, saved[name]) for name, tensor in flow.network.state_dict().items())
    batch, objective = draw_batch(config, open_source(config.data), 16, 1), build_objective(config, reference)
    x_t, v_t = objective.point(flow, batch)
    guided, *_ = objective.look_ahead(flow, batch, x_t, v_t)
    assert torch.equal(at.x_t, x_t)
    assert torch.equal(at.v, guided)
    assert not torch.allclose(guided, v_t)


def test_other_data_than_those_of_the_run_are_refused(tmp_path, monkeypatch):
    run = test_trainer.train(tiny.config(tmp_path)).folder.path
    other = open_source(tiny.config(tmp_path).data)
    monkeypatch.setattr(other, "fingerprint", "other")
    monkeypatch.setattr("soflow.audit.open_source", lambda data: other)
    with pytest.raises(RunError, match=r"step-00000008: got a checkpoint of the data set .*, expected other"):
        audit(run, "newest", 4, 1)


def test_a_gap_below_the_least_is_audited_at_the_least(tmp_path):
    run = test_trainer.train(tiny.config(tmp_path, "times.gap_end=1e-9"), until=8).folder.path
    (found,) = audit(run, "newest", samples=4, seed=1)
    assert found.r < 1e-7
    assert found.gaps[-1].r == pytest.approx(MIN_GAP)
    assert all(math.isfinite(errors.bias) for errors in found.gaps)


def test_run_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(AuditError, match="got no checkpoint"):
        choose_steps(tmp_path / "checkpoints", "all")
