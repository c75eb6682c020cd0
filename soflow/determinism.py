"""Whether PyTorch's own operators give the same bits again: ours always do."""

import os

import torch

# PyTorch asks for one of them at its first product, though its products are the same again without
CUBLAS_VARIABLE, CUBLAS_CONFIGS = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")


def choose_algorithms(*, same_bits: bool) -> None:
    """Have PyTorch use algorithms that give the same bits again, or the fastest ones: process-wide.

    Without, backward of attention and of convolutions adds with atomics on a GPU, in an order of its own. An operator
    that has no other way is refused by PyTorch, with its name. Call it before the first product on a GPU.
    Raises ValueError where the environment has cuBLAS do otherwise.
    """
    config = os.environ.setdefault(CUBLAS_VARIABLE, CUBLAS_CONFIGS[0])
    if same_bits and config not in CUBLAS_CONFIGS:
        raise ValueError(
            f"{CUBLAS_VARIABLE}: got {config!r}, expected {' or '.join(CUBLAS_CONFIGS)}, or engine.deterministic=false"
        )
    if torch.are_deterministic_algorithms_enabled() != same_bits:
        torch.use_deterministic_algorithms(same_bits)
        # else every tensor would be filled first, by a launch of its own; what is empty here is written before it is
        # read. Who had turned determinism on before may want that.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a property
