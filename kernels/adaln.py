"""Adaptive layer norm: LayerNorm + modulate, and gate + residual + LayerNorm + modulate, forward and backward.

x, y, z, h: (B, T, D) fp32 | bf16 | fp16.  gate, shift, scale: (B, D), last dimension contiguous (chunks of one tensor).
Math in fp32; z has the dtype of x, the modulated result h the one asked for (a bf16 branch of an fp32 residual stream),
gradients that of what they belong to.

One row per program, padded to a power of two. Backward: a program walks the rows of a slab of tokens, the next ones on
their way while it computes, and keeps the sums for dshift, dscale and dgate in registers; where a sample has several
slabs an ordered sum over them follows: no atomics, the same bits again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from soflow.kernels import reference
from soflow.kernels.library import check, check_dimensions, check_grid, check_width, register
from soflow.kernels.tuning import NORM_BWD_STAGES, norm_warps, num_slabs


@triton.jit
def load_row(ptr, offs, mask):
    """One row in fp32, zero where the mask is false."""
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_modulated_norm(x, shift, scale, h_ptr, mean_ptr, rstd_ptr, row, cols, mask, D: tl.constexpr, eps):
    """LayerNorm + modulate of one row, and its statistics for backward."""
    mean = tl.sum(x, axis=0) * (1.0 / D)
    xc = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(xc * xc, axis=0) * (1.0 / D) + eps)
    tl.store(h_ptr + row * D + cols, xc * rstd * (1.0 + scale) + shift, mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def _norm_backward(x, mean, rstd, dh, factor, D: tl.constexpr):
    """The normed row, and the gradient that reaches it through LayerNorm + modulate; factor = 1 + scale.

    Both hold anything beyond D, where dh is 0.
    """
    normed = (x - mean) * rstd
    dnormed = dh * factor
    mean_dnormed = tl.sum(dnormed, axis=0) * (1.0 / D)
    mean_product = tl.sum(dnormed * normed, axis=0) * (1.0 / D)
    return normed, rstd * (dnormed - mean_dnormed - normed * mean_product)


@triton.jit
def _modulated_norm_fwd_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    stride_shift,
    stride_scale,
    T,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample = row // T
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    x = load_row(x_ptr, row * D + cols, mask)
    scale = load_row(scale_ptr, sample * stride_scale + cols, mask)
    shift = load_row(shift_ptr, sample * stride_shift + cols, mask)
    _store_modulated_norm(x, shift, scale, h_ptr, mean_ptr, rstd_ptr, row, cols, mask, D, eps)


@triton.jit
def _gate_residual_norm_fwd_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    z_ptr,
    h_ptr,
    mean_ptr,
    rstd_ptr,
    stride_gate,
    stride_shift,
    stride_scale,
    T,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample = row // T
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    gate = load_row(gate_ptr, sample * stride_gate + cols, mask)
    z = load_row(x_ptr, row * D + cols, mask) + gate * load_row(y_ptr, row * D + cols, mask)
    # what backward will load: the norm of the stored value, not of the unrounded one
    z = z.to(z_ptr.dtype.element_ty).to(tl.float32)
    tl.store(z_ptr + row * D + cols, z, mask=mask)
    scale = load_row(scale_ptr, sample * stride_scale + cols, mask)
    shift = load_row(shift_ptr, sample * stride_shift + cols, mask)
    _store_modulated_norm(z, shift, scale, h_ptr, mean_ptr, rstd_ptr, row, cols, mask, D, eps)


@triton.jit
def _modulated_norm_bwd_kernel(
    x_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dh_ptr,
    dx_ptr,
    dshift_ptr,
    dscale_ptr,
    stride_scale,
    T,
    SLAB,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    slab = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    factor = 1.0 + load_row(scale_ptr, sample * stride_scale + cols, mask)
    dshift = tl.zeros((BLOCK_D,), tl.float32)
    dscale = tl.zeros((BLOCK_D,), tl.float32)
    for token in tl.range(slab * SLAB, min(slab * SLAB + SLAB, T), num_stages=STAGES):
        row = sample * T + token
        x = load_row(x_ptr, row * D + cols, mask)
        dh = load_row(dh_ptr, row * D + cols, mask)
        normed, dx = _norm_backward(x, tl.load(mean_ptr + row), tl.load(rstd_ptr + row), dh, factor, D)
        dshift += dh
        dscale += dh * normed
        tl.store(dx_ptr + row * D + cols, dx, mask=mask)
    sums = (sample * tl.num_programs(0) + slab) * D + cols
    tl.store(dshift_ptr + sums, dshift, mask=mask)
    tl.store(dscale_ptr + sums, dscale, mask=mask)


@triton.jit
def _gate_residual_norm_bwd_kernel(
    y_ptr,
    gate_ptr,
    z_ptr,
    scale_ptr,
    mean_ptr,
    rstd_ptr,
    dz_ptr,
    dh_ptr,
    dx_ptr,
    dy_ptr,
    dgate_ptr,
    dshift_ptr,
    dscale_ptr,
    stride_gate,
    stride_scale,
    T,
    SLAB,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    slab = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    gate = load_row(gate_ptr, sample * stride_gate + cols, mask)
    factor = 1.0 + load_row(scale_ptr, sample * stride_scale + cols, mask)
    dgate = tl.zeros((BLOCK_D,), tl.float32)
    dshift = tl.zeros((BLOCK_D,), tl.float32)
    dscale = tl.zeros((BLOCK_D,), tl.float32)
    for token in tl.range(slab * SLAB, min(slab * SLAB + SLAB, T), num_stages=STAGES):
        row = sample * T + token
        z = load_row(z_ptr, row * D + cols, mask)
        dh = load_row(dh_ptr, row * D + cols, mask)
        normed, dz = _norm_backward(z, tl.load(mean_ptr + row), tl.load(rstd_ptr + row), dh, factor, D)
        dshift += dh
        dscale += dh * normed
        dx = load_row(dz_ptr, row * D + cols, mask) + dz
        dgate += dx * load_row(y_ptr, row * D + cols, mask)
        tl.store(dx_ptr + row * D + cols, dx, mask=mask)
        tl.store(dy_ptr + row * D + cols, dx * gate, mask=mask)
    sums = (sample * tl.num_programs(0) + slab) * D + cols
    tl.store(dgate_ptr + sums, dgate, mask=mask)
    tl.store(dshift_ptr + sums, dshift, mask=mask)
    tl.store(dscale_ptr + sums, dscale, mask=mask)


# --------------------------------------------------------------------------------------------------


def dense_last(c: Tensor) -> Tensor:
    """Return c, copied unless its last dimension is contiguous."""
    return c if c.stride(-1) == 1 else c.contiguous()


def empty(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a dense tensor without values of x's shape, of `dtype` or x's."""
    return torch.empty(x.shape, device=x.device, dtype=dtype or x.dtype)


