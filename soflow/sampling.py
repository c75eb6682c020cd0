"""Images from noise, in one network call or a few."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from soflow.config import require, require_calls
from soflow.flow import SolutionFlow
from soflow.kernels import reference
from soflow.paths import path_coefficients


def sample_noise(seeds: Tensor, shape: tuple[int, int, int], nfe: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Return the starting noise, (N, C, H, W) fp32, and the nfe - 1 renoise tensors of one image per seed.

    seeds: (N,) int64.  Every image depends on its own seed alone: neither on the batch nor on its place in it.
    """
    require("nfe", nfe, nfe >= 1, "at least 1")
    num = shape[0] * shape[1] * shape[2]
    first = torch.zeros_like(seeds)
    noise, *renoise = (
        reference.normal(seeds, torch.full_like(seeds, step), reference.NOISE_STREAM, first, num).view(-1, *shape)
        for step in range(nfe)
    )
    return noise, renoise


@torch.no_grad()
def sample(
    flow: SolutionFlow,
    labels: Tensor | None,
    shape: tuple[int, int, int, int],
    nfe: int = 1,
    noise: Tensor | None = None,
    renoise: Sequence[Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return images of standard normal noise, (N, C, H, W), in nfe network calls, as `flow.sampler` says.

    renoise: x = f(x, 1, 0), noised to 1 - i / nfe with fresh noise and solved to 0 again nfe - 1 times.
    chain: x = f(x, t, s) along the times t, s = 1 - i / nfe, which needs a solution trained between any two times.
    euler, heun: the velocity integrated along equally spaced times, with one or two network calls per step.
    labels: (N,) int64, or None for the null label.  noise: (N, C, H, W) standard normal, and renoise: nfe - 1 of them;
    what is None is drawn from `generator`.  Raises ValueError for an nfe below 1, or odd where the sampler is heun.
    """
    require_calls("nfe", nfe, flow.sampler)
    if renoise is not None and len(renoise) != nfe - 1:
        raise ValueError(f"renoise: got {len(renoise)} tensors, expected nfe - 1 = {nfe - 1}")
    parameter = next(flow.parameters())

    def fresh() -> Tensor:
        return torch.randn(shape, generator=generator, device=parameter.device, dtype=parameter.dtype)

    x = fresh() if noise is None else noise
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"noise: got shape {tuple(x.shape)}, expected {tuple(shape)}")
    steps = nfe // 2 if flow.sampler == "heun" else nfe
    times = [torch.full((len(x),), 1.0 - step / steps, device=x.device, dtype=x.dtype) for step in range(steps + 1)]
    if flow.sampler == "renoise":
        for step, t in enumerate(times[:-1]):
            if step > 0:
                x_1 = fresh() if renoise is None else renoise[step - 1]
                x, _ = reference.interpolate(x, x_1, *path_coefficients(flow.path, t))
            x = flow.solve(x, t, times[-1], labels)
        return x
    samplers: dict[str, Callable[..., Tensor]] = {"chain": SolutionFlow.solve, "euler": _euler, "heun": _heun}
    for t, s in pairwise(times):
        x = samplers[flow.sampler](flow, x, t, s, labels)
    return x


def _euler(flow: SolutionFlow, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
    return x + (s - t)[:, None, None, None] * flow.velocity(x, t, labels)


def _heun(flow: SolutionFlow, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
    """Heun's method: the mean of the velocities before and after an Euler step."""
    dt = (s - t)[:, None, None, None]
    v = flow.velocity(x, t, labels)
    return x + dt * (0.5 * (v + flow.velocity(x + dt * v, s, labels)))
