"""The training point: random numbers, posterior sample, interpolation and look-ahead.

Random numbers are Philox 4x32-10 keyed by the seed, counted by (block, stream, sample, step), as `reference` defines
them, whatever the grid; they are fp32.  x_0, x_1, v: (B, ...) fp32 | bf16 | fp16.  None of it carries a gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from soflow.kernels import reference
from soflow.kernels.library import INTEGERS, check, check_dimensions, check_grid, register
from soflow.kernels.math import cos_sin_turns
from soflow.kernels.reference import NOISE_STREAM, POSTERIOR_STREAM

BLOCK_WORDS = 256  # Philox blocks per program: four numbers each
BLOCK_N = 1024


@triton.jit
def _unit(word):
    """23 bits and a half of a 32-bit word, in (0, 1)."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _uniform4(seed, step, stream, sample, block):
    zero = block * 0
    w0, w1, w2, w3 = tl.philox(
        seed,
        block.to(tl.uint32),
        (zero + stream).to(tl.uint32),
        (zero + sample).to(tl.uint32),
        (zero + step).to(tl.uint32),
    )
    return _unit(w0), _unit(w1), _unit(w2), _unit(w3)


@triton.jit
def _in_order(a, b, c, d):
    """[a0, b0, c0, d0, a1, ...]"""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _normals(seed, step, stream, sample, block):
    u0, u1, u2, u3 = _uniform4(seed, step, stream, sample, block)
    radius0, radius1 = tl.sqrt(-2.0 * tl.log(u0)), tl.sqrt(-2.0 * tl.log(u2))
    cos0, sin0 = cos_sin_turns(u1)
    cos1, sin1 = cos_sin_turns(u3)
    return _in_order(radius0 * cos0, radius0 * sin0, radius1 * cos1, radius1 * sin1)


@triton.jit
def _uniform_kernel(seed_ptr, step_ptr, sample_ptr, out_ptr, stream, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed, step, sample = tl.load(seed_ptr + row), tl.load(step_ptr + row), tl.load(sample_ptr + row)
    u0, u1, u2, u3 = _uniform4(seed, step, stream, sample, block)
    cols = tl.program_id(1) * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + row * N + cols, _in_order(u0, u1, u2, u3), mask=cols < N)


