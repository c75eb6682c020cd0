"""One training step: draw, guide, look ahead, joint call, loss, backward, update; its statistics stay on the device."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from soflow.capture import NUM_WARMUP, CapturedCall, on_side_stream
from soflow.config import Config
from soflow.distributed import Processes
from soflow.draw import sample_batch, share_batch
from soflow.flow import SolutionFlow
from soflow.flow_matching import FlowMatching
from soflow.meanflow import MeanFlow
from soflow.monitor import WATCHED
from soflow.objective import Batch, GuidedObjective, Objective, ObjectiveOutput
from soflow.optim import Optimizer
from soflow.optim.schedule import learning_rate
from soflow.sharding import is_sharded
from soflow.times import gap_ratio

# What is summed over an interval, in the order of the device tensor that holds the sums.
SUMMED = (
    "loss/total",
    "loss/velocity",
    "loss/velocity_mse",
    "loss/velocity_weight",
    "loss/consistency",
    "loss/consistency_mse",
    "loss/consistency_weight",
    *WATCHED,
    "grad_norm",
    "skipped_steps",
)
# of ObjectiveConfig, and of every objective alike
SHARED_FIELDS = ("cfg_scale", "cfg_decay_time", "mix_ratio", "loss_p", "loss_eps")
# DDP times its first ten steps, and every so many after them, by events that a capture must not wait for
DDP_WARMUP, NEVER = 11, 2**31 - 1


class TrainingStep:
    """Trains `flow` by one global batch a call, of which this process has the rows at `positions`.

    The batch goes through the network in `train.accumulation` parts of which each has its share of both kinds of rows.
    flow: computes; its weights, or those that shadow them, are the ones that `optimizer` moves.
    sums: of the statistics `SUMMED` over the steps since they were last zeroed, weighted so that the sum over all
    processes is that of the global batch, (12,) float64 on the device; `num_summed` counts those steps.
    """

    def __init__(
        self, config: Config, processes: Processes, flow: SolutionFlow, optimizer: Optimizer, ops: ModuleType
    ) -> None:
        self.config = config
        self.flow = flow
        self.optimizer = optimizer
        self.ops = ops
        self.device = processes.device
        num_parts, world_size = config.train.accumulation, processes.world_size
        # as if each part were a process of its own: together they have the rows of this process
        self.parts = [
            _Part(config, processes.rank * num_parts + part, world_size * num_parts, self.device)
            for part in range(num_parts)
        ]
        self.positions = tuple(position for part in self.parts for position in part.share.positions)
        self.objective = build_objective(config, ops)
        self.objective.weights_are_shared_out = is_sharded(flow.network)
        self.module: nn.Module = _Losses(flow, self.objective)
        is_captured = choose_capture(config.engine.cuda_graph, self.device, world_size, optimizer)
        if world_size > 1 and not is_sharded(flow.network):
            # gradients arrive on the stream that DDP is made on: it has to be one that is captured
            with on_side_stream() if is_captured else nullcontext():
                self.module = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
            self.module._set_ddp_runtime_logging_sample_rate(NEVER)
        self._has_first_buckets = isinstance(self.module, DistributedDataParallel)
        # DDP and FSDP average over processes, whose shares may differ by a row: weigh each by its rows.
        self.loss_scales = [len(part.share) / config.train.batch_size * world_size for part in self.parts]
        self.sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=self.device)
        self.num_summed = 0
        self._bad_in_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self._most_bad = torch.zeros((), dtype=torch.int64, device=self.device)
        self._most_bad_copy = torch.zeros((), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self._most_bad_seen = 0
        self._copied: torch.cuda.Event | None = None
        self._norm_weight = 1.0 / world_size
        # made here: a number that a step assigns to an element of a tensor on a GPU is copied there, and waited for
        skipped_row = [0.0] * (len(SUMMED) - 1) + [self._norm_weight]
        self._skipped_row = torch.tensor(skipped_row, dtype=torch.float64, device=self.device)
        self._train: Callable[..., None] = self._train_on
        if is_captured:
            self._train = CapturedCall(self._train_on, optimizer.prepare, NUM_WARMUP if world_size == 1 else DDP_WARMUP)

    def __call__(
        self, mean: Tensor, std: Tensor | None, labels: Tensor, step: int, augment_labels: Tensor | None = None
    ) -> None:
        """Make the 0-based `step` on this process's samples, those at `positions`, as a feeder gives them."""
        rate = learning_rate_at(self.config, step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = (None if tensor is None else tensor.to(self.device) for tensor in (mean, std, labels, augment_labels))
        self._train(*rows, *self.clock(step))
        self.num_summed += 1

    def release(self) -> None:
        """Let go of the captured step: NCCL waits for it when the processes part. The next step is captured again."""
        if isinstance(self._train, CapturedCall):
            self._train.release()

    def clock(self, step: int) -> tuple[Tensor, Tensor]:
        """Return what changes from step to step, on the device: its number, int64, and the gap ratio r, fp32."""
        r = gap_ratio_at(self.config, step)
        return torch.full((), step, device=self.device), torch.full((), r, dtype=torch.float32, device=self.device)

    def _train_on(
        self,
        mean: Tensor,
        std: Tensor | None,
        labels: Tensor,
        augment_labels: Tensor | None,
        step: Tensor,
        r: Tensor,
    ) -> None:
        if self._has_first_buckets:
            # DDP lays its buckets out anew after its first backward, and the place of a gradient decides the order in
            # which three processes or more sum it: a run that is continued would not begin as it went on
            self._has_first_buckets = False
            *_, batch = self.draw(mean, std, labels, step, r, augment_labels)
            self.module(batch).loss.backward()
        self.optimizer.zero_grad(set_to_none=True)
        means = torch.zeros(len(SUMMED) - 2, dtype=torch.float64, device=self.device)
        for index, batch in enumerate(self.draw(mean, std, labels, step, r, augment_labels)):
            # the last part alone sends gradients to the other processes
            together = index == len(self.parts) - 1 or not isinstance(self.module, DistributedDataParallel)
            with nullcontext() if together else self.module.no_sync():  # type: ignore[operator]
                out: ObjectiveOutput = self.module(batch)
                (out.loss * self.loss_scales[index]).backward()
            means += _statistics(out) * self.parts[index].weights
        self.optimizer.step()
        self._accumulate(means)

    def most_bad_in_row(self, *, wait: bool = False) -> int:
        """Return the most steps in a row so far without a finite gradient; on a GPU as it was some steps ago.

        To be called after every step, when it waits for nothing; wait: for the last one.
        """
        if wait or self.device.type == "cpu":
            return int(self._most_bad)
        if self._copied is None or self._copied.query():
            self._most_bad_seen = int(self._most_bad_copy)
            self._most_bad_copy.copy_(self._most_bad, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self._most_bad_seen

    def draw(
        self,
        mean: Tensor,
        std: Tensor | None,
        labels: Tensor,
        step: Tensor,
        r: Tensor,
        augment_labels: Tensor | None = None,
    ) -> Iterator[Batch]:
        """Yield the parts of the batch of the step whose `clock` is given, with its noise and times."""
        config, first = self.config, 0
        for part in self.parts:
            rows = slice(first, first + len(part.share))
            first = rows.stop
            yield sample_batch(
                mean[rows],
                None if std is None else std[rows],
                labels[rows] if config.network.num_classes else None,
                part.positions,
                part.share.num_velocity,
                seed=config.seed,
                step=step,
                r=r,
                times=config.times,
                objective=config.objective,
                ops=self.ops,
                augment_labels=None if augment_labels is None else augment_labels[rows],
            )

    def flops(self) -> int:
        """Return the operations of a step of this process: matrix products of the model, nothing computed twice."""
        conditional = self.config.network.num_classes > 0
        shares = (part.share for part in self.parts)
        calls = sum(self.objective.step_calls(len(share), share.num_velocity, conditional) for share in shares)
        return calls * self.flow.network.forward_flops()

    def _accumulate(self, means: Tensor) -> None:
        norm = self.optimizer.grad_norm.double()
        row = torch.cat((means, torch.stack((norm, torch.zeros_like(norm))) * self._norm_weight))
        finite = torch.isfinite(norm)
        self._bad_in_row.add_(1).mul_(finite.logical_not())
        torch.maximum(self._most_bad, self._bad_in_row, out=self._most_bad)
        if self.config.optim.nonfinite != "step":
            row = torch.where(finite, row, self._skipped_row)
        self.sums += row


class _Part:
    """Rows of the global batch that go through the network at once, and their weights in its statistics."""

    def __init__(self, config: Config, index: int, num_parts: int, device: torch.device) -> None:
        batch_size, fm_ratio = config.train.batch_size, config.objective.fm_ratio
        self.share = share_batch(batch_size, fm_ratio, index, num_parts)
        self.positions = torch.tensor(self.share.positions, device=device)
        num_velocity = int(fm_ratio * batch_size)
        rows = len(self.share) / batch_size
        velocity = self.share.num_velocity / max(num_velocity, 1)
        consistency = (len(self.share) - self.share.num_velocity) / max(batch_size - num_velocity, 1)
        weights = (rows, *(velocity,) * 3, *(consistency,) * 6)
        self.weights = torch.tensor(weights, dtype=torch.float64, device=device)


def _statistics(out: ObjectiveOutput) -> Tensor:
    """The values of SUMMED that an objective gives."""
    values = (
        out.loss.detach(),
        out.velocity_loss,
        out.velocity_mse,
        out.velocity_weight,
        out.consistency_loss,
        out.consistency_mse,
        out.consistency_weight,
    )
    watched = out.loss.new_zeros(len(WATCHED)) if out.watched is None else out.watched
    return torch.cat((torch.stack(values), watched)).double()


class _Losses(nn.Module):
    """Objective and flow as one module, because DDP hooks on forward."""

    def __init__(self, flow: SolutionFlow, objective: GuidedObjective) -> None:
        super().__init__()
        self.flow = flow
        self.objective = objective

    def forward(self, batch: Batch) -> ObjectiveOutput:
        return self.objective(self.flow, batch)


def build_objective(config: Config, ops: ModuleType) -> GuidedObjective:
    """Return the objective of a configuration."""
    objective = config.objective
    shared = {field: getattr(objective, field) for field in SHARED_FIELDS}
    if objective.name == "meanflow":
        return MeanFlow(**shared, ops=ops)
    if objective.name == "flow_matching":
        return FlowMatching(**shared, ops=ops)
    return Objective(**shared, lookahead=objective.lookahead, ops=ops)


def choose_capture(
    cuda_graph: Literal["auto", "on", "off"], device: torch.device, world_size: int, optimizer: Optimizer
) -> bool:
    """Return whether a step is captured as a CUDA graph; ValueError where `on` asks for what cannot be.

    auto leaves several processes uncaptured.
    """
    obstacle = None
    if device.type != "cuda":
        obstacle = "the run is not on a GPU"
    elif optimizer.backend != "fused":
        obstacle = f"the optimizer's backend {optimizer.backend} counts its steps on the host"
    if cuda_graph == "on" and obstacle is not None:
        raise ValueError(f"engine.cuda_graph: got 'on', expected 'auto' or 'off', because {obstacle}")
    return obstacle is None and (cuda_graph == "on" or (cuda_graph == "auto" and world_size == 1))


def gap_ratio_at(config: Config, step: int) -> float:
    """Return the gap ratio r of the 0-based `step` of a run."""
    times = config.times
    return gap_ratio(step, config.train.total_steps, times.gap_init, times.gap_end, times.gap_method)


def learning_rate_at(config: Config, step: int) -> float:
    """Return the learning rate of the 0-based `step` of a run."""
    return learning_rate(config.optim, config.train.total_steps, step)
