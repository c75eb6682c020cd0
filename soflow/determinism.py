"""Whether PyTorch's own operators give the same bits again: ours always do."""

import os

import torch


def choose_algorithms(*, same_bits: bool) -> None:
    """Have PyTorch use algorithms that give the same bits again, or the fastest ones: process-wide.

    Without, backward of attention and of convolutions adds with atomics on a GPU, in an order of its own. An operator
    that has no other way is refused by PyTorch, with its name. Call it before the first product on a GPU.
    """
    # PyTorch asks for it at its first product, though its products are deterministic without
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(same_bits)
    # else every tensor would be filled first, by a launch of its own; what is empty here is written before it is read
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
