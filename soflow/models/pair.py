"""Activations that carry their finite difference: a network is written once and runs with or without a look-ahead.

Source: difference propagation, see docs/difference_propagation.md.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Pair(NamedTuple):
    """An activation x of all rows, and the difference d of its last len(d) rows (None: nothing rides along).

    x carries the gradient; d carries none. Row i of d is g(x + dx) - g(x) for whatever g led here.
    """

    x: Tensor
    d: Tensor | None = None

    @property
    def base(self) -> Tensor:
        """The rows of x that d belongs to."""
        assert self.d is not None
        return self.x[len(self.x) - len(self.d) :]

    def chunk(self, num: int) -> list[Pair]:
        """Return both split into `num` parts along the last dimension."""
        parts = self.x.chunk(num, dim=-1)
        differences = [None] * num if self.d is None else self.d.chunk(num, dim=-1)
        return [Pair(x, d) for x, d in zip(parts, differences, strict=True)]

    def plus(self, constant: Tensor) -> Pair:
        """Return the pair moved by a constant, which has no difference."""
        return Pair(self.x + constant, self.d)

    def times(self, factor: Tensor) -> Pair:
        """Return the pair times a factor of all rows, which has no difference: a dropout mask, for example."""
        return Pair(self.x * factor, None if self.d is None else self.d * Pair(factor, self.d).base)

    def map(self, linear_map: Callable[[Tensor], Tensor]) -> Pair:
        """Return both sent through a linear map without parameters: a change of layout, for example."""
        return Pair(linear_map(self.x), None if self.d is None else linear_map(self.d))

    def join(self, other: Pair) -> Pair:
        """Return both concatenated with those of `other` along dimension 1."""
        d = None if self.d is None or other.d is None else torch.cat((self.d, other.d), dim=1)
        return Pair(torch.cat((self.x, other.x), dim=1), d)

    def __add__(self, other: Pair) -> Pair:  # type: ignore[override]
        return Pair(self.x + other.x, None if self.d is None or other.d is None else self.d + other.d)


class PairOps:
    """The ops of `soflow.kernels`, lifted to pairs: y = op(x) with gradient, and its difference without."""

    def __init__(self, ops: ModuleType) -> None:
        self.ops = ops

    def __deepcopy__(self, memo: dict[int, object]) -> PairOps:
        return self  # a namespace is shared, and modules cannot be copied

    def linear(self, x: Pair, layer: nn.Linear) -> Pair:
        """Return x W^T + bias."""
        return self.product(x, layer.weight, layer.bias)

    def product(self, x: Pair, weight: Tensor, bias: Tensor | None = None) -> Pair:
        """Return x weight^T + bias."""
        y = self.ops.linear(x.x, weight, bias)
        if x.d is None:
            return Pair(y)
        with torch.no_grad():
            return Pair(y, self.ops.linear_difference(x.d, weight))

    def time_features(self, t: Pair, num_features: int, max_period: float = 10000.0) -> Pair:
        """Return the sine and cosine features of a time."""
        y = self.ops.time_features(t.x, num_features, max_period)
        if t.d is None:
            return Pair(y)
        with torch.no_grad():
            return Pair(y, self.ops.time_features_difference(t.base, t.d, num_features, max_period))

    def silu(self, x: Pair) -> Pair:
        """Return SiLU(x)."""
        y = self.ops.silu(x.x)
        if x.d is None:
            return Pair(y)
        with torch.no_grad():
            return Pair(y, self.ops.silu_difference(x.base, x.d))

    def gelu(self, x: Pair, bias: Tensor) -> Pair:
        """Return GELU(x + bias)."""
        y = self.ops.gelu(x.x, bias)
        if x.d is None:
            return Pair(y)
        with torch.no_grad():
            return Pair(y, self.ops.gelu_difference(x.base, x.d, bias))

    def attention(self, qkv: Pair, num_heads: int) -> Pair:
        """Return multi-head attention of packed qkv."""
        y = self.ops.attention(qkv.x, num_heads)
        if qkv.d is None:
            return Pair(y)
        with torch.no_grad():
            return Pair(y, self.ops.attention_difference(qkv.base, qkv.d, num_heads))

    def modulated_norm(self, x: Pair, shift: Pair, scale: Pair, dtype: torch.dtype) -> Pair:
        """Return LayerNorm(x) (1 + scale) + shift, stored as `dtype`."""
        y = self.ops.modulated_norm(x.x, shift.x, scale.x, dtype=dtype)
        if x.d is None:
            return Pair(y)
        with torch.no_grad():
            return Pair(y, self.ops.modulated_norm_difference(x.base, x.d, scale.base, shift.d, scale.d, dtype=dtype))

    def gate_residual_norm(
        self, x: Pair, y: Pair, gate: Pair, shift: Pair, scale: Pair, dtype: torch.dtype
    ) -> tuple[Pair, Pair]:
        """Return z = x + gate y and LayerNorm(z) (1 + scale) + shift, the latter stored as `dtype`."""
        z, h = self.ops.gate_residual_norm(x.x, y.x, gate.x, shift.x, scale.x, dtype=dtype)
        if x.d is None:
            return Pair(z), Pair(h)
        with torch.no_grad():
            dz, dh = self.ops.gate_residual_norm_difference(
                y.base, gate.base, Pair(z, x.d).base, scale.base, x.d, y.d, gate.d, shift.d, scale.d, dtype=dtype
            )
        return Pair(z, dz), Pair(h, dh)

    def conv(self, x: Pair, weight: Tensor, bias: Tensor) -> Pair:
        """Return the zero-padded convolution of x with weight, plus bias."""
        y = self.ops.conv(x.x, weight, bias)
        if x.d is None:
            return Pair(y)
        with torch.no_grad():
            return Pair(y, self.ops.conv_difference(x.d, weight))

    def downsample(self, x: Pair, taps: Tensor) -> Pair:
        """Return x filtered by `taps` at half the resolution."""
        return x.map(lambda y: self.ops.downsample(y, taps))

    def upsample(self, x: Pair, taps: Tensor) -> Pair:
        """Return x spread by `taps` to twice the resolution."""
        return x.map(lambda y: self.ops.upsample(y, taps))

    def group_norm(self, x: Pair, weight: Tensor, bias: Tensor, num_groups: int) -> Pair:
        """Return GroupNorm(x) weight + bias."""
        y = self.ops.group_norm(x.x, weight, bias, num_groups)
        if x.d is None:
            return Pair(y)
        with torch.no_grad():
            return Pair(y, self.ops.group_norm_difference(x.base, x.d, weight, num_groups))
