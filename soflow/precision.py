"""Precision as a policy of weights: which of them a step computes with in float32, and which in bfloat16.

Every op takes its precision from what it is given: a product from its weight, an activation inside a branch from the
weights of that branch. So the policy bf16 is a copy of the network whose blocks hold bfloat16 weights, rewritten by the
optimizer after each step. What stays in float32, and why, is told in docs/precision.md.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from soflow.models.network import Network

Precision = Literal["fp32", "tf32", "bf16"]


def working_copy(network: Network, precision: Precision) -> tuple[Network, dict[Tensor, Tensor]]:
    """Return the network that a step computes with, and its bfloat16 weights by the float32 weights they shadow.

    fp32, tf32: the network itself, and no shadows. bf16: a network with bfloat16 weights in its `bf16_modules`, which
    carry the gradients, and the very parameters of `network` elsewhere. Whoever moves a weight rewrites its shadow.
    """
    if precision != "bf16":
        return network, {}
    masters = {id(p): p for module in network.bf16_modules() for p in module.parameters()}
    # shared where the memo has an entry, a new parameter where the policy makes one
    memo: dict[int, object] = {id(p): p for p in network.parameters()}
    shadows: dict[Tensor, Tensor] = {}
    for address, master in masters.items():
        shadow = nn.Parameter(master.detach().to(torch.bfloat16), requires_grad=master.requires_grad)
        memo[address] = shadow
        shadows[master] = shadow
    return copy.deepcopy(network, memo), shadows
