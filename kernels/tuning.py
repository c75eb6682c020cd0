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
# The widest head of which the tiles of attention fit the registers of four warps: 64 + 16.
NARROW = 80


def norm_warps(D: int) -> int:
    """Return the warps of a program that holds a row of D numbers in registers."""
    if D <= 512:
        return 2
    return 4 if D <= 1024 else 8


def num_slabs(B: int, T: int) -> int:
    """Return into how many slabs the T tokens of a sample are cut: one for large batches, up to 8 for small ones."""
    return max(1, min(MAX_SLABS, FULL_GRID // max(B, 1), T))


class AttentionLaunch(NamedTuple):
    """Tokens that a program owns, and of those it walks how many per turn; the widths of a head's parts; warps."""

    block_t: int
    turn_t: int
    block_d: int
    rest_d: int
    num_warps: int

    def options(self) -> dict[str, int]:
        """Return what a kernel of attention is launched with."""
        return {
            "BLOCK_T": self.block_t,
            "TURN_T": self.turn_t,
            "BLOCK_D": self.block_d,
            "REST_D": self.rest_d,
            "num_warps": self.num_warps,
            "num_stages": ATTENTION_STAGES,
        }


def attention_launch(T: int, head_dim: int, dtype: torch.dtype) -> AttentionLaunch:
    """Return the launch of attention: up to FEW_TOKENS tokens of half precision are one block.

    Four warps, of which every one owns rows of the scores: eight would share them and compute many twice. float32 has
    no tensor cores (TF32 would round as coarsely as half precision), and its unrolled products fill the registers of
    eight warps.
    """
    if dtype == torch.float32:
        tokens, num_warps = min(_padded(T), 32 if head_dim <= NARROW else 16), 8
    else:
        tokens, num_warps = min(_padded(T), FEW_TOKENS), 4
    return AttentionLaunch(tokens, tokens, *head_widths(head_dim), num_warps)


def attention_bwd_launch(T: int, head_dim: int, dtype: torch.dtype) -> AttentionLaunch:
    """Return the launch of attention backward, but for dq of many tokens: wide heads take eight warps."""
    launch = attention_launch(T, head_dim, dtype)
    if dtype == torch.float32:
        launch = launch._replace(block_t=16, turn_t=16, num_warps=4)
    return launch._replace(num_warps=8) if head_dim > NARROW and launch.block_t < T else launch


def attention_bwd_queries_launch(T: int, head_dim: int, dtype: torch.dtype) -> AttentionLaunch:
    """Return the launch of the dq of many tokens: of heads in two parts fewer keys per turn fit four warps."""
    launch = attention_bwd_launch(T, head_dim, dtype)
    in_parts = launch.rest_d > 0 and dtype != torch.float32
    return launch._replace(turn_t=32) if in_parts and launch.num_warps == 4 else launch


def attention_difference_launch(T: int, head_dim: int, dtype: torch.dtype) -> AttentionLaunch:
    """Return the launch of the difference of attention: up to FEW_TOKENS tokens of 64 numbers are one block.

    For more, few keys per turn: scores, their differences, both softmaxes and what they give are in registers at once.
    Wide heads need the registers of eight warps, and rows for each; float32 smaller blocks, as in `attention_launch`.
    """
    launch = attention_launch(T, head_dim, dtype)
    if dtype == torch.float32:
        launch = launch._replace(block_t=min(_padded(T), 32))
        return launch if head_dim <= 64 else launch._replace(turn_t=16, num_warps=4)
    if head_dim > NARROW:
        return launch._replace(block_t=min(_padded(T), 128), turn_t=min(_padded(T), 32), num_warps=8)
    return launch if T <= FEW_TOKENS and head_dim <= 64 else launch._replace(turn_t=min(_padded(T), 32))


def head_widths(head_dim: int) -> tuple[int, int]:
    """Return the widths, powers of two, of the parts that hold a head of so many numbers; 0 where one does."""
    whole = _padded(head_dim)
    first = max(16, whole // 2)
    rest = _padded(head_dim - first)
    return (first, rest) if first + rest < whole else (whole, 0)


def attention_is_fused(T: int, head_dim: int) -> bool:
    """Return whether attention itself is ours, for T tokens in heads of so many numbers, or PyTorch's.

    Ours where the tokens of a head are one block, in half precision: the tiles of the library kernels are twice as
    wide. For more tokens PyTorch's, until `python -m bench.attention` has shown another to be faster.
    """
    return T <= FEW_TOKENS and head_dim <= MAX_HEAD_DIM


def _padded(size: int) -> int:
    # a side of a tensor-core product has at least 16
    return max(16, 1 << max(size - 1, 0).bit_length())
