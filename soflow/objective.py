"""SoFlow's objective: velocity and solution consistency loss of one batch, with guidance, in two network calls.

Here too is what the other objectives (`soflow.meanflow`, `soflow.flow_matching`) share with it: what a batch is, what
comes out, and the guided velocity.
"""

import abc
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from soflow.config import require
from soflow.flow import SolutionFlow
from soflow.guidance import row_guidance
from soflow.kernels import reference
from soflow.paths import path_coefficients, slope_coefficients, solution_coefficients, velocity_factor
from soflow.slope import LOOKAHEADS, Lookahead
from soflow.times import at_least_gap


@dataclass(frozen=True)
class Batch:
    """What one step trains on; rows [:num_velocity] are velocity rows, the others consistency rows.

    x_0, x_1: (B, C, H, W), data and noise.  t, l, s: (B,), s <= l < t; l and s are unused in velocity rows.
    labels: (B,) int64, or None for unconditional.  null_mask: (B,) bool, rows that train the null label.
    augment_labels: (B, A), or None.  draw_keys: (B, 3) int64, see `Network`, or None.
    """

    x_0: Tensor
    x_1: Tensor
    t: Tensor
    l: Tensor
    s: Tensor
    labels: Tensor | None
    null_mask: Tensor
    num_velocity: int
    augment_labels: Tensor | None = None
    draw_keys: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_0)


@dataclass(frozen=True)
class ObjectiveOutput:
    """Back-propagate `loss`, the sum of both losses weighted by their shares of the rows; the rest is detached.

    consistency_loss is a surrogate whose value is no distance: watch consistency_mse, the mean squared slope.
    watched: (3,), means over the consistency rows (0 for no rows) of |dx|^2 and |dF|^2, sums over the elements of a
    row, and of whether l is at the least gap below t; None of an objective that does not look ahead.
    """

    loss: Tensor
    velocity_loss: Tensor
    velocity_mse: Tensor
    velocity_weight: Tensor
    consistency_loss: Tensor
    consistency_mse: Tensor
    consistency_weight: Tensor
    watched: Tensor | None = None


