"""GELU with bias, and SiLU: forward, backward with the bias gradient, and finite difference.

x, dx, dy: (..., D) fp32 | bf16 | fp16.  bias: (D,).  Math in fp32, stored as x.dtype; the bias gradient as bias.dtype.
The bias gradient is summed per slab of rows, then over slabs, in a fixed order: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from soflow.kernels import reference
from soflow.kernels.library import check, check_dimensions, check_width, register
from soflow.kernels.math import GELU_CUBE, GELU_SCALE, LN_2, LOG2_E, sigmoid, sigmoid_derivative, sigmoid_difference

BLOCK_D = 512
ROWS = 4
SLAB_ROWS = 128
BLOCK_N = 2048


@triton.jit
def _gelu_fwd_kernel(x_ptr, bias_ptr, y_ptr, M, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs = rows[:, None] * D + cols[None, :]
    mask = (rows[:, None] < M) & (cols[None, :] < D)
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    # y (1 + tanh(u)) / 2 as y sigmoid(2 u): no cancellation where tanh nears -1
    tl.store(y_ptr + offs, y * sigmoid(y * (GELU_SCALE + GELU_CUBE * (y * y))), mask=mask)


@triton.jit
def _gelu_bwd_kernel(
    x_ptr, bias_ptr, dy_ptr, dx_ptr, dbias_partial_ptr, M, D, SLAB_ROWS, ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    slab = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    dbias = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, SLAB_ROWS, ROWS):
        rows = slab * SLAB_ROWS + first + tl.arange(0, ROWS)
        offs = rows[:, None] * D + cols[None, :]
        mask = (rows[:, None] < M) & (cols[None, :] < D)
        y = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        square = y * y
        s, ds = sigmoid_derivative(y * (GELU_SCALE + GELU_CUBE * square))
        dx = dy * (s + y * ds * (LN_2 * GELU_SCALE + 3.0 * LN_2 * GELU_CUBE * square))
        tl.store(dx_ptr + offs, dx, mask=mask)
        dbias += tl.sum(dx, axis=0)
    tl.store(dbias_partial_ptr + slab * D + cols, dbias, mask=cols < D)


@triton.jit
def _gelu_difference_kernel(x_ptr, dx_ptr, bias_ptr, dy_ptr, M, D, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs = rows[:, None] * D + cols[None, :]
    mask = (rows[:, None] < M) & (cols[None, :] < D)
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    y = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    d = tl.load(dx_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    u = y * (GELU_SCALE + GELU_CUBE * (y * y))
    du = d * (GELU_SCALE + GELU_CUBE * (3.0 * y * (y + d) + d * d))
    s, ds = sigmoid_difference(u, du)
    tl.store(dy_ptr + offs, d * s + y * ds, mask=mask)


@triton.jit
def _silu_fwd_kernel(x_ptr, y_ptr, N, BLOCK_N: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, x * sigmoid(x * LOG2_E), mask=mask)


@triton.jit
def _silu_bwd_kernel(x_ptr, dy_ptr, dx_ptr, N, BLOCK_N: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    s, ds = sigmoid_derivative(x * LOG2_E)
    tl.store(dx_ptr + offs, dy * (s + x * ds), mask=mask)


@triton.jit
def _silu_difference_kernel(x_ptr, dx_ptr, dy_ptr, N, BLOCK_N: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < N
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dx_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    s, ds = sigmoid_difference(x * LOG2_E, d * LOG2_E)
    tl.store(dy_ptr + offs, d * s + x * ds, mask=mask)


def _tiles(x: Tensor) -> tuple[int, int, tuple[int, int]]:
    D = x.shape[-1]
    M = x.numel() // D
    return M, D, (triton.cdiv(M, ROWS), triton.cdiv(D, BLOCK_D))


def _launch_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    x, bias = x.contiguous(), bias.contiguous()
    y = torch.empty_like(x)
    M, D, grid = _tiles(x)
    if M:
        _gelu_fwd_kernel[grid](x, bias, y, M, D, ROWS=ROWS, BLOCK_D=BLOCK_D)
    return y


def _launch_gelu_bwd(x: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    x, bias, dy = x.contiguous(), bias.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    M, D, (_, num_blocks) = _tiles(x)
    num_slabs = triton.cdiv(M, SLAB_ROWS)
    dbias_partial = torch.empty((num_slabs, D), device=x.device, dtype=torch.float32)
    if M:
        _gelu_bwd_kernel[(num_slabs, num_blocks)](
            x, bias, dy, dx, dbias_partial, M, D, SLAB_ROWS, ROWS=ROWS, BLOCK_D=BLOCK_D
        )
    return dx, dbias_partial.sum(0).to(bias.dtype)


def _launch_gelu_difference(x: Tensor, dx: Tensor, bias: Tensor) -> Tensor:
    x, dx, bias = x.contiguous(), dx.contiguous(), bias.contiguous()
    dy = torch.empty_like(x)
    M, D, grid = _tiles(x)
    if M:
        _gelu_difference_kernel[grid](x, dx, bias, dy, M, D, ROWS=ROWS, BLOCK_D=BLOCK_D)
    return dy


def _launch_silu_fwd(x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        _silu_fwd_kernel[(triton.cdiv(x.numel(), BLOCK_N),)](x, y, x.numel(), BLOCK_N=BLOCK_N)
    return y


def _launch_silu_bwd(x: Tensor, dy: Tensor) -> Tensor:
    x, dy = x.contiguous(), dy.contiguous()
    dx = torch.empty_like(x)
    if x.numel():
        _silu_bwd_kernel[(triton.cdiv(x.numel(), BLOCK_N),)](x, dy, dx, x.numel(), BLOCK_N=BLOCK_N)
    return dx


def _launch_silu_difference(x: Tensor, dx: Tensor) -> Tensor:
    x, dx = x.contiguous(), dx.contiguous()
    dy = torch.empty_like(x)
    if x.numel():
        _silu_difference_kernel[(triton.cdiv(x.numel(), BLOCK_N),)](x, dx, dy, x.numel(), BLOCK_N=BLOCK_N)
    return dy


def _gelu_bwd_cpu(x: Tensor, bias: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = torch.ops.aten.gelu_backward(dy.to(wide), x.to(wide) + bias.to(wide), approximate="tanh")
    return dx.to(x.dtype), dx.reshape(-1, dx.shape[-1]).sum(0).to(bias.dtype)


_gelu_fwd = register(
    "gelu_fwd(Tensor x, Tensor bias) -> Tensor",
    _launch_gelu_fwd,
    reference.gelu,
    lambda x, bias: x.new_empty(x.shape),
)
_gelu_bwd = register(
    "gelu_bwd(Tensor x, Tensor bias, Tensor dy) -> (Tensor, Tensor)",
    _launch_gelu_bwd,
    _gelu_bwd_cpu,
    lambda x, bias, dy: (x.new_empty(x.shape), bias.new_empty(bias.shape)),
)
_gelu_difference = register(
    "gelu_difference(Tensor x, Tensor dx, Tensor bias) -> Tensor",
    _launch_gelu_difference,
    reference.gelu_difference,
    lambda x, dx, bias: x.new_empty(x.shape),
)
_silu_fwd = register(
    "silu_fwd(Tensor x) -> Tensor",
    _launch_silu_fwd,
    reference.silu,
    lambda x: x.new_empty(x.shape),
)
_silu_bwd = register(
    "silu_bwd(Tensor x, Tensor dy) -> Tensor",
    _launch_silu_bwd,
    lambda x, dy: torch.ops.aten.silu_backward(dy, x),
    lambda x, dy: x.new_empty(x.shape),
)
_silu_difference = register(
    "silu_difference(Tensor x, Tensor dx) -> Tensor",
    _launch_silu_difference,
    reference.silu_difference,
    lambda x, dx: x.new_empty(x.shape),
)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias):
        ctx.save_for_backward(x, bias)
        return _gelu_fwd(x, bias)

    @staticmethod
    def backward(ctx, dy):
        return _gelu_bwd(*ctx.saved_tensors, dy)


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _silu_fwd(x)

    @staticmethod
    def backward(ctx, dy):
        return _silu_bwd(*ctx.saved_tensors, dy)


def _check_gelu(op: str, x: Tensor, bias: Tensor, **others: tuple[Tensor, tuple[int, ...]]) -> None:
    check_dimensions(op, "x", x, 0, "(..., D)")
    check_width(op, "x", x)
    check(op, x.device, x=(x, tuple(x.shape)), bias=(bias, tuple(x.shape[-1:])), **others)


def gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(x + bias) in the tanh form, (..., D).  See `reference.gelu`."""
    _check_gelu("gelu", x, bias)
    return _Gelu.apply(x, bias)


def gelu_difference(x: Tensor, dx: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(x + dx, bias) - gelu(x, bias), (..., D).  See `reference.gelu_difference`."""
    _check_gelu("gelu_difference", x, bias, dx=(dx, tuple(x.shape)))
    return _gelu_difference(x, dx, bias)


def silu(x: Tensor) -> Tensor:
    """Return x sigmoid(x).  See `reference.silu`."""
    check("silu", x.device, x=(x, tuple(x.shape)))
    return _Silu.apply(x)


def silu_difference(x: Tensor, dx: Tensor) -> Tensor:
    """Return silu(x + dx) - silu(x).  See `reference.silu_difference`."""
    check("silu_difference", x.device, x=(x, tuple(x.shape)), dx=(dx, tuple(x.shape)))
    return _silu_difference(x, dx)
