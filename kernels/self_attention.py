"""Self-attention on packed qkv, forward and backward: no permutes, no copies, nothing of size T x T.

qkv: (B, T, 3 H d) fp32 | bf16 | fp16, packed as (3, H, d), d up to 128.  o: (B, T, H d).  lse: (B, H, T) fp32, the
logarithm to base 2 of each query's normaliser: a GPU's exponential is one of base 2.  Products take their inputs in the
dtype of qkv and sum in fp32; scores and the softmax are fp32.

A block of tokens is a tuple of one tensor or two, BLOCK_D and REST_D wide: products want powers of two, and 64 + 16 are
fewer than 128 for a head of 72 numbers.

Forward: a program owns a block of queries of one head and walks the keys once, with a running maximum. Backward for few
tokens: one program per head holds them all, every product is made once. For more: a program per block of keys walks the
queries for dk and dv, another per block of queries walks the keys for dq: the same bits again, without atomics.

`tuning.attention_is_fused` says where these are used, and PyTorch's attention where not.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from soflow.kernels import reference
from soflow.kernels.library import check, check_dimensions, check_grid, check_width, register
from soflow.kernels.math import LOG2_E
from soflow.kernels.tuning import (
    attention_bwd_launch,
    attention_bwd_queries_launch,
    attention_is_fused,
    attention_launch,
)


@triton.jit
def _head(H):
    """The program's head, counted over all samples."""
    return tl.program_id(2).to(tl.int64) * H + tl.program_id(1)


@triton.jit
def _places(
    ptr, part: tl.constexpr, parts: tl.constexpr, tokens, first, T, H, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr
):
    """Pointers to WIDTH numbers of the program's head, from `first` on, in (B, T, parts, H, d); and which exist."""
    sample, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    cols = first + tl.arange(0, WIDTH)
    row = H * HEAD_DIM
    base = sample * T * parts * row + head * HEAD_DIM + part * row
    mask = (tokens[:, None] < T) & (cols[None, :] < HEAD_DIM)
    return ptr + base + tokens[:, None] * (parts * row) + cols[None, :], mask


@triton.jit
def load_block(
    ptr,
    part: tl.constexpr,
    parts: tl.constexpr,
    tokens,
    T,
    H,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
):
    """Tokens of the program's head as a block, zero beyond T and HEAD_DIM; q, k, v are 0, 1, 2 of 3 parts."""
    pointers, mask = _places(ptr, part, parts, tokens, 0, T, H, HEAD_DIM, BLOCK_D)
    block = tl.load(pointers, mask=mask, other=0.0)
    if REST_D == 0:
        return (block,)
    else:
        pointers, mask = _places(ptr, part, parts, tokens, BLOCK_D, T, H, HEAD_DIM, REST_D)
        return block, tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_block(
    ptr,
    part: tl.constexpr,
    parts: tl.constexpr,
    block,
    tokens,
    T,
    H,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
):
    """What `load_block` would load."""
    pointers, mask = _places(ptr, part, parts, tokens, 0, T, H, HEAD_DIM, BLOCK_D)
    tl.store(pointers, block[0], mask=mask)
    if REST_D > 0:
        pointers, mask = _places(ptr, part, parts, tokens, BLOCK_D, T, H, HEAD_DIM, REST_D)
        tl.store(pointers, block[1], mask=mask)


@triton.jit
def zero_block(tokens: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr):
    """A block in fp32 to add to."""
    block = tl.zeros((tokens, BLOCK_D), tl.float32)
    if REST_D == 0:
        return (block,)
    else:
        return block, tl.zeros((tokens, REST_D), tl.float32)


@triton.jit
def multiply_add(matrix, block, total):
    """total + matrix block, a block; matrix: (tokens of the result, tokens of `block`)."""
    first = tl.dot(matrix, block[0], total[0], input_precision="ieee")
    if len(block) == 1:
        return (first,)
    else:
        return first, tl.dot(matrix, block[1], total[1], input_precision="ieee")


@triton.jit
def scale_block(block, factor):
    """block factor, where the factor is (tokens, 1) or a number."""
    if len(block) == 1:
        return (block[0] * factor,)
    else:
        return block[0] * factor, block[1] * factor