@triton.jit
def _normal_kernel(seed_ptr, step_ptr, sample_ptr, out_ptr, stream, N, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed, step, sample = tl.load(seed_ptr + row), tl.load(step_ptr + row), tl.load(sample_ptr + row)
    cols = tl.program_id(1) * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    tl.store(out_ptr + row * N + cols, _normals(seed, step, stream, sample, block), mask=cols < N)


@triton.jit
def _draw_kernel(
    mean_ptr,
    std_ptr,
    seed_ptr,
    step_ptr,
    sample_ptr,
    x_0_ptr,
    x_1_ptr,
    N,
    POSTERIOR: tl.constexpr,
    NOISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seed, step, sample = tl.load(seed_ptr + row), tl.load(step_ptr + row), tl.load(sample_ptr + row)
    cols = tl.program_id(1) * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    mask = cols < N
    mean = tl.load(mean_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    std = tl.load(std_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    x_0 = mean + std * _normals(seed, step, POSTERIOR, sample, block)
    tl.store(x_0_ptr + row * N + cols, x_0, mask=mask)
    tl.store(x_1_ptr + row * N + cols, _normals(seed, step, NOISE, sample, block), mask=mask)


@triton.jit
def _interpolate_kernel(
    x_0_ptr, x_1_ptr, alpha_ptr, beta_ptr, dalpha_ptr, dbeta_ptr, x_t_ptr, v_t_ptr, N, BLOCK_N: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    x_0 = tl.load(x_0_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    x_1 = tl.load(x_1_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(x_t_ptr + row * N + cols, tl.load(alpha_ptr + row) * x_0 + tl.load(beta_ptr + row) * x_1, mask=mask)
    tl.store(v_t_ptr + row * N + cols, tl.load(dalpha_ptr + row) * x_0 + tl.load(dbeta_ptr + row) * x_1, mask=mask)


@triton.jit
def _look_ahead_kernel(
    v_t_ptr,
    v_uncond_ptr,
    v_cond_ptr,
    guidance_ptr,
    mix_ptr,
    dt_ptr,
    v_ptr,
    dx_ptr,
    num_velocity,
    N,
    HAS_COND: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = cols < N
    v_t = tl.load(v_t_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    v_uncond = tl.load(v_uncond_ptr + row * N + cols, mask=mask, other=0.0).to(tl.float32)
    v = v_t + tl.load(guidance_ptr + row) * (v_t - v_uncond)
    is_consistency = row >= num_velocity
    offs = (row - num_velocity) * N + cols
    if HAS_COND:
        m = tl.load(mix_ptr + row)
        v_cond = tl.load(v_cond_ptr + offs, mask=mask & is_consistency, other=0.0).to(tl.float32)
        v = tl.where(is_consistency, m * v + (1.0 - m) * v_cond, v)
    tl.store(v_ptr + row * N + cols, v, mask=mask)
    dt = tl.load(dt_ptr + row - num_velocity, mask=is_consistency, other=0.0)
    tl.store(dx_ptr + offs, v * dt, mask=mask & is_consistency)


# --------------------------------------------------------------------------------------------------


def _row_keys(seed: Tensor, step: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    keys = torch.broadcast_tensors(seed, step, sample)
    return keys[0].contiguous(), keys[1].contiguous(), keys[2].contiguous()


def _grid(op: str, rows: int, num: int, block: int) -> tuple[int, int]:
    num_blocks = triton.cdiv(num, block)
    check_grid(op, "blocks of a row", num_blocks)
    return rows, num_blocks


def _launch_uniform(seed: Tensor, step: Tensor, stream: int, sample: Tensor, num: int) -> Tensor:
    out = torch.empty((len(sample), num), device=sample.device, dtype=torch.float32)
    if out.numel():
        grid = _grid("uniform", len(sample), num, 4 * BLOCK_WORDS)
        _uniform_kernel[grid](*_row_keys(seed, step, sample), out, stream, num, BLOCK=BLOCK_WORDS)
    return out


def _launch_normal(seed: Tensor, step: Tensor, stream: int, sample: Tensor, num: int) -> Tensor:
    out = torch.empty((len(sample), num), device=sample.device, dtype=torch.float32)
    if out.numel():
        grid = _grid("normal", len(sample), num, 4 * BLOCK_WORDS)
        _normal_kernel[grid](*_row_keys(seed, step, sample), out, stream, num, BLOCK=BLOCK_WORDS)
    return out


def _drawn(mean: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
    x_0, x_1 = (torch.empty(mean.shape, device=mean.device, dtype=torch.float32) for _ in range(2))
    return x_0, x_1


def _launch_draw(mean: Tensor, std: Tensor, seed: Tensor, step: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = mean.contiguous(), std.contiguous()
    x_0, x_1 = _drawn(mean)
    if mean.numel():
        N = mean[0].numel()
        _draw_kernel[_grid("draw", len(mean), N, 4 * BLOCK_WORDS)](
            mean,
            std,
            *_row_keys(seed, step, sample),
            x_0,
            x_1,
            N,
            POSTERIOR=POSTERIOR_STREAM,
            NOISE=NOISE_STREAM,
            BLOCK=BLOCK_WORDS,
        )
    return x_0, x_1


def _launch_interpolate(
    x_0: Tensor, x_1: Tensor, alpha_t: Tensor, beta_t: Tensor, dalpha_t: Tensor, dbeta_t: Tensor
) -> tuple[Tensor, Tensor]:
    x_0, x_1 = x_0.contiguous(), x_1.contiguous()
    x_t, v_t = torch.empty_like(x_0), torch.empty_like(x_0)
    if x_0.numel():
        N = x_0[0].numel()
        coefficients = (c.contiguous() for c in (alpha_t, beta_t, dalpha_t, dbeta_t))
        grid = _grid("interpolate", len(x_0), N, BLOCK_N)
        _interpolate_kernel[grid](x_0, x_1, *coefficients, x_t, v_t, N, BLOCK_N=BLOCK_N)
    return x_t, v_t


def _launch_look_ahead(
    v_t: Tensor, v_uncond: Tensor, v_cond: Tensor | None, guidance: Tensor, mix: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor]:
    v_t, v_uncond, guidance, mix, dt = (tensor.contiguous() for tensor in (v_t, v_uncond, guidance, mix, dt))
    v, dx = torch.empty_like(v_t), torch.empty((len(dt), *v_t.shape[1:]), device=v_t.device, dtype=v_t.dtype)
    if v_t.numel():
        N = v_t[0].numel()
        _look_ahead_kernel[_grid("look_ahead", len(v_t), N, BLOCK_N)](
            v_t,
            v_uncond,
            v_t if v_cond is None else v_cond.contiguous(),
            guidance,
            mix,
            dt,
            v,
            dx,
            len(v_t) - len(dt),
            N,
            HAS_COND=v_cond is not None,
            BLOCK_N=BLOCK_N,
        )
    return v, dx


def _fake_pair(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_numbers(seed: Tensor, step: Tensor, stream: int, sample: Tensor, num: int) -> Tensor:
    return torch.empty((len(sample), num), device=sample.device, dtype=torch.float32)


_uniform = register(
    "uniform(Tensor seed, Tensor step, int stream, Tensor sample, int num) -> Tensor",
    _launch_uniform,
    lambda *arguments: reference.uniform(*arguments).contiguous(),
    _fake_numbers,
)
_normal = register(
    "normal(Tensor seed, Tensor step, int stream, Tensor sample, int num) -> Tensor",
    _launch_normal,
    lambda *arguments: reference.normal(*arguments).contiguous(),
    _fake_numbers,
)
_draw = register(
    "draw(Tensor mean, Tensor std, Tensor seed, Tensor step, Tensor sample) -> (Tensor, Tensor)",
    _launch_draw,
    reference.draw,
    _drawn,
)
_interpolate = register(
    "interpolate(Tensor x_0, Tensor x_1, Tensor alpha_t, Tensor beta_t, Tensor dalpha_t, Tensor dbeta_t)"
    " -> (Tensor, Tensor)",
    _launch_interpolate,
    reference.interpolate,
    lambda x_0, *rest: _fake_pair(x_0),
)
_look_ahead = register(
    "look_ahead(Tensor v_t, Tensor v_uncond, Tensor? v_cond, Tensor guidance, Tensor mix, Tensor dt)"
    " -> (Tensor, Tensor)",
    _launch_look_ahead,
    reference.look_ahead,
    lambda v_t, v_uncond, v_cond, guidance, mix, dt: (
        v_t.new_empty(v_t.shape),
        v_t.new_empty((len(dt), *v_t.shape[1:])),
    ),
)


def _check_keys(op: str, seed: Tensor, step: Tensor, sample: Tensor) -> None:
    check_dimensions(op, "sample", sample, 1, "(B,)")
    for name, key in (("seed", seed), ("step", step)):
        if key.shape not in ((), sample.shape):
            raise ValueError(f"{op}: {name}: got shape {tuple(key.shape)}, expected () or {tuple(sample.shape)}")
        check(op, sample.device, INTEGERS, **{name: (key, tuple(key.shape))})
    check(op, sample.device, INTEGERS, sample=(sample, tuple(sample.shape)))


def uniform(seed: Tensor, step: Tensor, stream: int, sample: Tensor, num: int) -> Tensor:
    """Return uniform numbers in (0, 1), (B, num) fp32.  See `reference.uniform`."""
    _check_keys("uniform", seed, step, sample)
    return _uniform(seed, step, stream, sample, num)


def normal(seed: Tensor, step: Tensor, stream: int, sample: Tensor, num: int) -> Tensor:
    """Return standard normal numbers, (B, num) fp32.  See `reference.normal`."""
    _check_keys("normal", seed, step, sample)
    return _normal(seed, step, stream, sample, num)


def draw(mean: Tensor, std: Tensor | None, seed: Tensor, step: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return data x_0 and noise x_1, (B, C, H, W) fp32.  See `reference.draw`."""
    _check_keys("draw", seed, step, sample)
    check("draw", sample.device, mean=(mean, (len(sample), *mean.shape[1:])))
    if std is None:
        num = mean[0].numel() if mean.numel() else 0
        return mean.float(), _normal(seed, step, NOISE_STREAM, sample, num).view(mean.shape)
    check("draw", mean.device, std=(std, tuple(mean.shape)))
    return _draw(mean, std, seed, step, sample)


def interpolate(
    x_0: Tensor, x_1: Tensor, alpha_t: Tensor, beta_t: Tensor, dalpha_t: Tensor, dbeta_t: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x_t and v_t, (B, ...).  See `reference.interpolate`."""
    op = "interpolate"
    check_dimensions(op, "x_0", x_0, 0, "(B, ...)")
    B, shape = len(x_0), tuple(x_0.shape)
    check(op, x_0.device, x_0=(x_0, shape), x_1=(x_1, shape), alpha_t=(alpha_t, (B,)), beta_t=(beta_t, (B,)))
    check(op, x_0.device, dalpha_t=(dalpha_t, (B,)), dbeta_t=(dbeta_t, (B,)))
    return _interpolate(x_0, x_1, alpha_t, beta_t, dalpha_t, dbeta_t)


def look_ahead(
    v_t: Tensor, v_uncond: Tensor, v_cond: Tensor | None, guidance: Tensor, mix: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the guided velocity v, (B, ...), and the step dx of the consistency rows.  See `reference.look_ahead`."""
    op = "look_ahead"
    check_dimensions(op, "v_t", v_t, 0, "(B, ...)")
    check_dimensions(op, "dt", dt, 1, "(M,)")
    B, shape = len(v_t), tuple(v_t.shape)
    if len(dt) > B:
        raise ValueError(f"{op}: dt: got {len(dt)} rows, expected at most {B}")
    check(op, v_t.device, v_t=(v_t, shape), v_uncond=(v_uncond, shape), guidance=(guidance, (B,)), mix=(mix, (B,)))
    check(op, v_t.device, dt=(dt, (len(dt),)))
    if v_cond is not None:
        check(op, v_t.device, v_cond=(v_cond, (len(dt), *shape[1:])))
    return _look_ahead(v_t, v_uncond, v_cond, guidance, mix, dt)
