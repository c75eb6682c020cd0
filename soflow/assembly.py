"""The parts of a training, from its configuration: what runs, predictions and benchmarks have alike."""

from types import ModuleType
from typing import Literal, NamedTuple

import torch

from soflow import kernels
from soflow.config import Config
from soflow.distributed import Processes
from soflow.ema import Ema, configured_averages
from soflow.flow import SolutionFlow, build_flow
from soflow.kernels import reference
from soflow.models import Network, NetworkBuilder
from soflow.optim import Optimizer, build_optimizer
from soflow.precision import working_copy
from soflow.sharding import shard_network
from soflow.step import TrainingStep

COMPILER = "inductor"


class Training(NamedTuple):
    """flow: of the float32 weights.  averages: of them, that of sampling first.  optimizer: moves all of these.
    step: trains them by one batch.
    """

    flow: SolutionFlow
    averages: list[Ema[Network]]
    optimizer: Optimizer
    step: TrainingStep


def assemble(config: Config, processes: Processes, ops: ModuleType, network: NetworkBuilder | None = None) -> Training:
    """Return the untrained parts of a configuration on this process's device; the same weights for the same seed.

    network: builds the one that the configuration calls own.
    """
    flow = initial_flow(config, ops, network)
    if config.data.augment_p == 0:
        # DDP waits for the gradient of every parameter that requires one
        for parameter in flow.network.augmentation_parameters():
            parameter.requires_grad_(False)
    averages = configured_averages(config.ema, flow.network)
    precision = config.engine.precision
    sharded = config.engine.parallel == "fsdp" and processes.world_size > 1
    if sharded:
        # before they go to the device, which may be too small for all of them
        shard_network(flow.network, processes, precision)
        for average in averages:
            shard_network(average.network, processes, "fp32")
    # built where the seed draws the same everywhere; a module of fake tensors cannot be sent even to where it is
    if processes.device.type != "cpu":
        flow.to(processes.device)
        for average in averages:
            average.network.to(processes.device)
    for average in averages:
        average.track(flow.network)
    working, shadows = (flow.network, {}) if sharded else working_copy(flow.network, precision)
    working.recompute = config.engine.recompute
    if config.engine.compile:
        compile_calls(working)
    optimizer = build_optimizer(config.optim, flow.network.parameters(), averages, shadows)
    computing = SolutionFlow(working, flow.path, flow.parameterization, flow.sampler)
    return Training(flow, averages, optimizer, TrainingStep(config, processes, computing, optimizer, ops))


def choose_ops(ops: Literal["auto", "fused", "reference"], device: torch.device) -> ModuleType:
    """Return the ops called so; auto is fused on a GPU, and on the CPU the reference, which fused would only wrap."""
    if ops == "auto":
        ops = "fused" if device.type == "cuda" else "reference"
    return kernels if ops == "fused" else reference


def training_ops(config: Config, device: torch.device) -> ModuleType:
    """Return the ops a run trains with: as `choose_ops`, except that meanflow needs those that have a derivative."""
    return reference if config.objective.name == "meanflow" else choose_ops(config.engine.ops, device)


def compile_calls(network: Network) -> None:
    """Send both calls of `network`, with and without a difference, through torch.compile."""
    network.compile(backend=COMPILER)
    network.forward_difference = torch.compile(network.forward_difference, backend=COMPILER)  # type: ignore[method-assign]


def initial_flow(config: Config, ops: ModuleType, network: NetworkBuilder | None = None) -> SolutionFlow:
    """Return the untrained flow of a configuration, the same for the same seed, whatever was drawn before."""
    # no device's generator: to save its state would take memory of every GPU of the machine
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return build_flow(config.network, config.flow, ops, network)
