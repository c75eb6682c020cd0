"""One training step: draw, guide, look ahead, joint call, loss, backward, update; its statistics stay on the device."""

from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from soflow.config import Config
from soflow.distributed import Processes
from soflow.draw import sample_batch, share_batch
from soflow.flow import SolutionFlow
from soflow.objective import Batch, Objective, ObjectiveOutput
from soflow.optim import Optimizer
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
    "grad_norm",
    "skipped_steps",
)


class TrainingStep:
    """Trains `flow` by one global batch a call, of which this process has the rows `share`.

    flow: computes; its weights, or those that shadow them, are the ones that `optimizer` moves.
    sums: of the statistics `SUMMED` over the steps since they were last zeroed, weighted so that the sum over all
    processes is that of the global batch, (9,) float64 on the device; `num_summed` counts those steps.
    """

    def __init__(
        self, config: Config, processes: Processes, flow: SolutionFlow, optimizer: Optimizer, ops: ModuleType
    ) -> None:
        self.config = config
        self.flow = flow
        self.optimizer = optimizer
        self.ops = ops
        self.device = processes.device
        batch_size = config.train.batch_size
        self.share = share_batch(batch_size, config.objective.fm_ratio, processes.rank, processes.world_size)
        self.positions = torch.tensor(self.share.positions, device=self.device)
        self.module: nn.Module = _Losses(flow, build_objective(config, ops))
        if processes.world_size > 1 and not is_sharded(flow.network):
            self.module = DistributedDataParallel(self.module, gradient_as_bucket_view=True)
        # DDP and FSDP average over processes, whose shares may differ by a row: weigh each by its rows.
        self.loss_scale = len(self.share) / batch_size * processes.world_size
        self.sums = torch.zeros(len(SUMMED), dtype=torch.float64, device=self.device)
        self.num_summed = 0
        self._bad_in_row = torch.zeros((), dtype=torch.int64, device=self.device)
        self._most_bad = torch.zeros((), dtype=torch.int64, device=self.device)
        self._most_bad_copy = torch.zeros((), dtype=torch.int64, pin_memory=self.device.type == "cuda")
        self._most_bad_seen = 0
        self._copied: torch.cuda.Event | None = None
        self._weights = self._summing_weights(processes.world_size)

    def __call__(self, mean: Tensor, std: Tensor | None, labels: Tensor, step: int) -> None:
        """Make the 0-based `step` on this process's samples, as `Source.read` gives them."""
        batch = self.draw(mean, std, labels, step)
        self.optimizer.zero_grad(set_to_none=True)
        out: ObjectiveOutput = self.module(batch)
        (out.loss * self.loss_scale).backward()
        self.optimizer.step()
        self._accumulate(out)

    def most_bad_in_row(self) -> int:
        """Return the most steps in a row so far without a finite gradient; on a GPU as it was some steps ago.

        To be called after every step; waits for nothing.
        """
        if self.device.type == "cpu":
            return int(self._most_bad)
        if self._copied is None or self._copied.query():
            self._most_bad_seen = int(self._most_bad_copy)
            self._most_bad_copy.copy_(self._most_bad, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        return self._most_bad_seen

    def draw(self, mean: Tensor, std: Tensor | None, labels: Tensor, step: int) -> Batch:
        """Return the batch of the 0-based `step` on these samples, with the noise and times of that step."""
        config = self.config
        return sample_batch(
            mean.to(self.device),
            None if std is None else std.to(self.device),
            labels.to(self.device) if config.network.num_classes else None,
            self.positions,
            self.share.num_velocity,
            seed=config.seed,
            step=step,
            r=gap_ratio_at(config, step),
            times=config.times,
            objective=config.objective,
            ops=self.ops,
        )

    def _accumulate(self, out: ObjectiveOutput) -> None:
        norm = self.optimizer.grad_norm
        values = (
            out.loss.detach(),
            out.velocity_loss,
            out.velocity_mse,
            out.velocity_weight,
            out.consistency_loss,
            out.consistency_mse,
            out.consistency_weight,
            norm,
            torch.zeros_like(norm),
        )
        row = torch.stack(values).double()
        finite = torch.isfinite(norm)
        self._bad_in_row.add_(1).mul_(~finite)
        torch.maximum(self._most_bad, self._bad_in_row, out=self._most_bad)
        if self.config.optim.nonfinite != "step":
            skipped = torch.zeros_like(row)
            skipped[-1] = 1.0
            row = torch.where(finite, row, skipped)
        self.sums += row * self._weights
        self.num_summed += 1

    def _summing_weights(self, world_size: int) -> Tensor:
        """This process's share of each summed mean: of all rows, velocity rows, consistency rows, the norm, skips."""
        batch_size, share = self.config.train.batch_size, self.share
        num_velocity = int(self.config.objective.fm_ratio * batch_size)
        rows = len(share) / batch_size
        velocity = share.num_velocity / max(num_velocity, 1)
        consistency = (len(share) - share.num_velocity) / max(batch_size - num_velocity, 1)
        weights = (rows, *(velocity,) * 3, *(consistency,) * 3, *(1.0 / world_size,) * 2)
        return torch.tensor(weights, dtype=torch.float64, device=self.device)


class _Losses(nn.Module):
    """Objective and flow as one module, because DDP hooks on forward."""

    def __init__(self, flow: SolutionFlow, objective: Objective) -> None:
        super().__init__()
        self.flow = flow
        self.objective = objective

    def forward(self, batch: Batch) -> ObjectiveOutput:
        return self.objective(self.flow, batch)


def build_objective(config: Config, ops: ModuleType) -> Objective:
    """Return the objective of a configuration."""
    objective = config.objective
    return Objective(
        cfg_scale=objective.cfg_scale,
        cfg_decay_time=objective.cfg_decay_time,
        mix_ratio=objective.mix_ratio,
        loss_p=objective.loss_p,
        loss_eps=objective.loss_eps,
        lookahead=objective.lookahead,
        ops=ops,
    )


def gap_ratio_at(config: Config, step: int) -> float:
    """Return the gap r of the 0-based `step` of a run."""
    times = config.times
    return gap_ratio(step, config.train.total_steps, times.gap_init, times.gap_end, times.gap_method)
