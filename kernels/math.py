"""Functions of the kernels that Triton lacks, or has only where its interpreter does not go. All in float32."""

import triton
import triton.language as tl

GELU_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
GELU_CUBE = tl.constexpr(0.07135481282553555)  # 0.044715 times that


@triton.jit
def _expm1_series(x):
    """exp(x) - 1 for |x| < 1/2, precise relative to itself."""
    p = 2.7557319e-6
    p = p * x + 2.4801587e-5
    p = p * x + 1.98412698e-4
    p = p * x + 1.388888889e-3
    p = p * x + 8.333333333e-3
    p = p * x + 4.1666666667e-2
    p = p * x + 1.6666666667e-1
    p = p * x + 0.5
    return p * x * x + x


@triton.jit
def expm1(x):
    """exp(x) - 1, precise relative to itself also for small x."""
    return tl.where(tl.abs(x) < 0.5, _expm1_series(x), tl.exp(x) - 1.0)


@triton.jit
def _exp(x):
    """exp(min(x, 80)): 1 + exp(x) stays finite, and so does its reciprocal."""
    return tl.exp(tl.minimum(x, 80.0))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + _exp(-x))


@triton.jit
def sigmoid_derivative(x):
    """sigmoid(x), and its derivative sigmoid(x) (1 - sigmoid(x)) without the cancellation where sigmoid nears 1."""
    e = _exp(-x)
    s = 1.0 / (1.0 + e)
    return s, e * s * s


@triton.jit
def sigmoid_difference(x, dx):
    """sigmoid(x + dx), and sigmoid(x + dx) - sigmoid(x) precise relative to itself.

    For low < high the difference is (1 - exp(low - high)) / ((1 + exp(-high)) (1 + exp(low))): nothing cancels.
    """
    low, high = tl.minimum(x, x + dx), tl.maximum(x, x + dx)
    a, b = _exp(-high), _exp(low)
    r = 1.0 / ((1.0 + a) * (1.0 + b))
    gap = tl.abs(dx)
    gap = tl.where(gap < 0.5, -_expm1_series(-gap), 1.0 - a * b)
    return r * tl.where(dx < 0, b * (1.0 + a), 1.0 + b), r * tl.where(dx < 0, -gap, gap)


@triton.jit
def cos_sin_turns(u):
    """cos(2 pi u) and sin(2 pi u) for u in [0, 1].  Polynomials on an eighth of a turn: Cephes, cosf and sinf.

    tl.cos and tl.sin keep a table of local memory for arguments that do not occur here.
    """
    quarter = tl.floor(4.0 * u + 0.5)
    r = (u - 0.25 * quarter) * 6.283185307179586
    z = r * r
    p = -1.9515295891e-4
    p = p * z + 8.3321608736e-3
    p = p * z - 1.6666654611e-1
    sin = p * z * r + r
    q = 2.443315711809948e-5
    q = q * z - 1.388731625493765e-3
    q = q * z + 4.166664568298827e-2
    cos = q * z * z - 0.5 * z + 1.0
    turned = (quarter == 1.0) | (quarter == 3.0)
    cos_sign = tl.where((quarter == 1.0) | (quarter == 2.0), -1.0, 1.0)
    sin_sign = tl.where(quarter >= 2.0, tl.where(quarter == 4.0, 1.0, -1.0), 1.0)
    return cos_sign * tl.where(turned, sin, cos), sin_sign * tl.where(turned, cos, sin)


@triton.jit
def log1p(x):
    """log(1 + x) for |x| < 1/2, precise relative to itself also for small x: 2 atanh(x / (2 + x)) as a series."""
    s = x / (2.0 + x)
    z = s * s
    p = 0.0769230769
    p = p * z + 0.0909090909
    p = p * z + 0.1111111111
    p = p * z + 0.1428571429
    p = p * z + 0.2
    p = p * z + 0.3333333333
    p = p * z + 1.0
    return 2.0 * s * p
