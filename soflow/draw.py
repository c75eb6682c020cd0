"""The batch of a step as a pure function of (seed, step, position): the same rows however processes share it."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from soflow.config import ObjectiveConfig, TimesConfig
from soflow.objective import Batch
from soflow.streams import NULL_STREAM, TIME_STREAM
from soflow.times import consistency_times, logit_normal, middle_time, ordered_times


@dataclass(frozen=True)
class Share:
    """The rows of the global batch that one process trains: global positions, its velocity rows first.

    Positions [0, num_velocity of the whole batch) are velocity rows; each process takes an even slice of the batch and
    of the rarer kind, so that roles, noise and times do not depend on the number of processes.
    """

    positions: tuple[int, ...]
    num_velocity: int

    def __len__(self) -> int:
        return len(self.positions)


def share_batch(batch_size: int, fm_ratio: float, rank: int, world_size: int) -> Share:
    """Return the share of process `rank` in a global batch whose first int(fm_ratio * batch_size) rows are velocity."""
    num_velocity = int(fm_ratio * batch_size)
    num_rare = min(num_velocity, batch_size - num_velocity)

    def before(index: int) -> tuple[int, int]:
        """How many velocity and consistency rows the processes before `index` take."""
        # what the rarer kind leaves of an even share the other fills, which is never fewer than no rows
        rare, common = num_rare * index // world_size, batch_size * index // world_size
        common -= rare
        return (rare, common) if num_velocity == num_rare else (common, rare)

    (velocity, consistency), (velocity_end, consistency_end) = before(rank), before(rank + 1)
    rows = *range(velocity, velocity_end), *range(num_velocity + consistency, num_velocity + consistency_end)
    return Share(rows, velocity_end - velocity)


def sample_batch(
    mean: Tensor,
    std: Tensor | None,
    labels: Tensor | None,
    positions: Tensor,
    num_velocity: int,
    *,
    seed: int,
    step: Tensor,
    r: Tensor,
    times: TimesConfig,
    objective: ObjectiveConfig,
    ops: ModuleType,
    augment_labels: Tensor | None = None,
) -> Batch:
    """Draw posterior, noise, times and null labels of the rows `positions` for (seed, step).

    mean, std: (B, C, H, W) fp32, moments of the data (std None: exact).  labels: (B,) int64 or None.
    positions: (B,) int64, position of each row in the global batch.  step: int64 scalar.  r: fp32 scalar, the
    gap ratio of the step.  augment_labels: (B, A), or None.
    Objective meanflow orders the draws of t and s, and its velocity rows take that t, as the paper has it.
    """
    seeds = torch.full_like(positions, seed)
    x_0, x_1 = ops.draw(mean, std, seeds, step, positions)
    z = ops.normal(seeds, step, TIME_STREAM, positions, 3)
    t_draw = logit_normal(z[:, 1], times.t_mean, times.t_std)
    s_draw = logit_normal(z[:, 2], times.s_mean, times.s_std)
    if objective.name == "meanflow":
        t, s = ordered_times(t_draw, s_draw)
        t_velocity = t
    else:
        t, s = consistency_times(t_draw, s_draw)
        t_velocity = logit_normal(z[:, 0], times.velocity_mean, times.velocity_std)
    is_velocity = torch.arange(len(positions), device=positions.device) < num_velocity
    return Batch(
        x_0=x_0,
        x_1=x_1,
        t=torch.where(is_velocity, t_velocity, t),
        l=middle_time(t, s, r),
        s=s,
        labels=labels,
        null_mask=ops.uniform(seeds, step, NULL_STREAM, positions, 1)[:, 0] < objective.label_dropout,
        num_velocity=num_velocity,
        augment_labels=augment_labels,
        draw_keys=torch.stack((seeds, step.expand_as(positions), positions), dim=1),
    )
