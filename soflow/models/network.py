"""What a flow, an objective and a trainer ask of a network."""

import abc
from collections.abc import Callable, Iterable
from typing import Literal

from torch import Tensor, nn

from soflow.models.pair import PairOps

Recompute = Literal["none", "norms", "blocks"]


class Network(nn.Module, abc.ABC):
    """F(x, t, s, labels) and its finite difference.

    x: (B, in_channels, input_size, input_size).  t, s: (B,).  labels: (B,) int64, num_classes being the null label,
    or None for the null label in every row.  augment_labels: (B, A), or None.
    draw_keys: (B, 3) int64, seed, step and position in the global batch of each row, for the masks of dropout.
    """

    input_size: int
    in_channels: int
    num_classes: int
    ops: PairOps  # what it computes with
    dropout: float = 0.0  # share of activations that a call in training mode drops
    # what backward computes again instead of keeping it: nothing, norms and the activations after them, or blocks
    recompute: Recompute = "none"

    @abc.abstractmethod
    def bf16_modules(self) -> Iterable[nn.Module]:
        """Return the modules whose weights the precision bf16 keeps in bfloat16: those of nearly all products."""

    def augmentation_parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters that augmentation labels alone reach: without these nothing trains them."""
        return ()

    @abc.abstractmethod
    def forward(
        self,
        x: Tensor,
        t: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        draw_keys: Tensor | None = None,
    ) -> Tensor:
        """Return F(x, t, s, labels), of the shape of x."""

    @abc.abstractmethod
    def forward_flops(self) -> int:
        """Return the operations of `forward` on one row: products and convolutions, a product-sum being two."""

    @abc.abstractmethod
    def forward_difference(
        self,
        x: Tensor,
        dx: Tensor,
        t: Tensor,
        dt: Tensor,
        s: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        draw_keys: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return F_t = F(x, t, s) of all rows, and dF = F(x + dx, t + dt, s) - F(x, t, s) of the last len(dx) rows.

        dx: (M, ...), dt: (M,), M <= B.  F_t carries the gradient; dF, (M, ...), carries none, and its rounding error is
        relative to its own size.
        """


# called as builder(input_size=..., in_channels=..., num_classes=..., ops=...): the class of a network, for example
NetworkBuilder = Callable[..., Network]
