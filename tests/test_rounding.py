import pytest
import tiny
import torch

from soflow import SolutionFlow
from soflow.kernels import reference
from soflow.models.network import Network
from soflow.rounding import ROUNDED, round_to_tf32, rounded

# rounding of one product's inputs: half a unit in the last of 24, 11 and 8 bits of mantissa
UNITS = {"fp32": 2**-24, "tf32-like": 2**-11, "bf16": 2**-8}


def evaluate(network: Network, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    t, s = torch.tensor([0.9, 0.6, 0.4, 0.2]), torch.tensor([0.1, 0.5, 0.0, 0.1])
    with torch.no_grad():
        return network(x.to(dtype), t.to(dtype), s.to(dtype))


@pytest.mark.parametrize("name", ["DiT", "UNet"])
def test_error_is_that_of_the_rounded_products(name):
    flow = SolutionFlow(tiny.network(name))
    exact = evaluate(rounded(flow, "fp64").network, torch.float64)
    for rounding in ROUNDED:
        error = (evaluate(rounded(flow, rounding).network).double() - exact).norm() / exact.norm()
        assert 0.2 * UNITS[rounding] < error < 20 * UNITS[rounding], rounding


def test_the_flow_itself_stays_as_it_is():
    flow = SolutionFlow(tiny.network("DiT"), "trig", "trig")
    before = evaluate(flow.network)
    for rounding in ("fp64", *ROUNDED):
        copy = rounded(flow, rounding)
        assert (copy.path, copy.parameterization) == ("trig", "trig")
    assert torch.equal(evaluate(flow.network), before)
    assert torch.equal(evaluate(rounded(flow, "fp32").network), before)


def test_tf32_keeps_ten_bits():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    result = round_to_tf32(x)
    error = ((result - x) / x).abs().max().item()
    assert 2**-13 < error <= 2**-11
    assert torch.equal(round_to_tf32(result), result)


def test_tf32_rounds_both_inputs_of_every_product():
    ops = rounded(SolutionFlow(tiny.network("UNet")), "tf32-like").network.ops.ops
    generator = torch.Generator().manual_seed(0)
    for name, *shapes in (
        ("linear", (4, 16), (8, 16), (8,)),
        ("linear_difference", (4, 16), (8, 16)),
        ("conv", (2, 4, 6, 6), (3, 4, 3, 3), (3,)),
        ("conv_difference", (2, 4, 6, 6), (3, 4, 3, 3)),
    ):
        x, weight, *bias = (torch.randn(*shape, generator=generator) for shape in shapes)
        expected = getattr(reference, name)(round_to_tf32(x), round_to_tf32(weight), *bias)
        assert torch.equal(getattr(ops, name)(x, weight, *bias), expected), name