@triton.jit
def inner_products(a, b, total=None):
    """a b^T, of every token of one block with every token of the other; added to `total`, if there is one."""
    total = tl.dot(a[0], tl.trans(b[0]), total, input_precision="ieee")
    if len(a) == 2:
        total = tl.dot(a[1], tl.trans(b[1]), total, input_precision="ieee")
    return total


@triton.jit
def _load_queries(
    qkv_ptr, o_ptr, lse_ptr, do_ptr, queries, T, H, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, REST_D: tl.constexpr
):
    """What backward needs of a block of queries: q, do, lse and delta = sum(do o)."""
    do = load_block(do_ptr, 0, 1, queries, T, H, HEAD_DIM, BLOCK_D, REST_D)
    o = load_block(o_ptr, 0, 1, queries, T, H, HEAD_DIM, BLOCK_D, REST_D)
    delta = tl.sum(do[0].to(tl.float32) * o[0].to(tl.float32), axis=1)
    if len(do) == 2:
        delta += tl.sum(do[1].to(tl.float32) * o[1].to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + _head(H) * T + queries, mask=queries < T, other=0.0)
    q = load_block(qkv_ptr, 0, 3, queries, T, H, HEAD_DIM, BLOCK_D, REST_D)
    return q, do, lse, delta


@triton.jit
def _probabilities(q, k, lse, keys, T, scale):
    """P of a block of queries and keys; 0 for keys beyond T."""
    S = inner_products(q, k) * (scale * LOG2_E)
    return tl.where(keys[None, :] < T, tl.exp2(S - lse[:, None]), 0.0)


