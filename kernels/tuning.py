"""Launch parameters by shape: one static table, no tuning at run time, so that a captured graph is always the same.

They follow from what compiles without spills on sm_80, sm_90 and sm_100 (`python -m bench.resources`); none was timed
on a GPU yet.
"""

from typing import NamedTuple

# Programs that keep every multiprocessor of the largest GPU busy in a backward whose grid is (slabs, batch).
FULL_GRID = 256
MAX_SLABS = 8


def norm_warps(D: int) -> int:
    """Return the warps of a program that holds a row of D numbers in registers."""
    if D <= 512:
        return 2
    return 4 if D <= 1024 else 8


def num_slabs(B: int, T: int) -> int:
    """Return into how many slabs the T tokens of a sample are cut: one for large batches, up to 8 for small ones."""
    return max(1, min(MAX_SLABS, FULL_GRID // max(B, 1), T))


class AttentionLaunch(NamedTuple):
    """Queries of a program, which are also the keys per turn; warps; turns whose loads are under way at once."""

    block_t: int
    num_warps: int
    num_stages: int


def attention_launch(head_width: int) -> AttentionLaunch:
    """Return the launch of the attention difference for heads that are padded to `head_width` numbers."""
    return AttentionLaunch(64, 8, 1) if head_width <= 64 else AttentionLaunch(32, 8, 2)
