"""Registration of the fused ops with PyTorch, so that autograd, torch.compile and CUDA graphs see them.

Every op is defined once, with its launcher for CUDA, its reference for the CPU and its shapes for tracing.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

library = torch.library.Library("soflow", "DEF")


def register(
    schema: str, launch: Callable[..., Any], cpu: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Define soflow::`schema` and return the op: `launch` runs on CUDA, `cpu` elsewhere, `fake` makes shapes."""
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, on_its_device(launch), "CUDA")
    library.impl(name, _with_dense_results(cpu), "CPU")
    torch.library.register_fake(f"soflow::{name}", fake, lib=library)
    op: Callable[..., Any] = getattr(torch.ops.soflow, name).default
    return op


def _with_dense_results(cpu: Callable[..., Any]) -> Callable[..., Any]:
    """Return `cpu` with dense results, as launchers and shapes for tracing have them, whatever its arguments are."""

    def run(*arguments: Any) -> Any:
        out = cpu(*arguments)
        return tuple(x.contiguous() for x in out) if isinstance(out, tuple) else out.contiguous()

    return run


def on_its_device(launch: Callable[..., Any]) -> Callable[..., Any]:
    """Return `launch` with the device of its first tensor made current: Triton launches on that one alone."""

    def launch_there(*arguments: Any) -> Any:
        device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
        if device.index == torch.cuda.current_device():
            return launch(*arguments)
        with torch.cuda.device(device):
            return launch(*arguments)

    return launch_there


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64,)
# programs along the second or third axis of a CUDA grid
MAX_GRID = 65535


def check(
    op: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    /,
    **arguments: tuple[Tensor, tuple[int, ...]],
) -> None:
    """Raise ValueError unless every argument, given as name=(tensor, shape), has that shape, `device` and a dtype.

    On the CPU, where the reference computes, float64 passes where float32 does. Any strides will do: launchers make
    rows dense.
    """
    is_exact = device.type == "cpu" and torch.float32 in dtypes
    for name, (tensor, shape) in arguments.items():
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name}: got shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.dtype not in dtypes and not (is_exact and tensor.dtype == torch.float64):
            raise ValueError(f"{op}: {name}: got {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
        if tensor.device != device:
            raise ValueError(f"{op}: {name}: got a tensor on {tensor.device}, expected {device}")


def check_dimensions(op: str, name: str, tensor: Tensor, num: int, expected: str) -> None:
    """Raise ValueError unless `tensor` has at least one and, for num > 0, exactly `num` dimensions."""
    if tensor.dim() == 0 or (num and tensor.dim() != num):
        raise ValueError(f"{op}: {name}: got shape {tuple(tensor.shape)}, expected {expected}")


def check_width(op: str, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless the last dimension of `tensor`, which has one, holds at least one number."""
    if not tensor.shape[-1]:
        raise ValueError(f"{op}: {name}: got shape {tuple(tensor.shape)}, expected at least one number per row")


def check_grid(op: str, name: str, num: int) -> None:
    """Raise ValueError unless `num` programs fit the second or third axis of a CUDA grid.  name: what there are of."""
    if num > MAX_GRID:
        raise ValueError(f"{op}: {name}: got {num}, expected at most {MAX_GRID}, the limit of a CUDA grid")
