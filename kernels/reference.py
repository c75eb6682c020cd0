"""Every op of the engine in plain PyTorch: the specification, the CPU implementation and the oracle of the tests.

`soflow.kernels` exports the same names with the same signatures. Tensors are (B, T, D) activations, (B, D) modulation
or (B, ...) samples. Sums, norms and transcendental functions are computed in float32, or in float64 for float64
inputs, and stored as the dtype of the input.

`<op>_difference` is the finite difference of `<op>`: where op maps x to y, it maps (x, dx) to
dy = op(x + dx) - op(x), exactly, without ever subtracting nearby numbers, so that the rounding error of dy is
relative to dy and not to y. Nothing differentiates a difference: the fused ones have no gradient.
"""

import math

import torch
import torch.nn.functional as functional
from torch import Tensor

__all__ = [
    "attention",
    "attention_difference",
    "conv",
    "conv_difference",
    "downsample",
    "draw",
    "gate_residual_norm",
    "gate_residual_norm_difference",
    "gelu",
    "gelu_difference",
    "group_norm",
    "group_norm_difference",
    "interpolate",
    "linear",
    "linear_difference",
    "look_ahead",
    "modulated_norm",
    "modulated_norm_difference",
    "normal",
    "philox",
    "silu",
    "silu_difference",
    "solution_loss",
    "solution_map",
    "time_features",
    "time_features_difference",
    "uniform",
    "upsample",
]

# --------------------------------------------------------------------------------------------------
# Random numbers: a pure function of (seed, step, stream, sample, element), the same however a batch is split.

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF

# Streams of `draw`; other callers of `normal` and `uniform` number theirs from FREE_STREAM.
POSTERIOR_STREAM, NOISE_STREAM, FREE_STREAM = 0, 1, 2


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four 32-bit words of Philox 4x32-10 for 32-bit `counter` and `key` words.

    All are int64 tensors holding values in [0, 2**32) and broadcast together. Source: Salmon et al. 2011, "Parallel
    random numbers: as easy as 1, 2, 3"; the same function as `tl.philox`.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2**64, so that their two halves are those of the unsigned product.
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32) & MASK32 ^ c1 ^ k0,
            product1 & MASK32,
            (product0 >> 32) & MASK32 ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + PHILOX_KEY_INCREMENTS[0]) & MASK32, (k1 + PHILOX_KEY_INCREMENTS[1]) & MASK32
    return c0, c1, c2, c3


def _uniform_words(seed: Tensor, step: Tensor, stream: int, sample: Tensor, num_blocks: int) -> Tensor:
    seed, step, sample = torch.broadcast_tensors(seed, step, sample)
    block = torch.arange(num_blocks, device=sample.device)
    stream_word = torch.full_like(block, stream)
    words = philox(
        (block, stream_word, sample[:, None] & MASK32, step[:, None] & MASK32),
        ((seed & MASK32)[:, None], ((seed >> 32) & MASK32)[:, None]),
    )
    # 23 bits and a half: every value is exact in float32, and neither 0 nor 1 occurs.
    return (torch.stack(words, dim=-1) >> 9).to(torch.float32).add_(0.5).mul_(2.0**-23)


