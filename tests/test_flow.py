import pytest
import torch

from soflow import SolutionFlow
from soflow.models import DiT


def tiny_flow(parameterization="euler", path="linear", sampler="renoise") -> SolutionFlow:
    torch.manual_seed(0)
    network = DiT(8, 4, 2, 16, 1, 2, 5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return SolutionFlow(network, path, parameterization, sampler)


@pytest.mark.parametrize("parameterization", ["euler", "trig"])
def test_solution_at_its_own_time_is_x_exactly(parameterization):
    flow = tiny_flow(parameterization)
    x, t = torch.randn(7, 2, 8, 8), torch.linspace(0, 1, 7)
    assert torch.equal(flow.solve(x, t, t, torch.arange(7) % 5), x)


@pytest.mark.parametrize("parameterization", ["euler", "trig"])
def test_velocity_is_the_derivative_of_the_solution(parameterization):
    flow = tiny_flow(parameterization).double()
    x, t = torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    labels = torch.tensor([0, 4, 5])
    h = 1e-5
    numeric = (flow.solve(x, t, t + h, labels) - flow.solve(x, t, t - h, labels)) / (2 * h)
    torch.testing.assert_close(flow.velocity(x, t, labels), numeric, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("field", "value"), [("path", "cubic"), ("parameterization", "Triangular")])
def test_unknown_kind_is_refused(field, value):
    with pytest.raises(ValueError, match=f"{field}: got '{value}'"):
        SolutionFlow(torch.nn.Identity(), **{field: value})
