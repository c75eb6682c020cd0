"""The slope that a run trained on, taken apart: bias of the finite difference, and noise of its arithmetic.

Both are errors of q relative to the exact slope, the derivative that q has as its gap ratio r goes to 0 (forward-mode
differentiation in float64), as norms over a few rows of the run's own data, noise, times and guided velocity:

    bias    |q(r) - q(0)| / |q(0)|      in float64: what the method leaves out, of first order in r
    noise   |q'(r) - q(r)| / |q(0)|     q' by one way of taking the difference, in one precision

A prediction stands beside each noise. Let e be the rounding error of F in that precision, measured at (x_t, t, s), and
c the coefficients of q = c_x x + c_v v + c_F F_t + c_d dF, where c_d is about 1 / r. Two evaluations have independent
errors, which gives |((c_F - c_d) e, c_d e)|; by difference the error of dF is relative to dF: |(c_F e, c_d dF e / F)|.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from soflow import checkpoint
from soflow.config import Config
from soflow.data import Source, epoch_order, open_source
from soflow.draw import sample_batch
from soflow.flow import SolutionFlow
from soflow.kernels import reference
from soflow.objective import Batch, trained_labels
from soflow.paths import slope_coefficients
from soflow.rounding import ROUNDED, rounded
from soflow.run_folder import RunFolder, load_flow, require_own_data
from soflow.slope import LOOKAHEADS, exact_slope, slope
from soflow.step import build_objective, gap_ratio_at
from soflow.times import MIN_GAP

WAYS = tuple(f"{lookahead} {precision}" for lookahead in LOOKAHEADS for precision in ROUNDED)
GAPS = tuple(float(r) for r in np.logspace(0.0, -4.0, 9))

# rows whose s is nearer to t are left out: there the least gap of training decides, not r
LEAST_SPAN = 0.1
CANDIDATES_PER_SAMPLE = 16
# up to here the bias is one power of r
LARGEST_FITTED_GAP = 0.05


class AuditError(ValueError):
    """A run that cannot be audited as asked; the message names the field or folder and what was expected."""


@dataclass(frozen=True)
class Rows:
    """Where the slope is taken: x_t and v, (N, C, H, W), times t and s, (N,), all float32, and labels (N,) or None."""

    x_t: Tensor
    v: Tensor
    t: Tensor
    s: Tensor
    labels: Tensor | None


@dataclass(frozen=True)
class GapErrors:
    """The errors of q at one gap ratio r, relative to |q(0)|; noise and its prediction by way, a name of `WAYS`."""

    r: float
    bias: float
    noise: dict[str, float]
    predicted: dict[str, float]


@dataclass(frozen=True)
class StepAudit:
    """The audit of one checkpoint.

    step: its finished steps.  r: the gap of the last of them.  F_error: relative rounding error of F, by precision.
    order: the power of r that the bias follows, NaN where there is no bias.  crossing: the largest r at which the noise
    is no smaller than the bias, NaN where there is none, by way.  gaps: from the largest to the smallest.
    """

    step: int
    r: float
    F_error: dict[str, float]
    order: float
    crossing: dict[str, float]
    gaps: list[GapErrors]

    def at(self, r: float) -> GapErrors:
        """Return the errors at the gap nearest to r."""
        return min(self.gaps, key=lambda errors: abs(math.log(errors.r / r)))


def audit(run: Path, steps: Literal["all", "newest"] | Sequence[int], samples: int, seed: int) -> Iterator[StepAudit]:
    """Return the audits, made one by one, of the asked checkpoints of the run in folder `run`, the earliest first.

    All are taken at the same rows, with the weights that training moves, not their average. Raises AuditError, or the
    error of what it reads, for a run without such a checkpoint, and for one whose times seldom lie far enough apart.
    """
    config = RunFolder(run).read_config()
    if config.objective.name != "soflow":
        raise AuditError(
            f"objective.name: got {config.objective.name!r}, expected 'soflow', which alone takes the slope"
        )
    if config.network.name == "own":
        raise AuditError(
            "network.name: got 'own', expected a network of soflow, because no command can build it; "
            "load_flow(path, network=...) loads it in Python (docs/extending.md)"
        )
    folders = choose_steps(RunFolder(run).checkpoints, steps)
    source = open_source(config.data)
    for folder in folders.values():
        require_own_data(source.fingerprint, checkpoint.read(folder).meta, folder)
    batch = draw_batch(config, source, samples, seed)
    objective = build_objective(config, reference)

    def at(step: int, folder: Path) -> StepAudit:
        flow, _ = load_flow(folder, "model")
        x_t, v_t = objective.point(flow, batch)
        v, _, _ = objective.look_ahead(flow, batch, x_t, v_t)
        rows = Rows(x_t, v, batch.t, batch.s, trained_labels(flow, batch))
        r = gap_ratio_at(config, step - 1)
        # of a smaller r than MIN_GAP nothing is left, since t - s is at most 1
        return measure(flow, rows, sorted({*GAPS, max(r, MIN_GAP)}, reverse=True), step, r)

    return (at(step, folder) for step, folder in folders.items())


def choose_steps(root: Path, steps: Literal["all", "newest"] | Sequence[int]) -> dict[int, Path]:
    """Return the asked step folders below `root` by their number, the earliest first; AuditError where one is not."""
    saved = checkpoint.saved_steps(root)
    if not saved:
        raise AuditError(f"{root}: got no checkpoint, expected at least one")
    wanted = list(saved) if steps == "all" else [max(saved)] if steps == "newest" else sorted(steps)
    missing = [step for step in wanted if step not in saved]
    if missing:
        raise AuditError(
            f"{root}: got no checkpoint of step {missing[0]}, expected one of {', '.join(map(str, saved))}"
        )
    return {step: saved[step] for step in wanted}


def draw_batch(config: Config, source: Source, samples: int, seed: int) -> Batch:
    """Return `samples` consistency rows as the run draws them, those with t - s of at least 0.1; its l is not used."""
    number = CANDIDATES_PER_SAMPLE * samples
    mean, std, labels = source.read(np.resize(epoch_order(len(source), seed, 0), number))
    batch = sample_batch(
        mean,
        std,
        labels if config.network.num_classes else None,
        torch.arange(number),
        num_velocity=0,
        seed=seed,
        step=torch.tensor(0),
        r=torch.tensor(1.0),
        times=config.times,
        objective=config.objective,
        ops=reference,
    )
    chosen = torch.nonzero(batch.t - batch.s >= LEAST_SPAN).flatten()[:samples]
    if len(chosen) < samples:
        raise AuditError(
            f"times: got {len(chosen)} of {number} rows with t - s of at least {LEAST_SPAN}, expected {samples}: "
            "times.t_mean should lie above times.s_mean"
        )
    return dataclasses.replace(
        batch,
        x_0=batch.x_0[chosen],
        x_1=batch.x_1[chosen],
        draw_keys=None,  # a trained network drops nothing
        t=batch.t[chosen],
        l=batch.l[chosen],
        s=batch.s[chosen],
        labels=None if batch.labels is None else batch.labels[chosen],
        null_mask=batch.null_mask[chosen],
    )


@torch.no_grad()
def measure(flow: SolutionFlow, rows: Rows, gaps: Sequence[float], step: int, r_of_step: float) -> StepAudit:
    """Return the errors of the slope of `flow` at `rows`, for every gap of `gaps`, from the largest to the smallest."""
    x, v, t, s, labels = rows.x_t, rows.v, rows.t, rows.s, rows.labels
    x64, v64, t64, s64 = x.double(), v.double(), t.double(), s.double()
    exact_flow = rounded(flow, "fp64")
    flows = {precision: rounded(flow, precision) for precision in ROUNDED}
    limit = exact_slope(exact_flow, x64, v64, t64, s64, labels)
    F_64 = exact_flow.network(x64, t64, s64, labels)
    F_errors = {precision: _norms(flows[precision].network(x, t, s, labels) - F_64) for precision in ROUNDED}
    size = limit.norm()
    if not torch.isfinite(size):
        raise AuditError(f"step {step}: the slope of the network is not finite: its training has diverged")

    def errors_at(r: float) -> GapErrors:
        l = t + (s - t) * r
        exact = slope(exact_flow, x64, v64, t64, l.double(), s64, labels)
        _, _, c_F, c_d = slope_coefficients(flow.parameterization, t64, l.double(), s64).unbind(1)
        noise, predicted = {}, {}
        for precision, e in F_errors.items():
            expected = {
                "two_pass": torch.stack(((c_F - c_d) * e, c_d * e)),
                "difference": torch.stack((c_F * e, c_d * _norms(exact.dF) * e / _norms(exact.F_t))),
            }
            for lookahead in LOOKAHEADS:
                q = slope(flows[precision], x, v, t, l, s, labels, lookahead=lookahead).q
                noise[f"{lookahead} {precision}"] = float((q - exact.q).norm() / size)
                predicted[f"{lookahead} {precision}"] = float(expected[lookahead].norm() / size)
        return GapErrors(r, float((exact.q - limit).norm() / size), noise, predicted)

    errors = [errors_at(r) for r in gaps]
    return StepAudit(
        step=step,
        r=r_of_step,
        F_error={precision: float(e.norm() / F_64.norm()) for precision, e in F_errors.items()},
        order=fit_order(errors),
        crossing={way: crossing(errors, way) for way in WAYS},
        gaps=errors,
    )


def fit_order(gaps: Sequence[GapErrors]) -> float:
    """Return the power of r that the bias follows up to r = 0.05, by least squares in logarithms; NaN without bias."""
    fitted = [at for at in gaps if at.r <= LARGEST_FITTED_GAP and at.bias > 0]
    if len(fitted) < 2:
        return math.nan
    return statistics.linear_regression([math.log(at.r) for at in fitted], [math.log(at.bias) for at in fitted]).slope


def crossing(gaps: Sequence[GapErrors], way: str) -> float:
    """Return the largest r at which the noise of `way` is no smaller than the bias, NaN where there is none.

    Between two gaps both are taken as powers of r; without bias or noise nothing crosses.  gaps: the largest first.
    """
    excess = [math.log(at.noise[way] / at.bias) if at.noise[way] and at.bias else -math.inf for at in gaps]
    for index, value in enumerate(excess):
        if value >= 0:
            if index == 0:
                return gaps[0].r
            share = value / (value - excess[index - 1])
            return gaps[index].r * (gaps[index - 1].r / gaps[index].r) ** share
    return math.nan


def _norms(x: Tensor) -> Tensor:
    return x.double().flatten(1).norm(dim=1)
