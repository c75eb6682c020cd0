"""The training step without this engine: six network calls in plain PyTorch, as the published method reads.

The straightforward implementation of SoFlow's objective (linear path, Euler parameterization) and, for comparison, of
MeanFlow's: one Jacobian-vector product of all rows, with the gradient running through it. `bench.step` and
`bench.memory` hold the engine against them.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from soflow.config import ObjectiveConfig
from soflow.guidance import cfg_decay
from soflow.models import Network
from soflow.objective import Batch


def soflow_loss(network: Network, batch: Batch, objective: ObjectiveConfig) -> Tensor:
    """Return SoFlow's loss of a batch with labels: two calls for its velocity rows, four for its consistency rows."""
    nv = batch.num_velocity
    assert batch.labels is not None
    masked = torch.where(batch.null_mask, network.num_classes, batch.labels)
    null = torch.full_like(masked, network.num_classes)
    strength = cfg_decay(batch.t, objective.cfg_decay_time) * (objective.cfg_scale - 1.0)
    x_t, v = point(batch)

    rows = slice(None, nv)
    v_pred = network(x_t[rows], batch.t[rows], batch.t[rows], masked[rows])
    with torch.no_grad():
        v_uncond = network(x_t[rows], batch.t[rows], batch.t[rows], null[rows])
        guided = v[rows] + wide(strength[rows]) * (v[rows] - v_uncond)
        target = objective.mix_ratio * guided + (1.0 - objective.mix_ratio) * v_pred
        target = torch.where(wide(batch.null_mask[rows]), v[rows], target)
    velocity_loss = weighted_square(v_pred - target, objective).mean()

    rows = slice(nv, None)
    x, t, l, s = x_t[rows], batch.t[rows], batch.l[rows], batch.s[rows]
    with torch.no_grad():
        v_uncond = network(x, t, t, null[rows])
        v_cond = network(x, t, t, batch.labels[rows])
        guided = v[rows] + wide(strength[rows]) * (v[rows] - v_uncond)
        target = objective.mix_ratio * guided + (1.0 - objective.mix_ratio) * v_cond
        target = torch.where(wide(batch.null_mask[rows]), v[rows], target)
        x_l = x + wide(l - t) * target
        f_l = x_l + wide(s - l) * network(x_l, l, s, masked[rows])
    F_t = network(x, t, s, masked[rows])
    with torch.no_grad():
        slope = (x + wide(s - t) * F_t - f_l) / wide(t - l)
        weight = (slope.square().flatten(1).mean(1) + objective.loss_eps) ** -objective.loss_p
    consistency_loss = (torch.sign(s - t) * weight * (F_t * slope).flatten(1).mean(1)).mean()
    return (velocity_loss * nv + consistency_loss * (len(batch) - nv)) / len(batch)


def meanflow_loss(network: Network, batch: Batch, objective: ObjectiveConfig) -> Tensor:
    """Return MeanFlow's loss of a batch with labels: two calls for guidance, then one with its derivative."""
    nv = batch.num_velocity
    assert batch.labels is not None
    masked = torch.where(batch.null_mask, network.num_classes, batch.labels)
    s = torch.cat((batch.t[:nv], batch.s[nv:]))
    x_t, v = point(batch)
    with torch.no_grad():
        v_uncond = network(x_t, batch.t, batch.t, torch.full_like(masked, network.num_classes))
        v_cond = network(x_t, batch.t, batch.t, batch.labels)
        strength = cfg_decay(batch.t, objective.cfg_decay_time) * (objective.cfg_scale - 1.0)
        guided = v + wide(strength) * (v - v_uncond)
        v = torch.where(wide(batch.null_mask), v, objective.mix_ratio * guided + (1.0 - objective.mix_ratio) * v_cond)
    with sdpa_kernel(SDPBackend.MATH):
        u, derivative, *_ = torch.func.jvp(
            lambda x, t: network(x, t, s, masked), (x_t, batch.t), (v, torch.ones_like(batch.t))
        )
    error = u - (v - wide(batch.t - s) * derivative).detach()
    return weighted_square(error, objective).mean()


def point(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return x_t and v of the linear path, (B, C, H, W)."""
    t = wide(batch.t)
    return (1.0 - t) * batch.x_0 + t * batch.x_1, batch.x_1 - batch.x_0


def weighted_square(error: Tensor, objective: ObjectiveConfig) -> Tensor:
    """Return (mse + eps)^-p mse of every row, (B,), with the weight detached."""
    mse = error.square().flatten(1).mean(1)
    return mse * (mse.detach() + objective.loss_eps) ** -objective.loss_p


def wide(rows: Tensor) -> Tensor:
    """Return one number per row, (B,), as it multiplies images, (B, 1, 1, 1)."""
    return rows[:, None, None, None]
