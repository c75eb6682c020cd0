"""A trained flow computed in another precision, on any machine: what rounding does to it, apart from its speed."""

import copy
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from soflow.flow import SolutionFlow
from soflow.kernels import reference
from soflow.models.pair import PairOps
from soflow.precision import working_copy

Rounding = Literal["fp64", "fp32", "tf32-like", "bf16"]
ROUNDED: tuple[Rounding, ...] = ("fp32", "tf32-like", "bf16")


def rounded(flow: SolutionFlow, rounding: Rounding) -> SolutionFlow:
    """Return a copy of `flow`, on the reference ops, that computes in another precision; its weights are float32.

    "fp64", "fp32": all of it. "tf32-like" is float32, but rounds the inputs of every product with a weight to 10 bits
    of mantissa, as TF32 tensor cores do; products inside attention stay in float32. "bf16": the policy of that name.
    """
    changed = copy.deepcopy(flow).to(torch.float64 if rounding == "fp64" else torch.float32)
    changed.network.ops = PairOps(_tf32_ops() if rounding == "tf32-like" else reference)
    if rounding == "bf16":
        changed.network, _ = working_copy(changed.network, "bf16")
    return changed


def round_to_tf32(x: Tensor) -> Tensor:
    """Return x, fp32, rounded to the 10 bits of mantissa that a TF32 product sees (ties away from zero)."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def _tf32_ops() -> Any:
    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.linear(round_to_tf32(x), round_to_tf32(weight), bias)

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.conv(round_to_tf32(x), round_to_tf32(weight), bias)

    changed = {"linear": linear, "linear_difference": linear, "conv": conv, "conv_difference": conv}
    return SimpleNamespace(**{**vars(reference), **changed})
