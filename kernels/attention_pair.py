"""The finite difference of attention: nothing of size T x T leaves the kernel.

qkv, dqkv: (B, T, 3 H d) fp32 | bf16 | fp16, packed as (3, H, d), without permutes.  do: (B, T, H d).  The products take
their inputs in the dtype of qkv and sum in fp32; scores, softmax and their differences are fp32.

A program owns a block of queries of one head and walks the keys twice: for the normalisers of S and S + dS and for
z = sum(P expm1(dS)), then for dP and do = dP v + (P + dP) dv. Where one block holds all keys their scores are kept. The
formulas, for small and for large differences, are those of `reference.attention_difference`, which takes heads wider
than 128; to base 2, as a power of 2 is one instruction of a GPU and one of e five, and without the sums q + dq and
v + dv, which half precision would have to round for a product.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from soflow.kernels import reference
from soflow.kernels.library import check, check_grid, register
from soflow.kernels.math import LOG2_E, exp2m1, exp2m1_series, log1p
from soflow.kernels.self_attention import (
    check_packed,
    inner_products,
    load_block,
    multiply_add,
    scale_block,
    store_block,
    zero_block,
)
from soflow.kernels.tuning import MAX_HEAD_DIM, attention_difference_launch

# P and dP times this, a power of two, enter their products: float16 holds no small dP, and both are at most 1
PROBABILITY_SCALE = tl.constexpr(32768.0)


@triton.jit
def _sum(a, b):
    """The sum of two blocks."""
    if len(a) == 1:
        return (a[0] + b[0],)
    else:
        return a[0] + b[0], a[1] + b[1]


@triton.jit
def _scores(
    q,
    dq,
    qkv_ptr,
    dqkv_ptr,
    keys,
    T,
    H,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
):
    """S and dS of one block of queries and keys, not yet scaled; keys beyond T get S = -inf."""
    k = load_block(qkv_ptr, 1, 3, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
    dk = load_block(dqkv_ptr, 1, 3, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
    S = tl.where(keys[None, :] < T, inner_products(q, k), float("-inf"))
    dS = inner_products(dq, k)
    if q[0].dtype == tl.float32:
        # rounds the sum no more than it does all others, and saves a product without tensor cores
        return S, inner_products(_sum(q, dq), dk, dS)
    else:
        return S, inner_products(dq, dk, inner_products(q, dk, dS))


@triton.jit
def _softmaxes(S, dS, row_max, moved_max, scale):
    """The softmaxes of S and of S + dS, not yet normalised."""
    return tl.exp2(S * scale - row_max[:, None]), tl.exp2((S + dS) * scale - moved_max[:, None])


@triton.jit
def _sums(P, moved, dS, scale):
    """sum(P), sum(moved) and sum(P (2^dS - 1)) of one block of keys."""
    return tl.sum(P, axis=1), tl.sum(moved, axis=1), tl.sum(P * exp2m1(dS * scale), axis=1)


@triton.jit
def _probability_difference(P, moved, g):
    """dP = P (2^g - 1); where g is large, the difference of the softmaxes P and moved."""
    return tl.where(tl.abs(g) < 1.0, P * exp2m1_series(g), moved - P)


@triton.jit
def _add_values(
    do,
    dP,
    moved,
    qkv_ptr,
    dqkv_ptr,
    keys,
    T,
    H,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
):
    """do + dP v + moved dv of one block of keys; moved: P + dP."""
    v = load_block(qkv_ptr, 2, 3, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
    dv = load_block(dqkv_ptr, 2, 3, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
    if v[0].dtype == tl.float32:
        # a sum of each block: one over all keys would be rounded more often than eager's
        added = multiply_add(dP, v, zero_block(dP.shape[0], BLOCK_D, REST_D))
        return _sum(do, multiply_add(moved, dv, added))
    else:
        return multiply_add(moved.to(v[0].dtype), dv, multiply_add(dP.to(v[0].dtype), v, do))


@triton.jit
def _attention_difference_kernel(
    qkv_ptr,
    dqkv_ptr,
    do_ptr,
    T,
    H,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TURN_T: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    queries = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    scale *= LOG2_E
    q = load_block(qkv_ptr, 0, 3, queries, T, H, HEAD_DIM, BLOCK_D, REST_D)
    dq = load_block(dqkv_ptr, 0, 3, queries, T, H, HEAD_DIM, BLOCK_D, REST_D)
    if ONE_BLOCK:
        S, dS = _scores(q, dq, qkv_ptr, dqkv_ptr, queries, T, H, HEAD_DIM, BLOCK_D, REST_D)
        row_max, moved_max = tl.max(S, axis=1) * scale, tl.max(S + dS, axis=1) * scale
        P, moved = _softmaxes(S, dS, row_max, moved_max, scale)
        normaliser, moved_normaliser, z = _sums(P, moved, dS, scale)
    else:
        row_max = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        moved_max = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        normaliser = tl.zeros((BLOCK_T,), tl.float32)
        moved_normaliser = tl.zeros((BLOCK_T,), tl.float32)
        z = tl.zeros((BLOCK_T,), tl.float32)
        for first in range(0, T, TURN_T):
            keys = first + tl.arange(0, TURN_T)
            S, dS = _scores(q, dq, qkv_ptr, dqkv_ptr, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
            new_max = tl.maximum(row_max, tl.max(S, axis=1) * scale)
            new_moved_max = tl.maximum(moved_max, tl.max(S + dS, axis=1) * scale)
            shrink, moved_shrink = tl.exp2(row_max - new_max), tl.exp2(moved_max - new_moved_max)
            row_max, moved_max = new_max, new_moved_max
            P, moved = _softmaxes(S, dS, row_max, moved_max, scale)
            sum_P, sum_moved, sum_z = _sums(P, moved, dS, scale)
            normaliser = normaliser * shrink + sum_P
            moved_normaliser = moved_normaliser * moved_shrink + sum_moved
            z = z * shrink + sum_z
    factor = (1.0 / normaliser * PROBABILITY_SCALE)[:, None]
    moved_factor = (1.0 / moved_normaliser * PROBABILITY_SCALE)[:, None]
    z /= normaliser
    # where the normaliser moves far no g is small: all differences are those of the softmaxes
    lz = tl.where(tl.abs(z) < 0.5, log1p(z) * LOG2_E, float("inf"))[:, None]

    do = zero_block(BLOCK_T, BLOCK_D, REST_D)
    if ONE_BLOCK:
        P, moved = P * factor, moved * moved_factor
        dP = _probability_difference(P, moved, dS * scale - lz)
        do = _add_values(do, dP, moved, qkv_ptr, dqkv_ptr, queries, T, H, HEAD_DIM, BLOCK_D, REST_D)
    else:
        for first in range(0, T, TURN_T):
            keys = first + tl.arange(0, TURN_T)
            S, dS = _scores(q, dq, qkv_ptr, dqkv_ptr, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
            P, moved = _softmaxes(S, dS, row_max, moved_max, scale)
            P, moved = P * factor, moved * moved_factor
            dP = _probability_difference(P, moved, dS * scale - lz)
            do = _add_values(do, dP, moved, qkv_ptr, dqkv_ptr, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
    store_block(do_ptr, 0, 1, scale_block(do, 1.0 / PROBABILITY_SCALE), queries, T, H, HEAD_DIM, BLOCK_D, REST_D)


def _launch_attention_difference(qkv: Tensor, dqkv: Tensor, num_heads: int) -> Tensor:
    qkv, dqkv = qkv.contiguous(), dqkv.to(qkv.dtype).contiguous()
    B, T, width = qkv.shape
    head_dim = width // (3 * num_heads)
    do = torch.empty((B, T, width // 3), device=qkv.device, dtype=qkv.dtype)
    if do.numel():
        check_grid("attention_difference", "samples", B)
        launch = attention_difference_launch(T, head_dim, qkv.dtype)
        _attention_difference_kernel[(triton.cdiv(T, launch.block_t), num_heads, B)](
            qkv,
            dqkv,
            do,
            T,
            num_heads,
            head_dim**-0.5,
            HEAD_DIM=head_dim,
            ONE_BLOCK=launch.turn_t >= T,
            **launch.options(),
        )
    return do


_attention_difference = register(
    "attention_difference(Tensor qkv, Tensor dqkv, int num_heads) -> Tensor",
    _launch_attention_difference,
    reference.attention_difference,
    lambda qkv, dqkv, num_heads: qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3)),
)


def attention_difference(qkv: Tensor, dqkv: Tensor, num_heads: int) -> Tensor:
    """Return attention(qkv + dqkv) - attention(qkv), (B, T, H d).  See `reference.attention_difference`."""
    check_packed("attention_difference", qkv, num_heads)
    check("attention_difference", qkv.device, dqkv=(dqkv, tuple(qkv.shape)))
    if qkv.shape[2] // (3 * num_heads) > MAX_HEAD_DIM:
        return reference.attention_difference(qkv, dqkv, num_heads)
    return _attention_difference(qkv, dqkv, num_heads)
