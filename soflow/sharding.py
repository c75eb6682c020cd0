"""Networks whose weights the processes share out among them (FSDP2), and tensors that may be shards of such."""

import warnings
from typing import TYPE_CHECKING, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soflow.distributed import Processes
from soflow.models.network import Network
from soflow.precision import Precision

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def shard_network(network: Network, processes: Processes, precision: Precision) -> None:
    """Keep only this process's part of each weight: a block is gathered while it computes, the rest for a whole pass.

    The network stays the same object with the same names; its weights become DTensors, and move to the device. bf16:
    the weights of `bf16_modules` are gathered in bfloat16, and their gradients summed in float32.
    """
    # imported here, because they take a second or more, which only this needs
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # true, and nothing here writes into what a module returned
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    # inputs stay as they are: a block takes the residual stream in float32 and rounds inside its branches
    rounded = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    policy = rounded if precision == "bf16" else MixedPrecisionPolicy()
    for block in network.bf16_modules():
        # called by the network itself, before any block
        for modulation in (part for name, part in block.named_children() if name == "adaLN_modulation"):
            fully_shard(modulation, mesh=mesh, mp_policy=policy)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    # the root too, which would stay gathered: the averages, which no backward follows, would draw with old weights
    fully_shard(network, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(network, "forward_difference")


def is_shard(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Return whether `tensor` is spread over processes."""
    # only a DTensor has one; its class is not imported where there is none
    return hasattr(tensor, "device_mesh")


def is_sharded(network: nn.Module) -> bool:
    """Return whether a weight of `network` is spread over processes."""
    return any(is_shard(weight) for weight in network.parameters())


def norm_over_shards(norm: Tensor, shard: Tensor) -> Tensor:
    """Return the norm over all processes of tensors that are spread as `shard` is; `norm` is that of the parts here."""
    if not is_shard(shard):
        return norm
    square = norm.square()
    dist.all_reduce(square, group=shard.device_mesh.get_group())
    return square.sqrt()


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of `tensor`, in the same memory; `tensor` itself where it is whole."""
    return tensor.to_local() if is_shard(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return `tensor` gathered from all processes, which must all call it; `tensor` itself where it is whole."""
    return tensor.full_tensor() if is_shard(tensor) else tensor


def like(target: Tensor, source: Tensor) -> Tensor:
    """Return a copy of the whole tensor `source` on the device of `target`, and shared out as that is."""
    if is_shard(target):
        from torch.distributed.tensor import distribute_tensor

        # every process has all of it: nothing is sent
        return distribute_tensor(
            source.to(target.device, copy=True), target.device_mesh, target.placements, src_data_rank=None
        )
    return source.to(target.device, copy=True)