def _wide_dtype(x: Tensor) -> torch.dtype:
    """Return float32, or the float64 that only the CPU has."""
    return torch.promote_types(x.dtype, torch.float32)


def _row_stats(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:2], device=x.device, dtype=_wide_dtype(x))


def _slab_sums(c: Tensor, slabs: int) -> Tensor:
    """Room for the sums of each slab, (B, slabs, D): those of a single slab are the gradient of c already."""
    return torch.empty((len(c), slabs, c.shape[1]), device=c.device, dtype=c.dtype if slabs == 1 else torch.float32)


def _whole_sum(sums: Tensor, c: Tensor) -> Tensor:
    return sums.squeeze(1) if sums.shape[1] == 1 else sums.sum(1).to(c.dtype)


def _launch_modulated_norm_fwd(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    x, shift, scale = x.contiguous(), dense_last(shift), dense_last(scale)
    B, T, D = x.shape
    h, mean, rstd = empty(x, dtype), _row_stats(x), _row_stats(x)
    if B * T:
        _modulated_norm_fwd_kernel[(B * T,)](
            x,
            shift,
            scale,
            h,
            mean,
            rstd,
            shift.stride(0),
            scale.stride(0),
            T,
            eps,
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            num_warps=norm_warps(D),
        )
    return h, mean, rstd


def _launch_gate_residual_norm_fwd(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    gate, shift, scale = dense_last(gate), dense_last(shift), dense_last(scale)
    B, T, D = x.shape
    z, h, mean, rstd = torch.empty_like(x), empty(x, dtype), _row_stats(x), _row_stats(x)
    if B * T:
        _gate_residual_norm_fwd_kernel[(B * T,)](
            x,
            y,
            gate,
            shift,
            scale,
            z,
            h,
            mean,
            rstd,
            gate.stride(0),
            shift.stride(0),
            scale.stride(0),
            T,
            eps,
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            num_warps=norm_warps(D),
        )
    return z, h, mean, rstd


def _launch_modulated_norm_bwd(
    x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, dh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    x, scale, dh = x.contiguous(), dense_last(scale), dh.contiguous()
    B, T, D = x.shape
    dx = torch.empty_like(x)
    slabs = num_slabs(B, T)
    dshift, dscale = _slab_sums(scale, slabs), _slab_sums(scale, slabs)
    if B:
        check_grid("modulated_norm", "samples of a gradient", B)
        _modulated_norm_bwd_kernel[(slabs, B)](
            x,
            scale,
            mean,
            rstd,
            dh,
            dx,
            dshift,
            dscale,
            scale.stride(0),
            T,
            triton.cdiv(T, slabs),
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            STAGES=NORM_BWD_STAGES,
            num_warps=norm_warps(D),
        )
    return dx, _whole_sum(dshift, scale), _whole_sum(dscale, scale)


def _launch_gate_residual_norm_bwd(
    y: Tensor, gate: Tensor, z: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, dz: Tensor, dh: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y, z, dz, dh = y.contiguous(), z.contiguous(), dz.contiguous(), dh.contiguous()
    gate, scale = dense_last(gate), dense_last(scale)
    B, T, D = z.shape
    dx, dy = torch.empty_like(z), torch.empty_like(y)
    slabs = num_slabs(B, T)
    dgate, dshift, dscale = _slab_sums(gate, slabs), _slab_sums(scale, slabs), _slab_sums(scale, slabs)
    if B:
        check_grid("gate_residual_norm", "samples of a gradient", B)
        _gate_residual_norm_bwd_kernel[(slabs, B)](
            y,
            gate,
            z,
            scale,
            mean,
            rstd,
            dz,
            dh,
            dx,
            dy,
            dgate,
            dshift,
            dscale,
            gate.stride(0),
            scale.stride(0),
            T,
            triton.cdiv(T, slabs),
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            STAGES=NORM_BWD_STAGES,
            num_warps=norm_warps(D),
        )
    return dx, dy, _whole_sum(dgate, gate), _whole_sum(dshift, scale), _whole_sum(dscale, scale)


def _modulated_norm_cpu(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor]:
    return reference.modulated_norm(x, shift, scale, eps, dtype), *_cpu_stats(x, eps)


def _gate_residual_norm_cpu(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, h = reference.gate_residual_norm(x, y, gate, shift, scale, eps, dtype)
    return z, h, *_cpu_stats(z, eps)


def _cpu_stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(_wide(x), dim=-1, correction=0)
    return mean, (var + eps).rsqrt()


def _wide(x: Tensor) -> Tensor:
    return x.to(_wide_dtype(x))


def _modulated_norm_bwd_cpu(
    x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, dh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    normed, dnormed = (_wide(x) - mean[..., None]) * rstd[..., None], _wide(dh) * (1.0 + _wide(scale)[:, None])
    inner = dnormed.mean(-1, keepdim=True) + normed * (dnormed * normed).mean(-1, keepdim=True)
    dx = rstd[..., None] * (dnormed - inner)
    dshift, dscale = _wide(dh).sum(1), (_wide(dh) * normed).sum(1)
    return dx.to(x.dtype), dshift.to(scale.dtype), dscale.to(scale.dtype)


def _gate_residual_norm_bwd_cpu(
    y: Tensor, gate: Tensor, z: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, dz: Tensor, dh: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dshift, dscale = _modulated_norm_bwd_cpu(z, scale, mean, rstd, dh)
    dx = _wide(dz) + _wide(dx)
    dgate, dy = (dx * _wide(y)).sum(1), dx * _wide(gate)[:, None]
    return dx.to(z.dtype), dy.to(y.dtype), dgate.to(gate.dtype), dshift, dscale


_modulated_norm_fwd = register(
    "modulated_norm_fwd(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType? dtype)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_modulated_norm_fwd,
    _modulated_norm_cpu,
    lambda x, shift, scale, eps, dtype: (empty(x, dtype), _row_stats(x), _row_stats(x)),
)
_modulated_norm_bwd = register(
    "modulated_norm_bwd(Tensor x, Tensor scale, Tensor mean, Tensor rstd, Tensor dh) -> (Tensor, Tensor, Tensor)",
    _launch_modulated_norm_bwd,
    _modulated_norm_bwd_cpu,
    lambda x, scale, mean, rstd, dh: (empty(x), empty(scale), empty(scale)),
)
_gate_residual_norm_fwd = register(
    "gate_residual_norm_fwd(Tensor x, Tensor y, Tensor gate, Tensor shift, Tensor scale, float eps,"
    " ScalarType? dtype) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_gate_residual_norm_fwd,
    _gate_residual_norm_cpu,
    lambda x, y, gate, shift, scale, eps, dtype: (empty(x), empty(x, dtype), _row_stats(x), _row_stats(x)),
)
_gate_residual_norm_bwd = register(
    "gate_residual_norm_bwd(Tensor y, Tensor gate, Tensor z, Tensor scale, Tensor mean, Tensor rstd, Tensor dz,"
    " Tensor dh) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_gate_residual_norm_bwd,
    _gate_residual_norm_bwd_cpu,
    lambda y, gate, z, scale, mean, rstd, dz, dh: (
        empty(z),
        empty(y),
        empty(gate),
        empty(scale),
        empty(scale),
    ),
)


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, scale, eps, dtype):
        h, mean, rstd = _modulated_norm_fwd(x, shift, scale, eps, dtype)
        ctx.save_for_backward(x, scale, mean, rstd)
        return h

    @staticmethod
    def backward(ctx, dh):
        return *_modulated_norm_bwd(*ctx.saved_tensors, dh), None, None


class _GateResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, gate, shift, scale, eps, dtype):
        z, h, mean, rstd = _gate_residual_norm_fwd(x, y, gate, shift, scale, eps, dtype)
        ctx.save_for_backward(y, gate, z, scale, mean, rstd)
        return z, h

    @staticmethod
    def backward(ctx, dz, dh):
        return *_gate_residual_norm_bwd(*ctx.saved_tensors, dz, dh), None, None


def check_rows(
    op: str, x: Tensor, activations: dict[str, Tensor], modulation: dict[str, Tensor], name: str = "x"
) -> None:
    """Raise ValueError unless `x`, called `name`, is (B, T, D), so are the activations, and the modulations (B, D)."""
    check_dimensions(op, name, x, 3, "(B, T, D)")
    check_width(op, name, x)
    B, T, D = x.shape
    tokens = {key: (tensor, (B, T, D)) for key, tensor in {name: x, **activations}.items()}
    rows = {key: (tensor, (B, D)) for key, tensor in modulation.items()}
    check(op, x.device, **tokens, **rows)


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """Return LayerNorm(x) (1 + scale) + shift, (B, T, D).  See `reference.modulated_norm`."""
    check_rows("modulated_norm", x, {}, {"shift": shift, "scale": scale})
    return _ModulatedNorm.apply(x, shift, scale, eps, dtype)


def gate_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return z = x + gate y and LayerNorm(z) (1 + scale) + shift, (B, T, D).  See `reference.gate_residual_norm`."""
    check_rows("gate_residual_norm", x, {"y": y}, {"gate": gate, "shift": shift, "scale": scale})
    return _GateResidualNorm.apply(x, y, gate, shift, scale, eps, dtype)