@triton.jit
def _score_gradient(P, do, v, delta):
    """P (do v^T - delta), the gradient of the scores, in the dtype that a product takes."""
    dP = inner_products(do, v)
    return (P * (dP - delta[:, None])).to(v[0].dtype)


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr,
    o_ptr,
    lse_ptr,
    T,
    H,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TURN_T: tl.constexpr,
):
    queries = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    scale *= LOG2_E
    q = load_block(qkv_ptr, 0, 3, queries, T, H, HEAD_DIM, BLOCK_D, REST_D)
    row_max = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    normaliser = tl.zeros((BLOCK_T,), tl.float32)
    o = zero_block(BLOCK_T, BLOCK_D, REST_D)
    for first in range(0, T, TURN_T):
        keys = first + tl.arange(0, TURN_T)
        k = load_block(qkv_ptr, 1, 3, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
        v = load_block(qkv_ptr, 2, 3, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
        S = tl.where(keys[None, :] < T, inner_products(q, k), float("-inf"))
        new_max = tl.maximum(row_max, tl.max(S, axis=1) * scale)
        shrink = tl.exp2(row_max - new_max)
        P = tl.exp2(S * scale - new_max[:, None])
        normaliser = normaliser * shrink + tl.sum(P, axis=1)
        o = multiply_add(P.to(v[0].dtype), v, scale_block(o, shrink[:, None]))
        row_max = new_max
    store_block(o_ptr, 0, 1, scale_block(o, (1.0 / normaliser)[:, None]), queries, T, H, HEAD_DIM, BLOCK_D, REST_D)
    lse_offs = _head(H) * T + queries
    tl.store(lse_ptr + lse_offs, row_max + tl.log2(normaliser), mask=queries < T)


@triton.jit
def _attention_bwd_few_kernel(
    qkv_ptr,
    o_ptr,
    lse_ptr,
    do_ptr,
    dqkv_ptr,
    T,
    H,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TURN_T: tl.constexpr,
):
    """dq, dk and dv of all T <= BLOCK_T tokens of one head."""
    tokens = tl.arange(0, BLOCK_T)
    q, do, lse, delta = _load_queries(qkv_ptr, o_ptr, lse_ptr, do_ptr, tokens, T, H, HEAD_DIM, BLOCK_D, REST_D)
    k = load_block(qkv_ptr, 1, 3, tokens, T, H, HEAD_DIM, BLOCK_D, REST_D)
    v = load_block(qkv_ptr, 2, 3, tokens, T, H, HEAD_DIM, BLOCK_D, REST_D)
    P = _probabilities(q, k, lse, tokens, T, scale)
    dv = multiply_add(tl.trans(P.to(do[0].dtype)), do, zero_block(BLOCK_T, BLOCK_D, REST_D))
    store_block(dqkv_ptr, 2, 3, dv, tokens, T, H, HEAD_DIM, BLOCK_D, REST_D)
    dS = _score_gradient(P * scale, do, v, delta)
    dk = multiply_add(tl.trans(dS), q, zero_block(BLOCK_T, BLOCK_D, REST_D))
    store_block(dqkv_ptr, 1, 3, dk, tokens, T, H, HEAD_DIM, BLOCK_D, REST_D)
    dq = multiply_add(dS, k, zero_block(BLOCK_T, BLOCK_D, REST_D))
    store_block(dqkv_ptr, 0, 3, dq, tokens, T, H, HEAD_DIM, BLOCK_D, REST_D)


@triton.jit
def _attention_bwd_kv_kernel(
    qkv_ptr,
    o_ptr,
    lse_ptr,
    do_ptr,
    dqkv_ptr,
    T,
    H,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TURN_T: tl.constexpr,
):
    """dk and dv of a block of keys."""
    keys = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    k = load_block(qkv_ptr, 1, 3, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
    v = load_block(qkv_ptr, 2, 3, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
    dk = zero_block(BLOCK_T, BLOCK_D, REST_D)
    dv = zero_block(BLOCK_T, BLOCK_D, REST_D)
    for first in range(0, T, TURN_T):
        queries = first + tl.arange(0, TURN_T)
        q, do, lse, delta = _load_queries(qkv_ptr, o_ptr, lse_ptr, do_ptr, queries, T, H, HEAD_DIM, BLOCK_D, REST_D)
        P = _probabilities(q, k, lse, keys, T, scale)
        dv = multiply_add(tl.trans(P.to(do[0].dtype)), do, dv)
        # scaled here: dk at the end would spill (float32 on sm_100, by Triton 3.6)
        dk = multiply_add(tl.trans(_score_gradient(P * scale, do, v, delta)), q, dk)
    store_block(dqkv_ptr, 2, 3, dv, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
    store_block(dqkv_ptr, 1, 3, dk, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)


@triton.jit
def _attention_bwd_q_kernel(
    qkv_ptr,
    o_ptr,
    lse_ptr,
    do_ptr,
    dqkv_ptr,
    T,
    H,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    REST_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    TURN_T: tl.constexpr,
):
    """dq of a block of queries."""
    queries = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    q, do, lse, delta = _load_queries(qkv_ptr, o_ptr, lse_ptr, do_ptr, queries, T, H, HEAD_DIM, BLOCK_D, REST_D)
    dq = zero_block(BLOCK_T, BLOCK_D, REST_D)
    for first in range(0, T, TURN_T):
        keys = first + tl.arange(0, TURN_T)
        k = load_block(qkv_ptr, 1, 3, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
        v = load_block(qkv_ptr, 2, 3, keys, T, H, HEAD_DIM, BLOCK_D, REST_D)
        P = _probabilities(q, k, lse, keys, T, scale)
        dq = multiply_add(_score_gradient(P, do, v, delta), k, dq)
    store_block(dqkv_ptr, 0, 3, scale_block(dq, scale), queries, T, H, HEAD_DIM, BLOCK_D, REST_D)


# --------------------------------------------------------------------------------------------------


def _launch_attention_fwd(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    qkv = qkv.contiguous()
    o, lse = _outputs(qkv, num_heads)
    if o.numel():
        B, T, _ = qkv.shape
        head_dim = qkv.shape[2] // (3 * num_heads)
        check_grid("attention", "samples", B)
        launch = attention_launch(T, head_dim, qkv.dtype)
        _attention_fwd_kernel[(triton.cdiv(T, launch.block_t), num_heads, B)](
            qkv,
            o,
            lse,
            T,
            num_heads,
            head_dim**-0.5,
            HEAD_DIM=head_dim,
            **launch.options(),
        )
    return o, lse


def _launch_attention_bwd(qkv: Tensor, o: Tensor, lse: Tensor, do: Tensor, num_heads: int) -> Tensor:
    qkv, do = qkv.contiguous(), do.contiguous()
    dqkv = torch.empty_like(qkv)
    if dqkv.numel():
        B, T, _ = qkv.shape
        head_dim = qkv.shape[2] // (3 * num_heads)
        check_grid("attention", "samples", B)
        launch = attention_bwd_launch(T, head_dim, qkv.dtype)
        launches = [(_attention_bwd_few_kernel, launch)]
        if launch.block_t < T:
            queries_launch = attention_bwd_queries_launch(T, head_dim, qkv.dtype)
            launches = [(_attention_bwd_kv_kernel, launch), (_attention_bwd_q_kernel, queries_launch)]
        for kernel, launch in launches:
            kernel[(triton.cdiv(T, launch.block_t), num_heads, B)](
                qkv,
                o,
                lse,
                do,
                dqkv,
                T,
                num_heads,
                head_dim**-0.5,
                HEAD_DIM=head_dim,
                **launch.options(),
            )
    return dqkv


def _outputs(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    B, T, width = qkv.shape
    o = torch.empty((B, T, width // 3), device=qkv.device, dtype=qkv.dtype)
    return o, torch.empty((B, num_heads, T), device=qkv.device, dtype=torch.float32)


def _wide_heads(packed: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    wide = packed.to(torch.promote_types(packed.dtype, torch.float32))
    num_parts = 3 if packed.dim() == 3 else 1
    return wide.unflatten(-1, (num_parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _attention_fwd_cpu(qkv: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    q, k, _ = _wide_heads(qkv, num_heads)
    S = q @ k.mT * q.shape[-1] ** -0.5
    return reference.attention(qkv, num_heads).contiguous(), (S.logsumexp(-1) * LOG2_E.value).float()


def _attention_bwd_cpu(qkv: Tensor, o: Tensor, lse: Tensor, do: Tensor, num_heads: int) -> Tensor:
    q, k, v = _wide_heads(qkv, num_heads)
    wide_o, wide_do = (x.to(q.dtype).unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (o, do))
    scale = q.shape[-1] ** -0.5
    P = torch.softmax(q @ k.mT * scale, dim=-1)
    dS = P * (wide_do @ v.mT - (wide_do * wide_o).sum(-1, keepdim=True)) * scale
    gradients = torch.stack((dS @ k, dS.mT @ q, P.mT @ wide_do))
    return gradients.permute(1, 3, 0, 2, 4).flatten(2).to(qkv.dtype)


_attention_fwd = register(
    "attention_fwd(Tensor qkv, int num_heads) -> (Tensor, Tensor)",
    _launch_attention_fwd,
    _attention_fwd_cpu,
    _outputs,
)
_attention_bwd = register(
    "attention_bwd(Tensor qkv, Tensor o, Tensor lse, Tensor do, int num_heads) -> Tensor",
    _launch_attention_bwd,
    _attention_bwd_cpu,
    lambda qkv, o, lse, do, num_heads: qkv.new_empty(qkv.shape),
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, num_heads):
        o, lse = _attention_fwd(qkv, num_heads)
        ctx.save_for_backward(qkv, o, lse)
        ctx.num_heads = num_heads
        return o

    @staticmethod
    def backward(ctx, do):
        return _attention_bwd(*ctx.saved_tensors, do, ctx.num_heads), None


def check_packed(op: str, qkv: Tensor, num_heads: int) -> None:
    """Raise ValueError unless qkv is (B, T, 3 H d) for H = num_heads, of a dtype and on a device that `op` takes."""
    check_dimensions(op, "qkv", qkv, 3, "(B, T, 3 H d)")
    check_width(op, "qkv", qkv)
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"{op}: num_heads: got {num_heads}, expected a divisor of {qkv.shape[2]} / 3, "
            "a third of the last dimension of qkv"
        )
    check(op, qkv.device, qkv=(qkv, tuple(qkv.shape)))


def attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for each head, (B, T, H d).  See `reference.attention`."""
    check_packed("attention", qkv, num_heads)
    if attention_is_fused(qkv.shape[1], qkv.shape[2] // (3 * num_heads)):
        return _Attention.apply(qkv, num_heads)
    return reference.attention(qkv, num_heads)
