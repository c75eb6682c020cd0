import math

import pytest
import torch
from test_flow import tiny_flow
from torch import nn

from soflow import SolutionFlow, sample, sample_noise
from soflow.models import Network


def test_one_call_solves_from_noise_to_data():
    flow = tiny_flow()
    noise, _ = sample_noise(torch.arange(3), (2, 8, 8))
    labels = torch.tensor([0, 1, 5])
    images = sample(flow, labels, (3, 2, 8, 8), noise=noise)
    assert torch.equal(images, flow.solve(noise, torch.ones(3), torch.zeros(3), labels))
    assert not images.requires_grad


def test_each_round_noises_the_prediction_anew():
    flow = tiny_flow(path="trig")
    noise, renoise = sample_noise(torch.arange(3), (2, 8, 8), nfe=4)
    expected = flow.solve(noise, torch.ones(3), torch.zeros(3))
    for t, fresh in zip((0.75, 0.5, 0.25), renoise, strict=True):
        x_t = math.cos(t * math.pi / 2) * expected + math.sin(t * math.pi / 2) * fresh
        expected = flow.solve(x_t, torch.full((3,), t), torch.zeros(3))
    torch.testing.assert_close(sample(flow, None, (3, 2, 8, 8), 4, noise, renoise), expected)


def test_an_image_depends_on_its_seed_alone():
    """Not on the batch, and not on its place in it."""
    flow = tiny_flow()

    def images(seeds, nfe=3):
        noise, renoise = sample_noise(torch.tensor(seeds), (2, 8, 8), nfe)
        return sample(flow, None, (len(seeds), 2, 8, 8), nfe, noise, renoise)

    together = images([5, 2**40, 7])
    torch.testing.assert_close(images([7, 5])[0], together[2])
    torch.testing.assert_close(images([2**40])[0], together[1])
    assert not torch.allclose(together[0], together[1])


def test_noise_of_the_rounds_is_independent():
    noise, renoise = sample_noise(torch.arange(50), (4, 8, 8), nfe=4)
    assert len(renoise) == 3
    for other in renoise:
        assert (noise * other).mean().abs() < 4 / noise.numel() ** 0.5


def test_generator_draws_what_is_not_given():
    flow = tiny_flow()
    a, b = (sample(flow, None, (2, 2, 8, 8), 2, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nfe": 0}, "nfe: got 0"),
        ({"renoise": []}, "renoise: got 0 tensors, expected nfe - 1 = 1"),
        ({"noise": torch.zeros(3, 2, 8, 8)}, "noise: got shape"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        sample(**{"flow": tiny_flow(), "labels": None, "shape": (2, 2, 8, 8), "nfe": 2, **change})
    with pytest.raises(ValueError, match="nfe: got 0"):
        sample_noise(torch.arange(2), (2, 8, 8), 0)


def test_chain_follows_the_solution_from_time_to_time():
    flow = tiny_flow(sampler="chain")
    noise, _ = sample_noise(torch.arange(3), (2, 8, 8))
    one, half, end = torch.ones(3), torch.full((3,), 0.5), torch.zeros(3)
    expected = flow.solve(flow.solve(noise, one, half), half, end)
    torch.testing.assert_close(sample(flow, None, (3, 2, 8, 8), 2, noise), expected)


class Growth(Network):
    """F(x, t, s) = x: x grows with e^t, and data is noise / e."""

    input_size, in_channels, num_classes = 8, 2, 0

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.calls = 0

    def forward(self, x, t, s, labels=None, augment_labels=None, draw_keys=None):
        self.calls += 1
        return self.scale * x

    def forward_flops(self):
        return 0

    def bf16_modules(self):
        return ()

    def forward_difference(self, x, dx, t, dt, s, labels=None, augment_labels=None):
        return self.scale * x, dx


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_steps_of_the_velocity_converge_at_their_order(sampler, order):
    flow, noise = SolutionFlow(Growth(), sampler=sampler), torch.ones(1, 2, 8, 8, dtype=torch.float64)
    errors = []
    for steps in (16, 32):
        flow.network.calls = 0
        x = sample(flow, None, (1, 2, 8, 8), steps * order, noise)
        assert flow.network.calls == steps * order
        errors.append((x - math.exp(-1)).abs().max().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_one_euler_step_is_the_mean_image_at_the_noise():
    flow = tiny_flow(sampler="euler")
    noise, _ = sample_noise(torch.arange(3), (2, 8, 8))
    torch.testing.assert_close(sample(flow, None, (3, 2, 8, 8), 1, noise), noise - flow.velocity(noise, torch.ones(3)))


def test_heun_takes_calls_in_pairs():
    with pytest.raises(ValueError, match="nfe: got 3, expected an even number"):
        sample(tiny_flow(sampler="heun"), None, (2, 2, 8, 8), 3)
