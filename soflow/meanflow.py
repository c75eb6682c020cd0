"""MeanFlow, for comparison: the network learns average velocities through a Jacobian-vector product.

Source: Geng et al. 2025 (arXiv 2505.13447). Its u(z_t, r, t) is F(x_t, t, s) of the Euler parameterization with s = r,
so that f(x, t, s) = x + (s - t) F is its step from t to s. Its guidance is this engine's, with omega = m cfg_scale and
kappa = 1 - m, where m is the mix ratio. The weight (|error|^2 + c)^-p of the paper has the sum over pixels where
loss_eps is meant for their mean.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from soflow.flow import SolutionFlow
from soflow.objective import Batch, GuidedObjective, ObjectiveOutput, end_times, trained_labels, velocity_terms


class MeanFlow(GuidedObjective):
    """Weighted |F - sg(v - (t - s) dF/dt)|^2, where dF/dt is the derivative along the flow, (v, 1, 0) in (x, t, s).

    Velocity rows have s = t, where the target is v itself. The derivative is exact, by forward-mode automatic
    differentiation of the consistency rows without gradient; fused kernels have none, so that the network has to
    compute with the reference ops. Raises ValueError for another parameterization than Euler, and for dropout, of
    which the derivative would draw a second mask.
    """

    def __call__(self, flow: SolutionFlow, batch: Batch) -> ObjectiveOutput:
        """Return the losses of `batch` under `flow`; the consistency losses are the mean squares they are named for."""
        if flow.parameterization != "euler":
            raise ValueError(f"parameterization: got {flow.parameterization!r}, expected 'euler': F is a mean velocity")
        if flow.network.training and flow.network.dropout > 0:
            raise ValueError(f"dropout: got {flow.network.dropout}, expected 0: the derivative would draw another mask")
        x_t, v_t = self.point(flow, batch)
        v, _, mix = self.look_ahead(flow, batch, x_t, v_t)
        F_t = flow.network(x_t, batch.t, end_times(batch), trained_labels(flow, batch), batch.augment_labels)
        nv, ones = batch.num_velocity, torch.ones_like(mix)
        target = v[nv:] - (batch.t - batch.s)[nv:, None, None, None] * self.derivative(flow, batch, x_t, v)
        velocity_loss, velocity = self._mean_square(flow, F_t[:nv], v[:nv], mix[:nv])
        consistency_loss, consistency = self._mean_square(flow, F_t[nv:], target, ones[nv:])
        loss = (velocity_loss * nv + consistency_loss * (len(batch) - nv)) / len(batch)
        return ObjectiveOutput(loss, *velocity.unbind(), *consistency.unbind())

    def step_calls(self, num_rows: int, num_velocity: int, conditional: bool) -> int:
        """Return the operations of a step in forward calls of one row; the derivative of a row is two more."""
        return super().step_calls(num_rows, num_velocity, conditional) + 2 * (num_rows - num_velocity)

    @torch.no_grad()
    def derivative(self, flow: SolutionFlow, batch: Batch, x_t: Tensor, v: Tensor) -> Tensor:
        """Return d F(x_t, t, s) / dt of the consistency rows, along v: (B - num_velocity, C, H, W), detached."""
        nv, labels = batch.num_velocity, trained_labels(flow, batch)
        if nv == len(batch) and not self.weights_are_shared_out:
            return v[nv:]
        label, augment_label = (None if c is None else c[nv:] for c in (labels, batch.augment_labels))
        # the other backends of attention have no forward-mode derivative
        with sdpa_kernel(SDPBackend.MATH):
            derivative: Tensor = torch.func.jvp(
                lambda x, t: flow.network(x, t, batch.s[nv:], label, augment_label),
                (x_t[nv:].clone(), batch.t[nv:].clone()),
                (v[nv:], torch.ones_like(batch.t[nv:])),
            )[1]
        return derivative

    def _mean_square(self, flow: SolutionFlow, F_t: Tensor, v: Tensor, mix: Tensor) -> tuple[Tensor, Tensor]:
        terms = velocity_terms(flow, mix)
        loss, statistics = self.ops.solution_loss(F_t, F_t.detach()[:0], F_t, v, *terms, self.loss_p, self.loss_eps)
        return loss, statistics[0]
