"""Launch parameters by shape: static, no tuning at run time, so that a captured graph is always the same.

Those of the norms and of attention; activation, loss and point have a constant or two of their own, for every shape.
They follow from what compiles without spills on sm_80, sm_90 and sm_100 (`python -m bench.resources`), and from the
instructions that the compiled kernels then take for a byte; none was timed on a GPU yet.
"""

from typing import NamedTuple

import torch

# Programs that keep every multiprocessor of the largest GPU busy in a backward whose grid is (slabs, batch).
FULL_GRID = 256
MAX_SLABS = 8
# Rows under way to a program of that backward: the one it works on, and those loaded meanwhile.
NORM_BWD_STAGES = 3
# Tokens of a head that one program of attention holds at most at once, and the widest head it is written for.
FEW_TOKENS = 64
# Turns of attention under way at once: the loads of the next one wait.
ATTENTION_STAGES = 1
MAX_HEAD_DIM = 128


def norm_warps(D: int) -> int:
    """Return the warps of a program that holds a row of D numbers in registers."""
    if D <= 512:
        return 2
    return 4 if D <= 1024 else 8


def num_slabs(B: int, T: int) -> int:
    """Return into how many slabs the T tokens of a sample are cut: one for large batches, up to 8 for small ones."""
    return max(1, min(MAX_SLABS, FULL_GRID // max(B, 1), T))


class AttentionLaunch(NamedTuple):
    """Queries of a program, which are also the keys per turn; the padded width of a head; warps."""

    block_t: int
    block_d: int
    num_warps: int


def attention_launch(T: int, head_dim: int, dtype: torch.dtype) -> AttentionLaunch:
    """Return the launch of attention: up to FEW_TOKENS tokens of half precision are one block.

    Four warps, of which every one owns rows of the scores: eight would share them and compute many twice. float32 has
    no tensor cores (TF32 would round as coarsely as half precision), and its unrolled products fill the registers of
    eight warps.
    """
    block_d = _padded(head_dim)
    if dtype == torch.float32:
        return AttentionLaunch(min(_padded(T), 32 if block_d <= 64 else 16), block_d, 8)
    return AttentionLaunch(min(_padded(T), FEW_TOKENS), block_d, 4)


def attention_bwd_launch(T: int, head_dim: int, dtype: torch.dtype) -> AttentionLaunch:
    """Return the launch of attention backward, which holds more: wide heads need the registers of eight warps."""
    launch = attention_launch(T, head_dim, dtype)
    if dtype == torch.float32:
        launch = launch._replace(block_t=16, num_warps=4)
    return launch._replace(num_warps=8) if launch.block_d > 64 and launch.block_t < T else launch


class AttentionDifferenceLaunch(NamedTuple):
    """Queries of a program; keys per turn; the padded width of a head; warps."""

    block_q: int
    block_k: int
    block_d: int
    num_warps: int


def attention_difference_launch(T: int, head_dim: int, dtype: torch.dtype) -> AttentionDifferenceLaunch:
    """Return the launch of the difference of attention: up to FEW_TOKENS tokens of narrow heads are one block.

    For more, few keys per turn: scores, their differences, both softmaxes and what they give are in registers at once.
    Wide heads need the registers of eight warps, and rows for each; float32 smaller blocks, as in `attention_launch`.
    """
    block_t, block_d, num_warps = attention_launch(T, head_dim, dtype)
    if dtype == torch.float32:
        return AttentionDifferenceLaunch(min(_padded(T), 32), block_t, block_d, num_warps if block_d <= 64 else 4)
    if block_d > 64:
        return AttentionDifferenceLaunch(min(_padded(T), 128), min(_padded(T), 32), block_d, 8)
    return AttentionDifferenceLaunch(block_t, block_t if T <= FEW_TOKENS else 32, block_d, num_warps)


def attention_is_fused(T: int, head_dim: int) -> bool:
    """Return whether attention itself is ours, for T tokens in heads of so many numbers, or PyTorch's.

    Ours where the tokens of a head are one block, in half precision: the tiles of the library kernels are twice as
    wide. For more tokens PyTorch's, until `python -m bench.attention` has shown another to be faster.
    """
    return T <= FEW_TOKENS and head_dim <= MAX_HEAD_DIM


def _padded(size: int) -> int:
    # a side of a tensor-core product has at least 16
    return max(16, 1 << max(size - 1, 0).bit_length())
