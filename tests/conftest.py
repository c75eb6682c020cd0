"""Every test computes deterministically on one thread; those that need a GPU are skipped where there is none."""

import os
from pathlib import Path

import pytest
import torch

GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_configure() -> None:
    # cuBLAS reads it when CUDA starts, and refuses to be deterministic without it
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Triton decides at its import whether it interprets, which nothing has imported yet.
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(GPU_TESTS):
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _deterministic():
    torch.use_deterministic_algorithms(True)
    # with NaN: an element that nothing wrote shows
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
