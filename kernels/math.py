"""Functions of the kernels that Triton lacks, or has only where its interpreter does not go. All in float32."""

import triton
import triton.language as tl

GELU_SCALE = tl.constexpr(0.7978845608028654)  # sqrt(2 / pi)
GELU_CUBE = tl.constexpr(0.044715)


@triton.jit
def tanh(x):
    """tanh(x), precise relative to itself also for small x.  Polynomial: Cephes, tanhf."""
    a = tl.abs(x)
    large = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    z = x * x
    p = -5.70498872745e-3
    p = p * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(a < 0.625, p * z * x + x, tl.where(x < 0, -large, large))


@triton.jit
def tanh_difference(x, dx):
    """tanh(x + dx) - tanh(x)."""
    return tanh(dx) * (1.0 - tanh(x) * tanh(x + dx))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def sigmoid_derivative(x):
    """sigmoid(x) (1 - sigmoid(x)), without the cancellation where sigmoid nears 1."""
    e = tl.exp(-tl.abs(x))
    return e / ((1.0 + e) * (1.0 + e))


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
def expm1(x):
    """exp(x) - 1, precise relative to itself also for small x."""
    t = tanh(0.5 * x)
    return tl.where(tl.abs(x) < 1.25, 2.0 * t / (1.0 - t), tl.exp(x) - 1.0)


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
