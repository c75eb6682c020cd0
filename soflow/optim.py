"""Optimizer, gradient norm and the exponential moving average of the weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from soflow.config import EmaConfig, OptimConfig


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


class Ema:
    """ema = decay^every ema + (1 - decay^every) w, updated at steps divisible by `every`.

    The average is kept in float32; the update is computed in float32 or float64. It starts as a copy of the weights.
    The step is the 0-based one, tested before it counts as done, so that step 0 updates.
    """

    def __init__(self, config: EmaConfig, network: nn.Module) -> None:
        self.every = config.every
        self.decay = config.decay**config.every
        self.dtype = getattr(torch, config.dtype)
        self.weights = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the average towards the weights of `network` if `step` is one of its steps."""
        if step % self.every:
            return
        averages, weights = list(self.weights.values()), list(network.state_dict().values())
        if self.dtype == torch.float32:
            torch._foreach_mul_(averages, self.decay)
            torch._foreach_add_(averages, weights, alpha=1.0 - self.decay)
            return
        wide = [average.to(self.dtype) for average in averages]
        torch._foreach_mul_(wide, self.decay)
        torch._foreach_add_(wide, [weight.to(self.dtype) for weight in weights], alpha=1.0 - self.decay)
        torch._foreach_copy_(averages, wide)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """Replace the average by `weights`, which must have the same names and shapes."""
        for name, average in self.weights.items():
            average.copy_(weights[name])
