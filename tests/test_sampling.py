import pytest
import torch
from test_flow import tiny_flow

from soflow import sample, sample_noise


def test_one_call_solves_from_noise_to_data():
    flow = tiny_flow()
    noise, _ = sample_noise(torch.arange(3), (2, 8, 8))
    labels = torch.tensor([0, 1, 5])
    images = sample(flow, labels, (3, 2, 8, 8), noise=noise)
    assert torch.equal(images, flow.solve(noise, torch.ones(3), torch.zeros(3), labels))
    assert not images.requires_grad


def test_each_round_noises_the_prediction_anew():
    flow = tiny_flow(path="trig")
    noise, renoise = sample_noise(torch.arange(3), (2, 8, 8), nfe=2)
    half, end = torch.full((3,), 0.5), torch.zeros(3)
    x_0 = flow.solve(noise, torch.ones(3), end)
    x_half = torch.cos(torch.pi / 4 * torch.ones(1)) * x_0 + torch.sin(torch.pi / 4 * torch.ones(1)) * renoise[0]
    expected = flow.solve(x_half, half, end)
    torch.testing.assert_close(sample(flow, None, (3, 2, 8, 8), 2, noise, renoise), expected)


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
