"""Registration of the fused ops with PyTorch, so that autograd, torch.compile and CUDA graphs see them.

Every op is defined once, with its launcher for CUDA, its reference for the CPU and its shapes for tracing.
"""

from collections.abc import Callable
from typing import Any

import torch

library = torch.library.Library("soflow", "DEF")


def register(
    schema: str, launch: Callable[..., Any], cpu: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define soflow::`schema` and return the op: `launch` runs on CUDA, `cpu` elsewhere, `fake` makes shapes."""
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, launch, "CUDA")
    library.impl(name, cpu, "CPU")
    torch.library.register_fake(f"soflow::{name}", fake, lib=library)
    op: Callable[..., Any] = getattr(torch.ops.soflow, name).default
    return op
