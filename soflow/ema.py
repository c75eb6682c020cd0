"""Exponential moving averages of the weights; power-function profiles, and any such profile rebuilt after training."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from soflow.config import WIDTHS, EmaConfig, is_width, require
from soflow.sharding import local

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)


class Ema(Generic[AnyNetwork]):
    """ema = decay^every ema + (1 - decay^every) w, updated at steps divisible by `every`.

    `network` holds the average, in float32, and starts as a copy of the weights; the update is computed in float32 or
    float64. The step is the 0-based one, tested before it counts as done, so that step 0 updates. With `sigma_rel` the
    decay is that of a power-function profile (`power_exponent`): (1 - every / (step + 1))^(gamma + 1).
    """

    def __init__(self, config: EmaConfig, network: AnyNetwork) -> None:
        self.network = copy.deepcopy(network).requires_grad_(False).eval()
        self.every = config.every
        self.decay = config.decay**config.every
        self.gamma = None if config.sigma_rel is None else power_exponent(config.sigma_rel)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        self.track(network)

    def track(self, network: AnyNetwork) -> None:
        """Average the weights of `network` from now on: after the parameters of either network were exchanged."""
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        self.averages, self.weights = zip(*((a, w) for a, w in pairs if w.requires_grad), strict=True)

    def decay_at(self, step: int) -> float | None:
        """Return the decay of the update at the 0-based `step`, None where there is none."""
        if step % self.every:
            return None
        if self.gamma is None:
            return self.decay
        return max(0.0, 1.0 - self.every / (step + 1)) ** (self.gamma + 1.0)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights, if `step` is one of its steps."""
        decay = self.decay_at(step)
        if decay is None:
            return
        stored = [local(average) for average in self.averages]
        averages = [average.to(self.dtype) for average in stored]  # the averages themselves, if of that dtype
        weights = [local(weight).to(self.dtype) for weight in self.weights]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)
        if averages[0] is not stored[0]:
            torch._foreach_copy_(stored, averages)


def configured_averages(config: EmaConfig, network: AnyNetwork) -> list[Ema[AnyNetwork]]:
    """Return the averages of `network` that `config` asks for: the one that sampling uses, then its profiles."""
    return [Ema(replace(config, sigma_rel=width), network) for width in (config.sigma_rel, *config.profiles)]


def power_exponent(sigma_rel: float) -> float:
    """Return gamma of the profile p(tau) ~ tau^gamma on [0, t] whose standard deviation is sigma_rel t.

    sigma_rel = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)), 12^-0.5 at gamma 0 and falling to 1e-4 at 10^4; beyond
    either ValueError.
    Source: arXiv:2312.02696, section 3 and appendix C.
    """
    require("sigma_rel", sigma_rel, is_width(sigma_rel), WIDTHS)
    # squared and multiplied out: a cubic, whose largest root is the one with gamma >= 0
    ratio = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - ratio, 12.0 - ratio])
    return max(float(roots.real.max()), 0.0)


@dataclass(frozen=True)
class Snapshot:
    """The average of a power-function profile after `steps` training steps."""

    sigma_rel: float
    steps: int
    weights: Mapping[str, Tensor]


def reconstruct(snapshots: Iterable[Snapshot], sigma_rel: float, steps: int) -> tuple[dict[str, Tensor], float]:
    """Return the average that a profile of `sigma_rel` would have had after `steps`: a mixture of the snapshots.

    The mixture whose profile is nearest to the wanted one in the square norm, and how far off it is (`mix_profiles`):
    by 0.4 % between two profiles of sixteen snapshots each. Summed in float64, in the dtypes of the snapshots.
    ValueError where none is given or they hold different tensors.
    Source: arXiv:2312.02696, section 3.1 and appendix C.
    """
    given = list(snapshots)
    if not given or any(s.weights.keys() != given[0].weights.keys() for s in given):
        raise ValueError(f"snapshots: got {len(given)}, expected at least one, all with the same tensors")
    mixture, off = mix_profiles([(s.sigma_rel, s.steps) for s in given], sigma_rel, steps)
    result = {}
    for name, first in given[0].weights.items():
        total = torch.zeros_like(first, dtype=torch.float64)
        for weight, snapshot in zip(mixture, given, strict=True):
            total.add_(snapshot.weights[name].double(), alpha=weight)
        result[name] = total.to(first.dtype)
    return result, off


def mix_profiles(profiles: Sequence[tuple[float, int]], sigma_rel: float, steps: int) -> tuple[list[float], float]:
    """Return the factors of `profiles`, pairs (sigma_rel, steps), whose mixture is nearest to that of the arguments.

    They sum to 1, so that it is an average: what does not change in training stays as it is. And how far off the
    mixture is: the norm of the difference, relative to that of the profile wanted.
    """
    shapes = np.array([(power_exponent(sigma), end) for sigma, end in (*profiles, (sigma_rel, steps))], dtype=float)
    if (shapes[:, 1] < 1).any():
        raise ValueError(f"steps: got {int(shapes[:, 1].min())}, expected at least 1")
    gamma, end = shapes[:, 0], shapes[:, 1] / shapes[:, 1].max()
    # p_i(tau) = (g_i + 1) tau^g_i / t_i^(g_i + 1) on [0, t_i]; the integral of p_i p_j runs to the earlier end
    shared = np.minimum(end[:, None], end[None, :])
    powers = (shared / end[:, None]) ** gamma[:, None] * (shared / end[None, :]) ** gamma[None, :]
    gram = (gamma[:, None] + 1) * (gamma[None, :] + 1) / (gamma[:, None] + gamma[None, :] + 1)
    gram = gram * powers * shared / (end[:, None] * end[None, :])
    # profiles may be nearly dependent, or given twice: the smallest of the best mixtures
    bordered = np.ones_like(gram)  # by the constraint, whose multiplier is the last unknown
    bordered[:-1, :-1], bordered[-1, -1] = gram[:-1, :-1], 0.0
    solution, *_ = np.linalg.lstsq(bordered, np.append(gram[:-1, -1], 1.0), rcond=1e-13)
    difference = np.append(solution[:-1], -1.0)
    off = max(0.0, float(difference @ gram @ difference) / float(gram[-1, -1])) ** 0.5
    return [float(factor) for factor in solution[:-1]], off