class GuidedObjective(abc.ABC):
    """A loss of a batch, as callable objective(flow, batch), on the velocity that guidance and mixing make of it.

    v = m (v_t + d(t) (cfg_scale - 1) (v_t - v_uncond)) + (1 - m) v_cond, m = mix_ratio, d(t) by `cfg_decay`; raw v_t in
    rows of the null mask, and in every row, whatever m, where cfg_scale is 1 or there are no labels, as in the official
    code. Every mean square has the weight (mse + loss_eps)^-loss_p. ops: as those of the network.
    """

    def __init__(
        self,
        cfg_scale: float = 1.0,
        cfg_decay_time: float = 1.0,
        mix_ratio: float = 1.0,
        loss_p: float = 1.0,
        loss_eps: float = 0.01,
        ops: ModuleType | None = None,
    ) -> None:
        require("cfg_scale", cfg_scale, cfg_scale >= 1, "at least 1")
        self.cfg_scale = cfg_scale
        self.cfg_decay_time = cfg_decay_time
        self.mix_ratio = mix_ratio
        self.loss_p = loss_p
        self.loss_eps = loss_eps
        self.ops = reference if ops is None else ops
        # of a network whose processes must make the same calls, be it for no rows
        self.weights_are_shared_out = False

    @abc.abstractmethod
    def __call__(self, flow: SolutionFlow, batch: Batch) -> ObjectiveOutput:
        """Return the losses of `batch` under `flow`; shapes and rows as `Batch` says."""

    def step_calls(self, num_rows: int, num_velocity: int, conditional: bool) -> int:
        """Return the operations of a step of num_rows rows, in forward calls of one row; a backward call is two."""
        calls = 3 * num_rows
        if conditional and self.cfg_scale > 1.0:
            calls += num_rows if self.mix_ratio == 1.0 else num_rows + num_rows - num_velocity
        return calls

    def point(self, flow: SolutionFlow, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return x_t and its velocity v_t, (B, C, H, W)."""
        return self.ops.interpolate(batch.x_0, batch.x_1, *path_coefficients(flow.path, batch.t))

    def look_ahead(self, flow: SolutionFlow, batch: Batch, x_t: Tensor, v_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return v of every row, the step dx = v (l - t) of the consistency rows, and the mix m of every row.

        In velocity rows v is not mixed yet: their own prediction takes part through the loss.
        """
        t, nv = batch.t, batch.num_velocity
        dt = batch.l[nv:] - t[nv:]
        if batch.labels is None or self.cfg_scale == 1.0:
            ones = torch.ones_like(t)
            v, dx = self.ops.look_ahead(v_t, v_t, None, torch.zeros_like(t), ones, dt)
            return v, dx, ones
        strength, mix = row_guidance(t, batch.null_mask, self.cfg_scale, self.cfg_decay_time, self.mix_ratio)
        with torch.no_grad():
            labels = torch.full_like(batch.labels, flow.network.num_classes)
            if self.mix_ratio == 1.0:
                v_uncond, v_cond = flow.velocity(x_t, t, labels, batch.draw_keys), None
            else:
                # One call for both predictions; the labels of the conditional rows are not masked.
                rows = torch.cat((x_t, x_t[nv:])), torch.cat((t, t[nv:])), torch.cat((labels, batch.labels[nv:]))
                keys = None if batch.draw_keys is None else torch.cat((batch.draw_keys, batch.draw_keys[nv:]))
                v_uncond, v_cond = flow.velocity(*rows, keys).tensor_split((len(batch),))
            v, dx = self.ops.look_ahead(v_t, v_uncond, v_cond, strength, mix, dt)
        return v, dx, mix


class Objective(GuidedObjective):
    """SoFlow's training objective (arXiv 2512.15657).

    Velocity rows: weighted |v_pred - v|^2 at s = t. Consistency rows: the gradient of weighted |slope|^2, slope
    q = (f_t - f_l) / (t - l), where x_l = x_t + v (l - t) and F_l is detached. v is guided, decayed and mixed.
    lookahead: "difference" takes F_l - F_t from difference propagation, "two_pass" evaluates F twice and subtracts.
    """

    def __init__(
        self,
        cfg_scale: float = 1.0,
        cfg_decay_time: float = 1.0,
        mix_ratio: float = 1.0,
        loss_p: float = 1.0,
        loss_eps: float = 0.01,
        lookahead: Lookahead = "difference",
        ops: ModuleType | None = None,
    ) -> None:
        super().__init__(cfg_scale, cfg_decay_time, mix_ratio, loss_p, loss_eps, ops)
        require("lookahead", lookahead, lookahead in LOOKAHEADS, "'difference' or 'two_pass'")
        self.lookahead = lookahead

    def __call__(self, flow: SolutionFlow, batch: Batch) -> ObjectiveOutput:
        """Return the losses of `batch` under `flow`; shapes and rows as `Batch` says."""
        x_t, v_t = self.point(flow, batch)
        v, dx, mix = self.look_ahead(flow, batch, x_t, v_t)
        F_t, dF = self._joint_call(flow, batch, x_t, dx)
        loss, statistics = self.ops.solution_loss(
            F_t, dF, x_t, v, *_residual_terms(flow, batch, mix), self.loss_p, self.loss_eps
        )
        watched = _watched(batch, dx, dF)
        return ObjectiveOutput(*(loss, *statistics.flatten().unbind(), watched))

    def step_calls(self, num_rows: int, num_velocity: int, conditional: bool) -> int:
        """Return the operations of a step in forward calls of one row; the difference of a row is one more."""
        return super().step_calls(num_rows, num_velocity, conditional) + num_rows - num_velocity

    def _joint_call(self, flow: SolutionFlow, batch: Batch, x_t: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        """F_t of every row with gradient, and dF = F_l - F_t of the consistency rows without."""
        t, nv = batch.t, batch.num_velocity
        s, labels = end_times(batch), trained_labels(flow, batch)
        if self.lookahead == "difference":
            dt = batch.l[nv:] - t[nv:]
            return flow.network.forward_difference(x_t, dx, t, dt, s, labels, batch.augment_labels, batch.draw_keys)
        if flow.network.training and flow.network.dropout > 0 and batch.draw_keys is None:
            raise ValueError(
                f"lookahead: got 'two_pass' with dropout {flow.network.dropout} and no draw_keys, expected "
                "'difference': two evaluations would draw two masks, where the slope needs the same"
            )
        F_t = flow.network(x_t, t, s, labels, batch.augment_labels, batch.draw_keys)
        with torch.no_grad():
            if nv == len(batch) and not self.weights_are_shared_out:
                return F_t, dx
            conditions = (None if c is None else c[nv:] for c in (labels, batch.augment_labels, batch.draw_keys))
            return F_t, flow.network(x_t[nv:] + dx, batch.l[nv:], s[nv:], *conditions) - F_t[nv:]


def end_times(batch: Batch) -> Tensor:
    """Return s of every row, (B,): t itself in velocity rows."""
    nv = batch.num_velocity
    return torch.cat((batch.t[:nv], batch.s[nv:]))


def trained_labels(flow: SolutionFlow, batch: Batch) -> Tensor | None:
    """Return the labels of every row with the null label in rows of the null mask; None for unconditional."""
    if batch.labels is None:
        return None
    return torch.where(batch.null_mask, flow.network.num_classes, batch.labels)


def velocity_terms(flow: SolutionFlow, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return coefficients of the residual in (x, v, F, dF), scale of the weight and factor of the gradient, per row.

    The velocity error with v_pred mixed into the target: v_pred - (m v + (1 - m) v_pred) = m (v_pred - v), whose
    gradient is that of the first v_pred alone.  mix m: (B,).
    """
    factor, zeros, ones = velocity_factor(flow.parameterization), torch.zeros_like(mix), torch.ones_like(mix)
    return torch.stack((zeros, -mix, factor * mix, zeros), dim=1), ones / factor, 2.0 * factor * ones


def _watched(batch: Batch, dx: Tensor, dF: Tensor) -> Tensor:
    at_least = at_least_gap(batch.t, batch.l)[batch.num_velocity :].to(dx.dtype).sum()
    sums = torch.linalg.vector_norm(dx).square(), torch.linalg.vector_norm(dF).square(), at_least
    return torch.stack(sums) / max(len(dx), 1)


def _residual_terms(flow: SolutionFlow, batch: Batch, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `velocity_terms` returns, of every row; in consistency rows the residual is the slope.

    sign(b) stands for b / |b|, because the weight divides by |b| (half the gradient of the weighted square, as the
    released models were trained).
    """
    nv = batch.num_velocity
    coefficients, weight_scale, gradient_factor = velocity_terms(flow, mix[:nv])
    _, b_ts = solution_coefficients(flow.parameterization, batch.t[nv:], batch.s[nv:])
    slope = slope_coefficients(flow.parameterization, batch.t[nv:], batch.l[nv:], batch.s[nv:])
    return (
        torch.cat((coefficients, slope)),
        torch.cat((weight_scale, torch.ones_like(b_ts))),
        torch.cat((gradient_factor, b_ts.sign())),
    )
