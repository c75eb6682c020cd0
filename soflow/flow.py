"""The solution function of the flow ODE, made of a network, a path and a parameterization."""

import dataclasses
from types import ModuleType
from typing import get_args

from torch import Tensor, nn

from soflow.config import FlowConfig, NetworkConfig, Sampler, require
from soflow.kernels import reference
from soflow.models import Network, NetworkBuilder, build_network, build_own_network
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
        require("path", path, path in ("linear", "trig"), "'linear' or 'trig'")
        require("parameterization", parameterization, parameterization in ("euler", "trig"), "'euler' or 'trig'")
        samplers = get_args(Sampler)
        require("sampler", sampler, sampler in samplers, f"one of {', '.join(samplers)}")
        self.network = network
        self.path = path
        self.parameterization = parameterization
        self.sampler = sampler

    def solve(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return f(x, t, s), (B, C, H, W); f(x, t, t) == x exactly.  t, s: (B,); labels None is the null label."""
        a_ts, b_ts = solution_coefficients(self.parameterization, t, s)
        return reference.solution_map(x, self.network(x, t, s, labels), a_ts, b_ts)

    def velocity(self, x: Tensor, t: Tensor, labels: Tensor | None = None, draw_keys: Tensor | None = None) -> Tensor:
        """Return d f(x, t, s) / d s at s = t, (B, C, H, W): the velocity of the flow at (x, t)."""
        return velocity_factor(self.parameterization) * self.network(x, t, t, labels, draw_keys=draw_keys)


def build_flow(
    network: NetworkConfig, flow: FlowConfig, ops: ModuleType, own: NetworkBuilder | None = None
) -> SolutionFlow:
    """Build the network, which computes with `ops`, and the flow around it.

    own: what builds the network that is called own; ValueError where it is missing or not asked for, and for a shape
    that cannot be built, with the field of `network`.
    """
    if own is not None and network.name != "own":
        raise ValueError(f"network.name: got {network.name!r}, expected 'own', because a network was handed over")
    if network.name == "own":
        if own is None:
            raise ValueError(
                "network.name: got 'own' and no network, expected Trainer(config, processes, network=...) or "
                "load_flow(path, network=...) in Python (docs/extending.md): no command can build it"
            )
        built = build_own_network(
            own,
            input_size=network.input_size,
            in_channels=network.in_channels,
            num_classes=network.num_classes,
            ops=ops,
        )
    else:
        shape = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
        try:
            built = build_network(**shape, ops=ops)
        except ValueError as error:
            raise ValueError(f"network.{error}") from error
    return SolutionFlow(built, flow.path, flow.parameterization, flow.sampler)
