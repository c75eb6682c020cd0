"""Functions of the kernels that Triton lacks, or has only where its interpreter does not go. All in float32."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# gelu(x) = x sigmoid(x (GELU_SCALE + GELU_CUBE x^2))
GELU_SCALE = tl.constexpr(2.302208198144325)  # 2 sqrt(2 / pi) log2(e)
GELU_CUBE = tl.constexpr(0.1029432395800235)  # 0.044715 times that


@triton.jit
def exp2m1_series(x):
    """2^x - 1 for |x| < 1, precise relative to itself: its best polynomial, off by half a rounding."""
    p = 1.52595167e-5
    p = p * x + 1.56323658e-4
    p = p * x + 1.33351411e-3
    p = p * x + 9.61701572e-3
    p = p * x + 5.55040352e-2
    p = p * x + 2.40226641e-1
    p = p * x + 6.93147182e-1
    return p * x


@triton.jit
def exp2m1(x):
    """2^x - 1, precise relative to itself also for small x."""
    return tl.where(tl.abs(x) < 1.0, exp2m1_series(x), tl.exp2(x) - 1.0)


@triton.jit
def sigmoid(x):
    """1 / (1 + 2^-x).  To base 2, which is one instruction of a GPU: to base e it would be five."""
    return 1.0 / (1.0 + tl.exp2(-x))


@triton.jit
def sigmoid_derivative(x):
    """s = sigmoid(x), and s (1 - s) = ds/dx / ln(2) without the cancellation where s nears 1."""
    e = tl.exp2(tl.minimum(-x, 126.0))  # its reciprocal is no less than float32 holds
    s = 1.0 / (1.0 + e)
    return s, e * s * s


@triton.jit
def sigmoid_difference(x, dx):
    """sigmoid(x + dx), and sigmoid(x + dx) - sigmoid(x): precise relative to themselves, or to 2^-63 if that is more.

    For a = 2^-x and b = 2^-(x + dx) the difference is (a - b) / ((1 + a) (1 + b)), and a - b = b (2^dx - 1).
    """
    # the product of two of them stays finite
    a, b = tl.exp2(tl.minimum(-x, 63.0)), tl.exp2(tl.minimum(-(x + dx), 63.0))
    r = 1.0 / ((1.0 + a) * (1.0 + b))
    return r * (1.0 + a), r * tl.where(tl.abs(dx) < 1.0, b * exp2m1_series(dx), a - b)


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
