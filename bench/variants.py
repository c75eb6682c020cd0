"""The ways to train one batch that `bench.step` times and `bench.memory` weighs, each a function without arguments."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from bench import plain
from soflow.assembly import assemble, initial_flow, training_ops
from soflow.config import Config, ObjectiveConfig
from soflow.config_file import parse_config
from soflow.distributed import Processes
from soflow.draw import sample_batch
from soflow.kernels import reference
from soflow.memory import sample_like
from soflow.models import Network
from soflow.objective import Batch
from soflow.step import gap_ratio_at

Loss = Callable[[Network, Batch, ObjectiveConfig], Tensor]

RECIPE = """
name: bench
network: {NETWORK}
data: {source: latents, root: nowhere}
train: {total_steps: 1000, batch_size: BATCH, sample_every: 0}
objective: {cfg_scale: 3.0, cfg_decay_time: 0.8, mix_ratio: 0.25, label_dropout: 0.1}
optim: {betas: [0.9, 0.99]}
"""
SMALL = (
    "name: DiT, input_size: 16, in_channels: 4, num_classes: 10, "
    "patch_size: 2, hidden_size: 384, depth: 4, num_heads: 6"
)
DECAY = 0.9999
# two evaluations in float32 at r = 0.1 against difference propagation; TF32 and bf16 round a thousandfold coarser
TOLERANCE = {"fp32": 1e-4, "tf32": 0.05, "bf16": 0.1}


def recipe(model: str, batch_size: int, *overrides: str) -> Config:
    """Return the official ImageNet recipe at the size `model`: "small", which suits a CPU, or a preset."""
    network = SMALL if model == "small" else f"name: {model}, input_size: 32, in_channels: 4, num_classes: 1000"
    text = RECIPE.replace("NETWORK", network).replace("BATCH", str(batch_size))
    return parse_config(text, "bench", overrides)


class Variant:
    """A way to train: `step()` trains one batch, `loss()` says what it makes of the first one."""

    name: str
    precision: str
    # the engine as its trainer runs it, what is published as PyTorch does
    same_bits = False

    network: Network

    def step(self) -> None:
        """Train one batch."""
        raise AssertionError("a variant defines its step")

    def backward(self) -> None:
        """Make the gradients of one batch, and no update."""
        raise AssertionError("a variant defines its backward")

    def loss(self) -> float:
        """Return the loss of the first batch, before anything was trained."""
        raise AssertionError("a variant defines its loss")


class Engine(Variant):
    """The engine's own step, as its trainer runs it."""

    same_bits = True

    def __init__(self, name: str, config: Config, device: torch.device) -> None:
        self.name, self.config, self.precision = name, config, config.engine.precision
        processes = Processes(0, 1, device)
        self.parts = assemble(config, processes, training_ops(config, device))
        shape = (config.network.in_channels, config.network.input_size, config.network.input_size)
        mean, std, labels = sample_like(config, shape)
        self.samples = mean.to(device), None if std is None else std.to(device), labels.to(device)
        self.network = self.parts.step.flow.network
        perturb(self.network)
        self.steps = 0

    def step(self) -> None:
        """Train one batch."""
        self.parts.step(*self.samples, self.steps)
        self.steps += 1

    def backward(self) -> None:
        """Make the gradients of one batch."""
        step = self.parts.step
        step.optimizer.zero_grad(set_to_none=True)
        for batch in step.draw(*self.samples, *step.clock(self.steps)):
            step.module(batch).loss.backward()

    def loss(self) -> float:
        """Return the loss of the first batch."""
        step = self.parts.step
        (batch,) = step.draw(*self.samples, *step.clock(0))
        with torch.no_grad():
            return step.objective(step.flow, batch).loss.item()


