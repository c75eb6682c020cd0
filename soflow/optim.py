"""Optimizer, gradient norm and the exponential moving average of the weights."""

import copy
from collections.abc import Iterable
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from soflow.config import EmaConfig, OptimConfig

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


def build_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return torch.optim's AdamW or RAdam over `parameters`; frozen ones keep their place in its state, unused."""
    kind = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[config.name]
    return kind(
        list(parameters),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        foreach=True,
    )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the L2 norm over all gradients, a scalar; no host synchronisation."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


class Ema(Generic[AnyNetwork]):
    """ema = decay^every ema + (1 - decay^every) w, updated at steps divisible by `every`.

    `network` holds the average, in float32, and starts as a copy of the weights; the update is computed in float32 or
    float64. The step is the 0-based one, tested before it counts as done, so that step 0 updates.
    """

    def __init__(self, config: EmaConfig, network: AnyNetwork) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self._every = config.every
        self._decay = config.decay**config.every
        self._dtype = getattr(torch, config.dtype)
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        self._averages, self._weights = zip(*((a, w) for a, w in pairs if w.requires_grad), strict=True)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights, if `step` is one of its steps."""
        if step % self._every:
            return
        averages = [average.to(self._dtype) for average in self._averages]  # the averages themselves, if of that dtype
        weights = [weight.to(self._dtype) for weight in self._weights]
        torch._foreach_mul_(averages, self._decay)
        torch._foreach_add_(averages, weights, alpha=1.0 - self._decay)
        if averages[0] is not self._averages[0]:
            torch._foreach_copy_(self._averages, averages)
