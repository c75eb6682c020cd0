"""The finite difference of adaptive layer norm, with and without the gate and residual before it.

x, y, z and their differences: (B, T, D) fp32 | bf16 | fp16.  Modulations (B, D), last dimension contiguous.  Math in
fp32; dz has the dtype of z, the difference of the modulated result the one asked for. One row per program.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from soflow.kernels import reference
from soflow.kernels.adaln import check_rows, dense_last, empty, load_row
from soflow.kernels.library import register
from soflow.kernels.tuning import norm_warps


@triton.jit
def _norm_difference(x, dx, factor, dshift, dscale, mask, D: tl.constexpr, eps):
    """The difference of LayerNorm + modulate of one row; factor = 1 + scale."""
    xc = tl.where(mask, x - tl.sum(x, axis=0) * (1.0 / D), 0.0)
    dc = tl.where(mask, dx - tl.sum(dx, axis=0) * (1.0 / D), 0.0)
    var = tl.sum(xc * xc, axis=0) * (1.0 / D) + eps
    dvar = tl.sum(dc * (2.0 * xc + dc), axis=0) * (1.0 / D)
    # the moved variance is at least 0, and eps of it; rounding can say less of a row that moves to a constant one
    rstd, moved_rstd = tl.rsqrt(var), tl.rsqrt(tl.maximum(var + dvar, eps))
    # 1 / std - 1 / moved_std = dvar / (std moved_std (std + moved_std))
    product = rstd * moved_rstd
    dnormed = dc * moved_rstd - xc * (dvar * product * product / (rstd + moved_rstd))
    return xc * rstd * dscale + dnormed * (factor + dscale) + dshift


@triton.jit
def _modulated_norm_difference_kernel(
    x_ptr,
    dx_ptr,
    scale_ptr,
    dshift_ptr,
    dscale_ptr,
    dh_ptr,
    stride_scale,
    stride_dshift,
    stride_dscale,
    T,
    eps,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample = row // T
    cols = tl.arange(0, BLOCK_D)
    mask = cols < D
    factor = 1.0 + load_row(scale_ptr, sample * stride_scale + cols, mask)
    dshift = load_row(dshift_ptr, sample * stride_dshift + cols, mask)
    dscale = load_row(dscale_ptr, sample * stride_dscale + cols, mask)
    x = load_row(x_ptr, row * D + cols, mask)
    dx = load_row(dx_ptr, row * D + cols, mask)
    tl.store(dh_ptr + row * D + cols, _norm_difference(x, dx, factor, dshift, dscale, mask, D, eps), mask=mask)


@triton.jit
def _gate_residual_norm_difference_kernel(
    y_ptr,
    gate_ptr,
    z_ptr,
    scale_ptr,
    dx_ptr,
    dy_ptr,
    dgate_ptr,
    dshift_ptr,
    dscale_ptr,
    dz_ptr,
    dh_ptr,
    stride_gate,
    stride_scale,
    stride_dgate,
    stride_dshift,
    stride_dscale,
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
    dgate = load_row(dgate_ptr, sample * stride_dgate + cols, mask)
    y = load_row(y_ptr, row * D + cols, mask)
    dy = load_row(dy_ptr, row * D + cols, mask)
    dz = load_row(dx_ptr, row * D + cols, mask) + y * dgate + dy * (gate + dgate)
    dz = dz.to(dz_ptr.dtype.element_ty).to(tl.float32)
    tl.store(dz_ptr + row * D + cols, dz, mask=mask)
    factor = 1.0 + load_row(scale_ptr, sample * stride_scale + cols, mask)
    dshift = load_row(dshift_ptr, sample * stride_dshift + cols, mask)
    dscale = load_row(dscale_ptr, sample * stride_dscale + cols, mask)
    z = load_row(z_ptr, row * D + cols, mask)
    tl.store(dh_ptr + row * D + cols, _norm_difference(z, dz, factor, dshift, dscale, mask, D, eps), mask=mask)


# --------------------------------------------------------------------------------------------------


def _launch_modulated_norm_difference(
    x: Tensor, dx: Tensor, scale: Tensor, dshift: Tensor, dscale: Tensor, eps: float, dtype: torch.dtype | None
) -> Tensor:
    x, dx = x.contiguous(), dx.contiguous()
    scale, dshift, dscale = dense_last(scale), dense_last(dshift), dense_last(dscale)
    B, T, D = x.shape
    dh = empty(x, dtype)
    if B * T:
        _modulated_norm_difference_kernel[(B * T,)](
            x,
            dx,
            scale,
            dshift,
            dscale,
            dh,
            scale.stride(0),
            dshift.stride(0),
            dscale.stride(0),
            T,
            eps,
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            num_warps=norm_warps(D),
        )
    return dh


def _launch_gate_residual_norm_difference(
    y: Tensor,
    gate: Tensor,
    z: Tensor,
    scale: Tensor,
    dx: Tensor,
    dy: Tensor,
    dgate: Tensor,
    dshift: Tensor,
    dscale: Tensor,
    eps: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    y, z, dx, dy = y.contiguous(), z.contiguous(), dx.contiguous(), dy.contiguous()
    gate, scale, dgate, dshift, dscale = (dense_last(c) for c in (gate, scale, dgate, dshift, dscale))
    B, T, D = z.shape
    dz, dh = torch.empty_like(z), empty(z, dtype)
    if B * T:
        _gate_residual_norm_difference_kernel[(B * T,)](
            y,
            gate,
            z,
            scale,
            dx,
            dy,
            dgate,
            dshift,
            dscale,
            dz,
            dh,
            gate.stride(0),
            scale.stride(0),
            dgate.stride(0),
            dshift.stride(0),
            dscale.stride(0),
            T,
            eps,
            D=D,
            BLOCK_D=triton.next_power_of_2(D),
            num_warps=norm_warps(D),
        )
    return dz, dh


_modulated_norm_difference = register(
    "modulated_norm_difference(Tensor x, Tensor dx, Tensor scale, Tensor dshift, Tensor dscale, float eps,"
    " ScalarType? dtype) -> Tensor",
    _launch_modulated_norm_difference,
    reference.modulated_norm_difference,
    lambda x, dx, scale, dshift, dscale, eps, dtype: empty(x, dtype),
)
_gate_residual_norm_difference = register(
    "gate_residual_norm_difference(Tensor y, Tensor gate, Tensor z, Tensor scale, Tensor dx, Tensor dy, Tensor dgate,"
    " Tensor dshift, Tensor dscale, float eps, ScalarType? dtype) -> (Tensor, Tensor)",
    _launch_gate_residual_norm_difference,
    reference.gate_residual_norm_difference,
    lambda y, gate, z, scale, dx, dy, dgate, dshift, dscale, eps, dtype: (empty(z), empty(z, dtype)),
)


def modulated_norm_difference(
    x: Tensor,
    dx: Tensor,
    scale: Tensor,
    dshift: Tensor,
    dscale: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the difference of modulated_norm, (B, T, D).  See `reference.modulated_norm_difference`."""
    modulation = {"scale": scale, "dshift": dshift, "dscale": dscale}
    check_rows("modulated_norm_difference", x, {"dx": dx}, modulation)
    return _modulated_norm_difference(x, dx, scale, dshift, dscale, eps, dtype)


def gate_residual_norm_difference(
    y: Tensor,
    gate: Tensor,
    z: Tensor,
    scale: Tensor,
    dx: Tensor,
    dy: Tensor,
    dgate: Tensor,
    dshift: Tensor,
    dscale: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the differences of z and h of gate_residual_norm.  See `reference.gate_residual_norm_difference`."""
    modulation = {"gate": gate, "scale": scale, "dgate": dgate, "dshift": dshift, "dscale": dscale}
    check_rows("gate_residual_norm_difference", z, {"y": y, "dx": dx, "dy": dy}, modulation, name="z")
    return _gate_residual_norm_difference(y, gate, z, scale, dx, dy, dgate, dshift, dscale, eps, dtype)