class Plain(Variant):
    """A loss in plain PyTorch, AdamW, average and norm of the gradient, tensor by tensor as published.

    compiled: the network through torch.compile, its products by autocast in bfloat16, and torch's fused AdamW.
    """

    def __init__(self, name: str, loss: Loss, config: Config, device: torch.device, compiled: bool = False) -> None:
        self.name, self.config, self.device = name, config, device
        self.precision = "bf16" if compiled else config.engine.precision
        self.loss_function = loss
        flow = initial_flow(config, reference)
        # fake tensors cannot be sent even to where they are
        self.network = (flow if device.type == "cpu" else flow.to(device)).network
        perturb(self.network)
        self.average = [p.detach().clone() for p in self.network.parameters()]
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            (p for p in self.network.parameters() if p.requires_grad),
            optim.lr,
            optim.betas,
            weight_decay=0.0,
            fused=compiled,
        )
        self.compiled, self.is_compiled = compiled, False
        shape = (config.network.in_channels, config.network.input_size, config.network.input_size)
        mean, std, labels = sample_like(config, shape)
        self.mean, self.labels = mean.to(device), labels.to(device)
        self.std = None if std is None else std.to(device)
        self.num_velocity = int(config.objective.fm_ratio * len(mean))

    def step(self) -> None:
        """Train one batch."""
        self.backward()
        with torch.no_grad():
            total = torch.zeros((), device=self.device)
            for param in self.network.parameters():
                if param.grad is not None:
                    total += param.grad.norm() ** 2
            self.optimizer.step()
            for average, param in zip(self.average, self.network.parameters(), strict=True):
                average.mul_(DECAY).add_(param, alpha=1.0 - DECAY)

    def backward(self) -> None:
        """Make the gradients of one batch."""
        if self.compiled and not self.is_compiled:
            # with its backward, for the batch that is timed: the loss of a small one need not wait for it
            self.network.compile()
            self.is_compiled = True
        self.optimizer.zero_grad(set_to_none=True)
        self._loss(self._draw()).backward()

    def loss(self) -> float:
        """Return the loss of the first batch, with the engine's noise and times."""
        config, positions = self.config, torch.arange(len(self.mean), device=self.device)
        batch = sample_batch(
            self.mean,
            self.std,
            self.labels,
            positions,
            self.num_velocity,
            seed=config.seed,
            step=torch.zeros((), dtype=torch.int64, device=self.device),
            r=torch.tensor(gap_ratio_at(config, 0), device=self.device),
            times=config.times,
            objective=config.objective,
            ops=reference,
        )
        with torch.no_grad():
            return self._loss(batch).item()

    def _loss(self, batch: Batch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16) if self.compiled else nullcontext():
            return self.loss_function(self.network, batch, self.config.objective)

    def _draw(self) -> Batch:
        """Draw as published: from the global generator, on the device."""
        times, num = self.config.times, len(self.mean)
        x_0 = self.mean if self.std is None else self.mean + self.std * torch.randn_like(self.mean)
        z = torch.randn(3, num, device=self.device)
        velocity = torch.arange(num, device=self.device) < self.num_velocity
        t = torch.where(
            velocity,
            torch.sigmoid(z[0] * times.velocity_std + times.velocity_mean),
            torch.sigmoid(z[1] * times.t_std + times.t_mean).clamp(min=1e-4),
        )
        s = torch.minimum(torch.sigmoid(z[2] * times.s_std + times.s_mean), t - 1e-4)
        l = torch.minimum(t + (s - t) * gap_ratio_at(self.config, 0), t - 1e-4)
        null_mask = torch.rand(num, device=self.device) < self.config.objective.label_dropout
        return Batch(x_0, torch.randn_like(x_0), t, l, s, self.labels, null_mask, self.num_velocity)


@torch.no_grad()
def perturb(network: torch.nn.Module) -> None:
    """Move every weight, also those that training starts at zero, so that equal losses say something."""
    generator = torch.Generator().manual_seed(0)
    for param in network.parameters():
        if param.requires_grad:
            param.add_(0.02 * torch.randn(param.shape, generator=generator).to(param.device))


def variants(model: str, batch_size: int, device: torch.device) -> dict[str, Callable[[], Variant]]:
    """Return how to make every variant that this device can run; the first is the engine as it is meant to run."""
    gpu = device.type == "cuda"
    ours = recipe(model, batch_size, f"engine.precision={'bf16' if gpu else 'fp32'}")
    fp32 = recipe(model, batch_size, f"engine.precision={'tf32' if gpu else 'fp32'}")
    mean = dataclasses.replace(fp32, objective=dataclasses.replace(fp32.objective, name="meanflow"))
    made: dict[str, Callable[[], Variant]] = {
        "engine": lambda: Engine("engine", ours, device),
        "six calls": lambda: Plain("six calls", plain.soflow_loss, fp32, device),
        "MeanFlow, one JVP": lambda: Plain("MeanFlow, one JVP", plain.meanflow_loss, mean, device),
        "MeanFlow, engine": lambda: Engine("MeanFlow, engine", mean, device),
    }
    if gpu:
        made["six calls, bf16 compiled"] = lambda: Plain(
            "six calls, bf16 compiled", plain.soflow_loss, fp32, device, compiled=True
        )
    return made


def require_equal_losses(made: dict[str, Variant]) -> None:
    """Raise AssertionError unless variants of the same objective have the same loss on the same batch, to rounding."""
    for first, *others in (
        ("engine", "six calls", "six calls, bf16 compiled"),
        ("MeanFlow, one JVP", "MeanFlow, engine"),
    ):
        if first not in made:
            continue
        expected = made[first].loss()
        for name in others:
            if name in made:
                loss = made[name].loss()
                tolerance = max(TOLERANCE[made[n].precision] for n in (first, name))
                assert abs(loss / expected - 1.0) < tolerance, f"{name}: loss {loss}, {expected} by {first}"
