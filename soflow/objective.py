"""The objective: velocity loss and solution consistency loss of one batch, with guidance, in two network calls."""

from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from soflow.flow import SolutionFlow
from soflow.guidance import row_guidance
from soflow.kernels import reference
from soflow.paths import path_coefficients, slope_coefficients, solution_coefficients, velocity_factor

Lookahead = Literal["difference", "two_pass"]


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
    """

    loss: Tensor
    velocity_loss: Tensor
    velocity_mse: Tensor
    velocity_weight: Tensor
    consistency_loss: Tensor
    consistency_mse: Tensor
    consistency_weight: Tensor


class Objective:
    """SoFlow's training objective (arXiv 2512.15657), as callable objective(flow, batch).

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
        if cfg_scale < 1.0:
            raise ValueError(f"cfg_scale: got {cfg_scale}, expected at least 1")
        if lookahead not in ("difference", "two_pass"):
            raise ValueError(f"lookahead: got {lookahead!r}, expected 'difference' or 'two_pass'")
        self.cfg_scale = cfg_scale
        self.cfg_decay_time = cfg_decay_time
        self.mix_ratio = mix_ratio
        self.loss_p = loss_p
        self.loss_eps = loss_eps
        self.lookahead = lookahead
        self.ops = reference if ops is None else ops

    def __call__(self, flow: SolutionFlow, batch: Batch) -> ObjectiveOutput:
        """Return the losses of `batch` under `flow`; shapes and rows as `Batch` says."""
        x_t, v_t = self.ops.interpolate(batch.x_0, batch.x_1, *path_coefficients(flow.path, batch.t))
        v, dx, mix = self._look_ahead(flow, batch, x_t, v_t)
        F_t, dF = self._joint_call(flow, batch, x_t, dx)
        loss, statistics = self.ops.solution_loss(
            F_t, dF, x_t, v, *_residual_terms(flow, batch, mix), self.loss_p, self.loss_eps
        )
        return ObjectiveOutput(loss, *statistics.flatten().unbind())

    def slope(self, flow: SolutionFlow, batch: Batch) -> Tensor:
        """Return the slope q of the consistency rows, (B - num_velocity, C, H, W), detached."""
        with torch.no_grad():
            x_t, v_t = self.ops.interpolate(batch.x_0, batch.x_1, *path_coefficients(flow.path, batch.t))
            v, dx, mix = self._look_ahead(flow, batch, x_t, v_t)
            F_t, dF = self._joint_call(flow, batch, x_t, dx)
            coefficients, _, _ = _residual_terms(flow, batch, mix)
            rows = slice(batch.num_velocity, None)
            terms = (x_t[rows], v[rows], F_t[rows], dF)
            return sum(c.view(-1, 1, 1, 1) * term for c, term in zip(coefficients[rows].unbind(1), terms, strict=True))

    def _look_ahead(self, flow: SolutionFlow, batch: Batch, x_t: Tensor, v_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The velocity of every row, the step dx of the consistency rows, and the mix m of every row."""
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
                v_uncond, v_cond = flow.velocity(x_t, t, labels), None
            else:
                # One call for both predictions; the labels of the conditional rows are not masked.
                rows = torch.cat((x_t, x_t[nv:])), torch.cat((t, t[nv:])), torch.cat((labels, batch.labels[nv:]))
                v_uncond, v_cond = flow.velocity(*rows).tensor_split((len(batch),))
            v, dx = self.ops.look_ahead(v_t, v_uncond, v_cond, strength, mix, dt)
        return v, dx, mix

    def _joint_call(self, flow: SolutionFlow, batch: Batch, x_t: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
        """F_t of every row with gradient, and dF = F_l - F_t of the consistency rows without."""
        t, nv, labels = batch.t, batch.num_velocity, batch.labels
        s = torch.cat((t[:nv], batch.s[nv:]))
        if labels is not None:
            labels = torch.where(batch.null_mask, flow.network.num_classes, labels)
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
            if nv == len(batch):
                return F_t, dx
            conditions = (None if c is None else c[nv:] for c in (labels, batch.augment_labels, batch.draw_keys))
            return F_t, flow.network(x_t[nv:] + dx, batch.l[nv:], s[nv:], *conditions) - F_t[nv:]


def _residual_terms(flow: SolutionFlow, batch: Batch, mix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of the residual in (x, v, F, dF), scale of the weight and factor of the gradient, per row.

    Velocity rows: v_pred - (m v + (1 - m) v_pred) = m (v_pred - v), whose gradient is that of v_pred alone.
    Consistency rows: the slope; sign(b) stands for b / |b|, because the weight divides by |b| (half the gradient of
    the weighted square, as the released models were trained).
    """
    nv, factor = batch.num_velocity, velocity_factor(flow.parameterization)
    m, zeros, ones = mix[:nv], torch.zeros_like(mix[:nv]), torch.ones_like(mix)
    _, b_ts = solution_coefficients(flow.parameterization, batch.t[nv:], batch.s[nv:])
    coefficients = torch.cat(
        (
            torch.stack((zeros, -m, factor * m, zeros), dim=1),
            slope_coefficients(flow.parameterization, batch.t[nv:], batch.l[nv:], batch.s[nv:]),
        )
    )
    weight_scale = torch.cat((ones[:nv] / factor, ones[nv:]))
    gradient_factor = torch.cat((2.0 * factor * ones[:nv], b_ts.sign()))
    return coefficients, weight_scale, gradient_factor
