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
from soflow.kernels.self_attention import check_packed, load_block, store_block
from soflow.kernels.tuning import ATTENTION_STAGES, MAX_HEAD_DIM, attention_difference_launch

# P and dP times this, a power of two, enter their products: float16 holds no small dP, and both are at most 1
PROBABILITY_SCALE = tl.constexpr(32768.0)


@triton.jit
def _scores(q, dq, qkv_ptr, dqkv_ptr, keys, T, H, scale, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """S and dS of one block of queries and keys, to base 2; keys beyond T get S = -inf."""
    k = load_block(qkv_ptr, 1, 3, keys, T, H, HEAD_DIM, BLOCK_D)
    dk = load_block(dqkv_ptr, 1, 3, keys, T, H, HEAD_DIM, BLOCK_D)
    scale *= LOG2_E
    S = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    S = tl.where(keys[None, :] < T, S, float("-inf"))
    dS = tl.dot(dq, tl.trans(k), input_precision="ieee")
    if q.dtype == tl.float32:
        # rounds the sum no more than it does all others, and saves a product without tensor cores
        dS = tl.dot(q + dq, tl.trans(dk), dS, input_precision="ieee")
    else:
        dS = tl.dot(q, tl.trans(dk), dS, input_precision="ieee")
        dS = tl.dot(dq, tl.trans(dk), dS, input_precision="ieee")
    return S, dS * scale


@triton.jit
def _softmaxes(S, dS, row_max, moved_max):
    """The softmaxes of S and of S + dS, not yet normalised."""
    return tl.exp2(S - row_max[:, None]), tl.exp2(S + dS - moved_max[:, None])


@triton.jit
def _sums(P, moved, dS):
    """sum(P), sum(moved) and sum(P (2^dS - 1)) of one block of keys."""
    return tl.sum(P, axis=1), tl.sum(moved, axis=1), tl.sum(P * exp2m1(dS), axis=1)


@triton.jit
def _moved_values(do, P, moved, dS, lz, qkv_ptr, dqkv_ptr, keys, T, H, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """What one block of keys adds to do = dP v + (P + dP) dv, times the scale of the softmaxes P and P + dP."""
    g = dS - lz[:, None]
    dP = tl.where(tl.abs(g) < 1.0, P * exp2m1_series(g), moved - P)
    v = load_block(qkv_ptr, 2, 3, keys, T, H, HEAD_DIM, BLOCK_D)
    dv = load_block(dqkv_ptr, 2, 3, keys, T, H, HEAD_DIM, BLOCK_D)
    if v.dtype == tl.float32:
        # a sum of each block: one over all keys would be rounded more often than eager's
        added = tl.dot(dP, v, input_precision="ieee")
        return do + tl.dot(moved, dv, added, input_precision="ieee")
    do = tl.dot(dP.to(v.dtype), v, do)
    return tl.dot(moved.to(v.dtype), dv, do)


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
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    queries = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = load_block(qkv_ptr, 0, 3, queries, T, H, HEAD_DIM, BLOCK_D)
    dq = load_block(dqkv_ptr, 0, 3, queries, T, H, HEAD_DIM, BLOCK_D)
    if ONE_BLOCK:
        S, dS = _scores(q, dq, qkv_ptr, dqkv_ptr, queries, T, H, scale, HEAD_DIM, BLOCK_D)
        row_max, moved_max = tl.max(S, axis=1), tl.max(S + dS, axis=1)
        P, moved = _softmaxes(S, dS, row_max, moved_max)
        normaliser, moved_normaliser, z = _sums(P, moved, dS)
    else:
        row_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        moved_max = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
        normaliser = tl.zeros((BLOCK_Q,), tl.float32)
        moved_normaliser = tl.zeros((BLOCK_Q,), tl.float32)
        z = tl.zeros((BLOCK_Q,), tl.float32)
        for first in range(0, T, BLOCK_K):
            keys = first + tl.arange(0, BLOCK_K)
            S, dS = _scores(q, dq, qkv_ptr, dqkv_ptr, keys, T, H, scale, HEAD_DIM, BLOCK_D)
            new_max = tl.maximum(row_max, tl.max(S, axis=1))
            new_moved_max = tl.maximum(moved_max, tl.max(S + dS, axis=1))
            shrink, moved_shrink = tl.exp2(row_max - new_max), tl.exp2(moved_max - new_moved_max)
            row_max, moved_max = new_max, new_moved_max
            P, moved = _softmaxes(S, dS, row_max, moved_max)
            sum_P, sum_moved, sum_z = _sums(P, moved, dS)
            normaliser = normaliser * shrink + sum_P
            moved_normaliser = moved_normaliser * moved_shrink + sum_moved
            z = z * shrink + sum_z
    factor = (1.0 / normaliser * PROBABILITY_SCALE)[:, None]
    moved_factor = (1.0 / moved_normaliser * PROBABILITY_SCALE)[:, None]
    z /= normaliser
    # where the normaliser moves far no g is small: all differences are those of the softmaxes
    lz = tl.where(tl.abs(z) < 0.5, log1p(z) * LOG2_E, float("inf"))

    do = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    if ONE_BLOCK:
        do = _moved_values(
            do, P * factor, moved * moved_factor, dS, lz, qkv_ptr, dqkv_ptr, queries, T, H, HEAD_DIM, BLOCK_D
        )
    else:
        for first in range(0, T, BLOCK_K):
            keys = first + tl.arange(0, BLOCK_K)
            S, dS = _scores(q, dq, qkv_ptr, dqkv_ptr, keys, T, H, scale, HEAD_DIM, BLOCK_D)
            P, moved = _softmaxes(S, dS, row_max, moved_max)
            do = _moved_values(
                do, P * factor, moved * moved_factor, dS, lz, qkv_ptr, dqkv_ptr, keys, T, H, HEAD_DIM, BLOCK_D
            )
    store_block(do_ptr, 0, 1, do * (1.0 / PROBABILITY_SCALE), queries, T, H, HEAD_DIM, BLOCK_D)


def _launch_attention_difference(qkv: Tensor, dqkv: Tensor, num_heads: int) -> Tensor:
    qkv, dqkv = qkv.contiguous(), dqkv.to(qkv.dtype).contiguous()
    B, T, width = qkv.shape
    head_dim = width // (3 * num_heads)
    do = torch.empty((B, T, width // 3), device=qkv.device, dtype=qkv.dtype)
    if do.numel():
        check_grid("attention_difference", "samples", B)
        launch = attention_difference_launch(T, head_dim, qkv.dtype)
        _attention_difference_kernel[(triton.cdiv(T, launch.block_q), num_heads, B)](
            qkv,
            dqkv,
            do,
            T,
            num_heads,
            head_dim**-0.5,
            HEAD_DIM=head_dim,
            BLOCK_D=launch.block_d,
            BLOCK_Q=launch.block_q,
            BLOCK_K=launch.block_k,
            ONE_BLOCK=launch.block_k >= T,
            num_warps=launch.num_warps,
            num_stages=ATTENTION_STAGES,
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