def uniform(seed: Tensor, step: Tensor, stream: int, sample: Tensor, num: int) -> Tensor:
    """Return uniform numbers in (0, 1), (B, num) fp32, that depend on (seed, step, stream, sample, element) alone.

    seed, step: int64, scalar or (B,).  sample: (B,) int64, position in the global batch.
    """
    return _uniform_words(seed, step, stream, sample, -(-num // 4)).flatten(1)[:, :num]


def normal(seed: Tensor, step: Tensor, stream: int, sample: Tensor, num: int) -> Tensor:
    """Return standard normal numbers, (B, num) fp32, that depend on (seed, step, stream, sample, element) alone.

    Box-Muller on the words of one Philox block: (w0, w1) give elements 4i and 4i + 1, (w2, w3) the next two.
    seed, step: int64, scalar or (B,).  sample: (B,) int64, position in the global batch.
    """
    words = _uniform_words(seed, step, stream, sample, -(-num // 4)).unflatten(-1, (2, 2))
    radius = words[..., 0].log().mul_(-2.0).sqrt_()
    angle = words[..., 1] * (2.0 * math.pi)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)[:, :num]


# --------------------------------------------------------------------------------------------------
# The training pair: data, noise and the point between them.


def draw(mean: Tensor, std: Tensor | None, seed: Tensor, step: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return data x_0 = mean + std * z and noise x_1, (B, C, H, W) fp32, drawn for (seed, step, sample).

    mean, std: (B, C, H, W) of any float dtype, moments of a latent's posterior; std None takes x_0 = mean.
    """
    num = mean[0].numel() if mean.numel() else 0
    x_1 = normal(seed, step, NOISE_STREAM, sample, num).view(mean.shape)
    if std is None:
        return mean.float(), x_1
    return (mean + std * normal(seed, step, POSTERIOR_STREAM, sample, num).view(mean.shape)).float(), x_1


def interpolate(
    x_0: Tensor, x_1: Tensor, alpha_t: Tensor, beta_t: Tensor, dalpha_t: Tensor, dbeta_t: Tensor
) -> tuple[Tensor, Tensor]:
    """Return x_t = alpha_t x_0 + beta_t x_1 and v_t = dalpha_t x_0 + dbeta_t x_1.

    x_0, x_1: (B, ...).  alpha_t, beta_t, dalpha_t, dbeta_t: (B,).  Rounded to the dtype of x_0.
    """
    x_t = _rows(alpha_t, x_0) * x_0 + _rows(beta_t, x_0) * x_1
    v_t = _rows(dalpha_t, x_0) * x_0 + _rows(dbeta_t, x_0) * x_1
    return x_t.to(x_0.dtype), v_t.to(x_0.dtype)


def look_ahead(
    v_t: Tensor, v_uncond: Tensor, v_cond: Tensor | None, guidance: Tensor, mix: Tensor, dt: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the guided velocity v = m (v_t + g (v_t - v_uncond)) + (1 - m) v_cond and the step dx = v dt.

    v_t, v_uncond: (B, ...).  v_cond, dt: (N, ...), (N,): the consistency rows, which are the last N of the batch; the
    rows before them are velocity rows, whose v is the guided velocity unmixed (their own prediction mixes in the loss).
    v_cond None stands for m = 1.  guidance g, mix m: (B,); g = 0 and m = 1 leave v_t as it is (rows of the null mask).
    Shapes out: v (B, ...), dx (N, ...), both rounded to the dtype of v_t.
    """
    num_velocity = len(v_t) - len(dt)
    v = v_t + _rows(guidance, v_t) * (v_t - v_uncond)
    if v_cond is not None:
        m = _rows(mix[num_velocity:], v_cond)
        v = torch.cat((v[:num_velocity], m * v[num_velocity:] + (1.0 - m) * v_cond))
    return v.to(v_t.dtype), (v[num_velocity:] * _rows(dt, v)).to(v_t.dtype)


def solution_map(x: Tensor, F_t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return f = a x + b F_t, the solution f(x, t, s) from the network output.  x, F_t: (B, ...); a, b: (B,)."""
    return _rows(a, x) * x + _rows(b, x) * F_t


# --------------------------------------------------------------------------------------------------
# The loss.


class _SolutionLoss(torch.autograd.Function):
    """Computes the gradient in forward and saves nothing else."""

    @staticmethod
    def forward(ctx, F_t, dF, x, v, residual_coefficients, weight_scale, gradient_factor, p, eps):  # type: ignore[no-untyped-def]
        num_rows, num_velocity = len(F_t), len(F_t) - len(dF)
        # a row may be a single number
        F_rows, x, v, dF = (tensor.unsqueeze(1).flatten(1) for tensor in (F_t, x, v, dF))
        c_x, c_v, c_F, c_d = (c[:, None] for c in residual_coefficients.unbind(1))
        residual = c_x * x + c_v * v + c_F * F_rows
        residual[num_velocity:] += c_d[num_velocity:] * dF
        mse = residual.square().mean(1)
        weight = weight_scale * (mse + eps).pow(-p)
        value = mse.clone()
        value[num_velocity:] = (gradient_factor * (F_rows * residual).mean(1))[num_velocity:]
        gradient = (gradient_factor * weight)[:, None] * residual / (max(num_rows, 1) * F_rows.shape[1])
        rows = torch.stack((weight * value, mse, weight))
        parts = [part.mean(1) if part.shape[1] else part.new_zeros(3) for part in rows.tensor_split((num_velocity,), 1)]
        ctx.save_for_backward(gradient.view(F_t.shape))
        statistics = torch.stack(parts)
        ctx.mark_non_differentiable(statistics)
        return rows[0].sum() / max(num_rows, 1), statistics

    @staticmethod
    def backward(ctx, d_loss, _):  # type: ignore[no-untyped-def]
        (gradient,) = ctx.saved_tensors
        return d_loss * gradient, *(None,) * 8


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
    """Return the mean over rows of weight * value, and the means of (weight * value, mse, weight) over each part.

    Per row: residual = c_x x + c_v v + c_F F_t + c_d dF, mse = mean(residual^2), weight = weight_scale (mse + eps)^-p.
    Velocity rows: the residual is the velocity error, value = mse. Consistency rows: the residual is the slope,
    value = gradient_factor mean(F_t residual), a surrogate whose value is no distance.
    Gradient, of F_t alone and by definition, not by differentiation (weight and targets are detached):
    d loss / d F_t = gradient_factor weight residual / (B N), with N elements per row.

    F_t, x, v: (B, ...).  dF: (M, ...), of the consistency rows, which are the last M of the batch.
    residual_coefficients: (B, 4), in the order x, v, F, d.  weight_scale, gradient_factor: (B,).
    Returns a scalar and (2, 3): the means over the velocity rows, then over the consistency rows (0 for no rows).
    """
    return _SolutionLoss.apply(F_t, dF, x, v, residual_coefficients, weight_scale, gradient_factor, p, eps)


# --------------------------------------------------------------------------------------------------
# The network.


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + bias; the product is computed in the dtype of W, the result has the dtype of x."""
    if weight.dtype == x.dtype:
        return functional.linear(x, weight, bias)
    y = functional.linear(x.to(weight.dtype), weight).to(x.dtype)
    return y if bias is None else y + bias


def linear_difference(dx: Tensor, weight: Tensor) -> Tensor:
    """Return dx W^T: a linear map moves by its image of the difference."""
    return linear(dx, weight)


def time_features(t: Tensor, num_features: int, max_period: float = 10000.0) -> Tensor:
    """Return [cos(t w), sin(t w)] with w_i = max_period^(-i / (num_features / 2)), (B, num_features).  t: (B,)."""
    angle = t[:, None] * _frequencies(t, num_features, max_period)
    return torch.cat((angle.cos(), angle.sin()), dim=1)


def time_features_difference(t: Tensor, dt: Tensor, num_features: int, max_period: float = 10000.0) -> Tensor:
    """Return time_features(t + dt) - time_features(t) by the sum-to-product identities, (B, num_features)."""
    frequencies = _frequencies(t, num_features, max_period)
    middle = (t + 0.5 * dt)[:, None] * frequencies
    chord = 2.0 * (0.5 * dt[:, None] * frequencies).sin()
    return torch.cat((-middle.sin() * chord, middle.cos() * chord), dim=1)


def silu(x: Tensor) -> Tensor:
    """Return x sigmoid(x)."""
    return functional.silu(x)


def silu_difference(x: Tensor, dx: Tensor) -> Tensor:
    """Return silu(x + dx) - silu(x) = dx sigmoid(x + dx) + x dtanh(x / 2, dx / 2) / 2."""
    y, d = _wide(x), _wide(dx)
    return (d * torch.sigmoid(y + d) + 0.5 * y * _tanh_difference(0.5 * y, 0.5 * d)).to(x.dtype)


GELU_SCALE = math.sqrt(2.0 / math.pi)
GELU_CUBE = 0.044715


def gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Return GELU(x + bias) in the tanh form.  x: (..., D); bias: (D,)."""
    return functional.gelu(_wide(x) + _wide(bias), approximate="tanh").to(x.dtype)


def gelu_difference(x: Tensor, dx: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(x + dx, bias) - gelu(x, bias).  x, dx: (..., D); bias: (D,)."""
    y, d = _wide(x) + _wide(bias), _wide(dx)
    u = GELU_SCALE * (y + GELU_CUBE * y * y * y)
    # in place where it can be: the widest activation of a network, of which every further copy costs memory and time
    h = (3.0 * y).mul_(y + d).addcmul_(d, d).mul_(GELU_CUBE).add_(1.0).mul_(d).mul_(GELU_SCALE)
    end = (u + h).tanh_()
    # d (1 + tanh(u + h)) + y dtanh(u, h)
    u.tanh_().mul_(end).neg_().add_(1.0).mul_(h.tanh_()).mul_(y)
    return end.add_(1.0).mul_(d).add_(u).mul_(0.5).to(x.dtype)


def modulated_norm(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, dtype: torch.dtype | None = None
) -> Tensor:
    """Return LayerNorm(x) (1 + scale) + shift, without affine parameters.  x: (B, T, D); shift, scale: (B, D).

    dtype: of the result; None is that of x. A residual stream in float32 feeds branches in bfloat16.
    """
    normed = functional.layer_norm(_wide(x), x.shape[-1:], eps=eps)
    return (normed * (1.0 + _wide(scale)[:, None]) + shift[:, None]).to(dtype or x.dtype)


def modulated_norm_difference(
    x: Tensor,
    dx: Tensor,
    scale: Tensor,
    dshift: Tensor,
    dscale: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the difference of modulated_norm.  x, dx: (B, T, D); scale, dshift, dscale: (B, D).  The shift cancels."""
    x_wide, dx_wide = _wide(x), _wide(dx)
    xc = x_wide - x_wide.mean(-1, keepdim=True)
    dc = dx_wide - dx_wide.mean(-1, keepdim=True)
    var = xc.square().mean(-1, keepdim=True) + eps
    dvar = (dc * (2.0 * xc + dc)).mean(-1, keepdim=True)
    # of a row that moves to a constant one rounding can say less than eps
    std_0, std_1 = var.sqrt(), (var + dvar).clamp(min=eps).sqrt()
    dnormed = dc / std_1 - xc * (dvar / (std_0 * std_1 * (std_0 + std_1)))
    factor = 1.0 + _wide(scale) + _wide(dscale)
    dy = xc / std_0 * dscale[:, None] + dnormed * factor[:, None] + dshift[:, None]
    return dy.to(dtype or x.dtype)


def gate_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the residual stream z = x + gate y and modulated_norm(z).  x, y: (B, T, D); gate, shift, scale: (B, D).

    z has the dtype of x; dtype: of the second result, None is that of x.
    """
    z = (x + _wide(gate)[:, None] * y).to(x.dtype)
    return z, modulated_norm(z, shift, scale, eps, dtype)


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
    """Return the differences of both results of gate_residual_norm, given its residual stream z = x + gate y."""
    gate, dgate = _wide(gate), _wide(dgate)
    dz = (dx + y * dgate[:, None] + dy * (gate + dgate)[:, None]).to(z.dtype)
    return dz, modulated_norm_difference(z, dz, scale, dshift, dscale, eps, dtype)


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for each head, (B, T, H d).  qkv: (B, T, 3 H d), packed as (3, H, d)."""
    q, k, v = _heads(qkv, num_heads)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention_difference(qkv: Tensor, dqkv: Tensor, num_heads: int) -> Tensor:
    """Return attention(qkv + dqkv) - attention(qkv), (B, T, H d).

    dS = dq k^T + (q + dq) dk^T; z = sum(P expm1(dS)), and with the shift of the normaliser lz = log1p(z), g = dS - lz:
    dP = P expm1(g), and do = dP (v + dv) + P dv. Where z is beyond 1/2 or g beyond 1, dP is the difference of the
    softmaxes: nothing cancels there, exponentials might overflow, and a large lz is rounded more coarsely than they.
    """
    (q, k, v), (dq, dk, dv) = _heads(_wide(qkv), num_heads), _heads(_wide(dqkv), num_heads)
    scale = 1.0 / math.sqrt(q.shape[-1])
    S = scale * (q @ k.mT)
    dS = scale * (dq @ k.mT + (q + dq) @ dk.mT)
    normaliser = S.logsumexp(-1, keepdim=True)
    P = torch.exp(S - normaliser)
    z = (P * torch.expm1(dS)).sum(-1, keepdim=True)
    g = dS - torch.log1p(z)
    is_small = (z.abs() < 0.5) & (g.abs() < 1.0)
    dP = torch.where(is_small, P * torch.expm1(g), (S + dS).softmax(-1) - P)
    return (dP @ (v + dv) + P @ dv).transpose(1, 2).flatten(2).to(qkv.dtype)


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the convolution of x, (B, C, H, W), with weight, (D, C, k, k), k odd, zero-padded to (B, D, H, W).

    The products are computed in the dtype of the weight, the result has the dtype of x.
    """
    padding = weight.shape[-1] // 2
    if weight.dtype == x.dtype:
        return functional.conv2d(x, weight, bias, padding=padding)
    y = functional.conv2d(x.to(weight.dtype), weight, padding=padding).to(x.dtype)
    return y if bias is None else y + bias[:, None, None]


def conv_difference(dx: Tensor, weight: Tensor) -> Tensor:
    """Return conv(dx, weight): a linear map moves by its image of the difference."""
    return conv(dx, weight)


def downsample(x: Tensor, taps: Tensor) -> Tensor:
    """Return x, (B, C, H, W), filtered by `taps` and halved to (B, C, H / 2, W / 2); its own difference.

    taps: (1, 1, k, k) with k even and sum 1.  H, W even. Beyond its border x is zero.
    """
    return functional.conv2d(x, _per_channel(taps, x), stride=2, padding=_resampling_padding(taps), groups=x.shape[1])


def upsample(x: Tensor, taps: Tensor) -> Tensor:
    """Return x, (B, C, H, W), spread by `taps` to (B, C, 2 H, 2 W), four times the transpose of downsample.

    taps: (1, 1, k, k) with k even and sum 1. A linear map: its own difference.
    """
    weight, padding = _per_channel(4.0 * taps, x), _resampling_padding(taps)
    return functional.conv_transpose2d(x, weight, stride=2, padding=padding, groups=x.shape[1])


def group_norm(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6) -> Tensor:
    """Return GroupNorm(x) weight + bias.  x: (B, C, H, W); weight, bias: (C,); num_groups divides C."""
    # what torch does itself, but for forward-mode differentiation
    wide = _wide(x).contiguous()
    return functional.group_norm(wide, num_groups, weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)


def group_norm_difference(x: Tensor, dx: Tensor, weight: Tensor, num_groups: int, eps: float = 1e-6) -> Tensor:
    """Return the difference of group_norm.  x, dx: (B, C, H, W); weight: (C,).  The bias cancels."""
    groups, dgroups = (_wide(tensor).unflatten(1, (num_groups, -1)).flatten(2) for tensor in (x, dx))
    none = groups.new_zeros(1, 1)
    dnormed = modulated_norm_difference(groups, dgroups, none, none, none, eps).reshape(x.shape)
    return (dnormed * weight.to(dnormed.dtype)[:, None, None]).to(x.dtype)


# --------------------------------------------------------------------------------------------------


def _rows(c: Tensor, x: Tensor) -> Tensor:
    return c.view(-1, *(1,) * (x.dim() - 1))


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    # taken apart before anything is permuted: so backward stacks the gradients in the layout of qkv, without a copy
    q, k, v = (part.transpose(1, 2) for part in qkv.unflatten(-1, (3, num_heads, -1)).unbind(2))
    return q, k, v


def _per_channel(taps: Tensor, x: Tensor) -> Tensor:
    return taps.to(x.dtype).expand(x.shape[1], -1, -1, -1)


def _resampling_padding(taps: Tensor) -> int:
    return (taps.shape[-1] - 1) // 2


def _frequencies(t: Tensor, num_features: int, max_period: float) -> Tensor:
    half = num_features // 2
    return torch.exp(torch.arange(half, device=t.device, dtype=t.dtype) * (-math.log(max_period) / half))


def _tanh_difference(x: Tensor, dx: Tensor) -> Tensor:
    return torch.tanh(dx) * (1.0 - torch.tanh(x) * torch.tanh(x + dx))
