"""Both losses, their adaptive weights and statistics, and the gradient with respect to F, in one launch.

F_t, x, v: (B, ...) fp32 | bf16 | fp16, dF: (M, ...) alike; coefficients fp32. Math in fp32; gradient as F_t.dtype.
One program per row; the last one to finish sums the rows in a fixed order: the same bits again, no host sync.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from soflow.kernels import reference
from soflow.kernels.library import check, check_dimensions, register

BLOCK_N = 2048
BLOCK_B = 256
NUM_WARPS = 8


@triton.jit
def _residual(F_ptr, dF_ptr, x_ptr, v_ptr, row, offs, mask, is_consistency, num_velocity, N, c_x, c_v, c_F, c_d):
    F_t = tl.load(F_ptr + row * N + offs, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * N + offs, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + row * N + offs, mask=mask, other=0.0).to(tl.float32)
    dF_offs = (row - num_velocity) * N + offs
    dF = tl.load(dF_ptr + dF_offs, mask=mask & is_consistency, other=0.0).to(tl.float32)
    return F_t, c_x * x + c_v * v + c_F * F_t + c_d * dF


@triton.jit
def _solution_loss_kernel(
    F_ptr,
    dF_ptr,
    x_ptr,
    v_ptr,
    coefficients_ptr,
    weight_scale_ptr,
    gradient_factor_ptr,
    gradient_ptr,
    row_stats_ptr,
    ticket_ptr,
    loss_ptr,
    statistics_ptr,
    B,
    num_velocity,
    N,
    p,
    eps,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    is_consistency = row >= num_velocity
    coefficients = coefficients_ptr + 4 * row
    c_x, c_v = tl.load(coefficients), tl.load(coefficients + 1)
    c_F, c_d = tl.load(coefficients + 2), tl.load(coefficients + 3)
    weight_scale, gradient_factor = tl.load(weight_scale_ptr + row), tl.load(gradient_factor_ptr + row)

    square = tl.zeros((BLOCK_N,), tl.float32)
    product = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, N, BLOCK_N):
        offs = first + tl.arange(0, BLOCK_N)
        mask = offs < N
        F_t, residual = _residual(
            F_ptr, dF_ptr, x_ptr, v_ptr, row, offs, mask, is_consistency, num_velocity, N, c_x, c_v, c_F, c_d
        )
        square += residual * residual
        product += F_t * residual
    mse = tl.sum(square, axis=0) / N
    weight = weight_scale * tl.exp(-p * tl.log(mse + eps))
    value = weight * tl.where(is_consistency, gradient_factor * tl.sum(product, axis=0) / N, mse)

    factor = gradient_factor * weight / B / N
    for first in range(0, N, BLOCK_N):
        offs = first + tl.arange(0, BLOCK_N)
        mask = offs < N
        _, residual = _residual(
            F_ptr, dF_ptr, x_ptr, v_ptr, row, offs, mask, is_consistency, num_velocity, N, c_x, c_v, c_F, c_d
        )
        tl.store(gradient_ptr + row * N + offs, factor * residual, mask=mask)

    tl.store(row_stats_ptr + row, value)
    tl.store(row_stats_ptr + B + row, mse)
    tl.store(row_stats_ptr + 2 * B + row, weight)
    # every thread's stores come before the ticket, whose release makes them visible to the last program
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == B - 1:
        num_consistency = B - num_velocity
        total = 0.0
        for part in range(0, 3):
            velocity = tl.zeros((BLOCK_B,), tl.float32)
            consistency = tl.zeros((BLOCK_B,), tl.float32)
            for first in range(0, B, BLOCK_B):
                rows = first + tl.arange(0, BLOCK_B)
                # volatile: written by other programs of this launch
                stats = tl.load(row_stats_ptr + part * B + rows, mask=rows < B, other=0.0, volatile=True)
                velocity += tl.where(rows < num_velocity, stats, 0.0)
                consistency += tl.where(rows < num_velocity, 0.0, stats)
            velocity_sum = tl.sum(velocity, axis=0)
            consistency_sum = tl.sum(consistency, axis=0)
            if part == 0:
                total += velocity_sum + consistency_sum
            tl.store(statistics_ptr + part, velocity_sum / tl.maximum(num_velocity, 1))
            tl.store(statistics_ptr + 3 + part, consistency_sum / tl.maximum(num_consistency, 1))
        tl.store(loss_ptr, total / B)


def _launch_solution_loss(
    F_t: Tensor,
    dF: Tensor,
    x: Tensor,
    v: Tensor,
    residual_coefficients: Tensor,
    weight_scale: Tensor,
    gradient_factor: Tensor,
    p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    F_t, dF, x, v = (tensor.contiguous() for tensor in (F_t, dF, x, v))
    rows = [tensor.contiguous() for tensor in (residual_coefficients, weight_scale, gradient_factor)]
    gradient = torch.empty_like(F_t)
    if not F_t.numel():
        return rows[0].new_zeros(()), rows[0].new_zeros((2, 3)), gradient
    B, N = len(F_t), F_t[0].numel()
    loss, statistics, row_stats = (rows[0].new_empty(shape) for shape in ((), (2, 3), (3, B)))
    ticket = torch.zeros(1, device=F_t.device, dtype=torch.int32)
    _solution_loss_kernel[(B,)](
        F_t,
        dF,
        x,
        v,
        *rows,
        gradient,
        row_stats,
        ticket,
        loss,
        statistics,
        B,
        B - len(dF),
        N,
        p,
        eps,
        BLOCK_N=min(BLOCK_N, triton.next_power_of_2(N)),
        BLOCK_B=BLOCK_B,
        num_warps=NUM_WARPS,
    )
    return loss, statistics, gradient


def _solution_loss_cpu(
    F_t: Tensor,
    dF: Tensor,
    x: Tensor,
    v: Tensor,
    residual_coefficients: Tensor,
    weight_scale: Tensor,
    gradient_factor: Tensor,
    p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaf = F_t.detach().requires_grad_()
        rows = residual_coefficients, weight_scale, gradient_factor
        loss, statistics = reference.solution_loss(leaf, dF, x, v, *rows, p, eps)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), statistics.clone(), gradient


_solution_loss = register(
    "solution_loss(Tensor F_t, Tensor dF, Tensor x, Tensor v, Tensor residual_coefficients, Tensor weight_scale,"
    " Tensor gradient_factor, float p, float eps) -> (Tensor, Tensor, Tensor)",
    _launch_solution_loss,
    _solution_loss_cpu,
    lambda F_t, dF, x, v, residual_coefficients, weight_scale, gradient_factor, p, eps: (
        weight_scale.new_empty(()),
        weight_scale.new_empty((2, 3)),
        F_t.new_empty(F_t.shape),
    ),
)


class _SolutionLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, F_t, *others):
        loss, statistics, gradient = _solution_loss(F_t, *others)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx, d_loss, _):
        (gradient,) = ctx.saved_tensors
        return (d_loss * gradient).to(gradient.dtype), *(None,) * 8


def solution_loss(
    F_t: Tensor,
    dF: Tensor,
    x: Tensor,
    v: Tensor,
    residual_coefficients: Tensor,
    weight_scale: Tensor,
    gradient_factor: Tensor,
    p: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the loss, a scalar, and the statistics of both parts, (2, 3).  See `reference.solution_loss`."""
    op, device = "solution_loss", F_t.device
    check_dimensions(op, "F_t", F_t, 0, "(B, ...)")
    B = len(F_t)
    if B and not F_t.numel():
        raise ValueError(f"{op}: F_t: got shape {tuple(F_t.shape)}, expected at least one number per row")
    if dF.dim() == 0 or len(dF) > B:
        raise ValueError(f"{op}: dF: got shape {tuple(dF.shape)}, expected at most {B} rows")
    shape = tuple(F_t.shape)
    check(op, device, F_t=(F_t, shape), dF=(dF, (len(dF), *shape[1:])), x=(x, shape), v=(v, shape))
    check(
        op,
        device,
        (torch.float32,),
        residual_coefficients=(residual_coefficients, (B, 4)),
        weight_scale=(weight_scale, (B,)),
        gradient_factor=(gradient_factor, (B,)),
    )
    return _SolutionLoss.apply(F_t, dF, x, v, residual_coefficients, weight_scale, gradient_factor, p, eps)
