"""The update by torch._foreach, on any device and dtype: what the other backends are measured against."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from soflow.kernels.multi_tensor import COUNTERS, FINISHED, SKIPPED
from soflow.optim.backend import Owner
from soflow.sharding import local, norm_over_shards

NORM_BLOCK = 1024


class Reference:
    """torch._foreach on any device and dtype; of sharded weights, on this process's part."""

    def __init__(self, optimizer: Owner) -> None:
        self._optimizer = optimizer
        self._counters = [0] * len(COUNTERS)
        self.grad_norm = torch.zeros(())

    def prepare(self) -> None:
        """Nothing: every step reads the param groups."""

    def count(self, counter: int) -> int:
        return self._counters[counter]

    def set_finished(self, steps: int) -> None:
        self._counters[FINISHED] = steps

    def step(self) -> None:
        optimizer = self._optimizer
        # of the weights' type first: scaling must not round a bf16 gradient again
        groups = [(group, [(p, g.to(p.dtype)) for p, g in optimizer.active(group)]) for group in optimizer.param_groups]
        whole_gradients = [gradient for _, pairs in groups for _, gradient in pairs]
        self.grad_norm = _norm(whole_gradients)
        gradients = [local(gradient) for gradient in whole_gradients]
        step = self._counters[FINISHED]
        self._counters[FINISHED] += 1
        if optimizer.skip_nonfinite and not torch.isfinite(self.grad_norm):
            self._counters[SKIPPED] += 1
            return
        if optimizer.clip_norm is not None and gradients:
            scale = (optimizer.clip_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, scale.to(gradients[0].device))
        self._move([(group, pairs) for group, pairs in groups if pairs])
        for average in optimizer.averages:
            average.update(step)
        moved = {id(param) for _, pairs in groups for param, _ in pairs}
        for param, shadow in optimizer.shadows.items():
            if id(param) in moved:
                shadow.detach().copy_(param)

    def _move(self, groups: list[tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]]) -> None:
        update = {"adamw": _adamw, "radam": _radam}[self._optimizer.name]
        for group, pairs in groups:
            states = [self._optimizer.state[param] for param, _ in pairs]
            for state in states:
                state["step"] += 1
            beta1, beta2 = group["betas"]
            update(
                [local(param) for param, _ in pairs],
                [local(gradient) for _, gradient in pairs],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [state["step"].item() for state in states],
                float(group["lr"]),
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
            )


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients, all shards of them, a scalar summed in float64; no host synchronisation.

    In the gradients' own type within blocks too short to lose anything: casting them all to float64 takes ten times as
    long. A block whose squares leave the range of its type, elements of 1e18 in float32, has an infinite norm.
    """
    if not gradients:
        return torch.zeros(())
    blocks = torch.cat([_block_norms(local(gradient)).to(gradients[0].device) for gradient in gradients])
    total = norm_over_shards(torch.linalg.vector_norm(blocks, dtype=torch.float64), gradients[0])
    return total.to(torch.promote_types(gradients[0].dtype, torch.float32))


def _block_norms(values: Tensor) -> Tensor:
    flat = values.flatten()
    whole = len(flat) - len(flat) % NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK), dim=1)
    return torch.cat((blocks, torch.linalg.vector_norm(flat[whole:]).view(1)))


def _moments(
    gradients: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], beta1: float, beta2: float
) -> None:
    torch._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)


def _adamw(
    params: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    if weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    _moments(gradients, exp_avgs, exp_avg_sqs, beta1, beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, [-lr / (1 - beta1**step) for step in steps])


def _radam(
    params: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    if weight_decay != 0:
        gradients = list(torch._foreach_add(gradients, params, alpha=weight_decay))
    _moments(gradients, exp_avgs, exp_avg_sqs, beta1, beta2)
    rho_inf = 2 / (1 - beta2) - 1
    adaptive, plain = [], []
    for step in steps:
        bias1, bias2 = 1 - beta1**step, 1 - beta2**step
        rho = rho_inf - 2 * step * beta2**step / bias2
        if rho > 5:
            rect = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
            adaptive.append(-(bias2**0.5) * (lr * rect / bias1))
            plain.append(0.0)
        else:
            adaptive.append(0.0)
            plain.append(-lr / bias1)
    # the factor of exp_avg: adaptive / (sqrt(exp_avg_sq) + eps) + plain; adaptive 0 divides to infinity and back to 0
    factors = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(factors, eps)
    torch._foreach_div_(factors, adaptive)
    torch._foreach_reciprocal_(factors)
    torch._foreach_add_(factors, plain)
    torch._foreach_addcmul_(params, exp_avgs, factors)
