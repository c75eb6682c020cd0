"""Images from noise, in one network call or a few."""

from collections.abc import Sequence

import torch
from torch import Tensor

from soflow.flow import SolutionFlow
from soflow.kernels import reference
from soflow.paths import path_coefficients


def sample_noise(seeds: Tensor, shape: tuple[int, int, int], nfe: int = 1) -> tuple[Tensor, list[Tensor]]:
    """Return the starting noise, (N, C, H, W) fp32, and the nfe - 1 renoise tensors of one image per seed.

    seeds: (N,) int64.  Every image depends on its own seed alone: neither on the batch nor on its place in it.
    """
    if nfe < 1:
        raise ValueError(f"nfe: got {nfe}, expected at least 1")
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
    """Return images x_0 = f(noise, 1, 0), (N, C, H, W), noised to 1 - i / nfe and solved again nfe - 1 times.

    labels: (N,) int64, or None for the null label.  noise: (N, C, H, W) standard normal, and renoise: nfe - 1 of them;
    what is None is drawn from `generator`.  Every round starts from fresh noise, never from f(x, 1, 0.5).
    """
    if nfe < 1:
        raise ValueError(f"nfe: got {nfe}, expected at least 1")
    if renoise is not None and len(renoise) != nfe - 1:
        raise ValueError(f"renoise: got {len(renoise)} tensors, expected nfe - 1 = {nfe - 1}")
    parameter = next(flow.parameters())

    def fresh() -> Tensor:
        return torch.randn(shape, generator=generator, device=parameter.device, dtype=parameter.dtype)

    x = fresh() if noise is None else noise
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"noise: got shape {tuple(x.shape)}, expected {tuple(shape)}")
    end = torch.zeros(len(x), device=x.device, dtype=x.dtype)
    for step in range(nfe):
        t = torch.full_like(end, 1.0 - step / nfe)
        if step > 0:
            x_1 = fresh() if renoise is None else renoise[step - 1]
            x, _ = reference.interpolate(x, x_1, *path_coefficients(flow.path, t))
        x = flow.solve(x, t, end, labels)
    return x
