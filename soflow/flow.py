"""The solution function of the flow ODE, made of a network, a path and a parameterization."""

from typing import get_args

from torch import Tensor, nn

from soflow.config import Sampler
from soflow.kernels import reference
from soflow.models.network import Network
from soflow.paths import Parameterization, Path, solution_coefficients, velocity_factor


class SolutionFlow(nn.Module):
    """f(x, t, s) = a(t, s) x + b(t, s) F(x, t, s): from a point at time t to the solution at time s.

    network: gives F with the shape of x.
    sampler: how `soflow.sampling.sample` makes images in several network calls.
    Source: arXiv 2512.15657, parameterization.
    """

    def __init__(
        self,
        network: Network,
        path: Path = "linear",
        parameterization: Parameterization = "euler",
        sampler: Sampler = "renoise",
    ) -> None:
        super().__init__()
        if path not in ("linear", "trig"):
            raise ValueError(f"path: got {path!r}, expected 'linear' or 'trig'")
        if parameterization not in ("euler", "trig"):
            raise ValueError(f"parameterization: got {parameterization!r}, expected 'euler' or 'trig'")
        if sampler not in get_args(Sampler):
            raise ValueError(f"sampler: got {sampler!r}, expected one of {', '.join(get_args(Sampler))}")
        self.network = network
        self.path = path
        self.parameterization = parameterization
        self.sampler = sampler

    def solve(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return f(x, t, s), (B, C, H, W); f(x, t, t) == x exactly.  t, s: (B,); labels None is the null label."""
        a_ts, b_ts = solution_coefficients(self.parameterization, t, s)
        return reference.solution_map(x, self.network(x, t, s, labels), a_ts, b_ts)

    def velocity(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return d f(x, t, s) / d s at s = t, (B, C, H, W): the velocity of the flow at (x, t)."""
        return velocity_factor(self.parameterization) * self.network(x, t, t, labels)
