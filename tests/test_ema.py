import numpy as np
import pytest
import torch
from torch import nn

from soflow.config import EmaConfig
from soflow.ema import Ema, Snapshot, configured_averages, mix_profiles, power_exponent, reconstruct


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_ema_every_step(dtype):
    net = network()
    ema = Ema(EmaConfig(decay=0.9, dtype=dtype), net)
    expected = net.weight.detach().double()
    for step in range(5):
        with torch.no_grad():
            net.weight.add_(1.0)
        ema.update(step)
        expected = 0.9 * expected + 0.1 * net.weight.detach().double()
    torch.testing.assert_close(ema.network.weight.double(), expected, rtol=1e-6, atol=1e-6)
    assert ema.network.weight.dtype == torch.float32
    assert not ema.network.weight.requires_grad


def test_an_average_is_for_inference_while_its_network_trains():
    net = network()
    assert not Ema(EmaConfig(), net).network.training
    assert net.training


def test_ema_every_sixteen_steps_in_float64():
    """As the official CIFAR recipe: steps 0, 16, 32, ... with decay^16, rounded to float32 once per update."""
    net = network()
    ema = Ema(EmaConfig(decay=0.9999, every=16, dtype="float64"), net)
    expected = net.weight.detach().clone()
    for step in range(40):
        with torch.no_grad():
            net.weight.mul_(1.01)
        ema.update(step)
        if step in (0, 16, 32):
            decay = 0.9999**16
            expected = (decay * expected.double() + (1 - decay) * net.weight.detach().double()).float()
    assert torch.equal(ema.network.weight.data, expected)


def test_ema_leaves_frozen_parameters_alone():
    net = network()
    net.bias.requires_grad_(False)
    ema = Ema(EmaConfig(decay=0.5), net)
    before = ema.network.bias.clone()
    with torch.no_grad():
        net.bias.add_(1.0)
    ema.update(0)
    assert torch.equal(ema.network.bias, before)


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 12**-0.5])
def test_exponent_gives_the_width(sigma_rel):
    """The standard deviation of (gamma + 1) tau^gamma on [0, 1], by its moments."""
    gamma = power_exponent(sigma_rel)
    mean, square = (gamma + 1) / (gamma + 2), (gamma + 1) / (gamma + 3)
    assert (square - mean**2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.3, float("nan")])
def test_width_no_profile_has_is_refused(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel: got"):
        power_exponent(sigma_rel)
    with pytest.raises(ValueError, match=r"ema\.sigma_rel: got"):
        EmaConfig(sigma_rel=sigma_rel)


class Track:
    """Averages of a weight that follows a sine for some steps, and snapshots of those with a power profile."""

    def __init__(self, *configs: EmaConfig, steps: int = 200) -> None:
        net = nn.Linear(1, 1, bias=False).double()
        self.emas = [Ema(config, net) for config in configs]
        self.snapshots: list[Snapshot] = []
        for step in range(steps):
            with torch.no_grad():
                net.weight.fill_(np.sin(0.05 * step))
            for config, ema in zip(configs, self.emas, strict=True):
                ema.update(step)
                if (step + 1) % 8 == 0 and config.sigma_rel is not None:
                    weights = {"w": ema.network.weight.detach().clone()}
                    self.snapshots.append(Snapshot(config.sigma_rel, step + 1, weights))


def test_power_profile_weighs_the_past():
    """The weight of step i after t steps is proportional to i^gamma, to the order of one step."""
    (ema,) = Track(EmaConfig(sigma_rel=0.1, dtype="float64")).emas
    i = np.arange(1, 201)
    gamma = power_exponent(0.1)
    edges = (np.arange(201) / 200) ** (gamma + 1)
    exact = (np.diff(edges) * np.sin(0.05 * (i - 1))).sum()
    assert ema.network.weight.item() == pytest.approx(exact, rel=1e-12)


def test_profile_of_every_few_steps_is_the_same_to_their_number():
    fine, coarse = Track(EmaConfig(sigma_rel=0.1), EmaConfig(sigma_rel=0.1, every=4)).emas
    assert fine.network.weight.item() == pytest.approx(coarse.network.weight.item(), abs=0.05)
    assert fine.network.weight.item() != coarse.network.weight.item()


@pytest.mark.parametrize("wanted", [0.06, 0.075, 0.09])
def test_reconstruction_is_the_average_that_was_not_kept(wanted):
    configs = [EmaConfig(sigma_rel=sigma, dtype="float64") for sigma in (0.05, 0.1, wanted)]
    track = Track(*configs)
    stored = [s for s in track.snapshots if s.sigma_rel != wanted]
    weights, off = reconstruct(stored, wanted, 200)
    rebuilt = weights["w"]
    kept = track.emas[2].network.weight
    assert rebuilt.dtype == kept.dtype
    assert rebuilt.item() == pytest.approx(kept.item(), abs=1e-4)
    assert off < 2e-3


def test_snapshot_rebuilds_itself():
    profiles = [(0.05, 1000), (0.1, 1000), (0.05, 2000), (0.1, 2000)]
    itself, off = mix_profiles(profiles, 0.1, 2000)
    assert itself == pytest.approx([0, 0, 0, 1], abs=1e-6)
    assert off < 1e-6
    twice, _ = mix_profiles([(0.1, 2000), (0.1, 2000)], 0.1, 2000)
    assert twice == pytest.approx([0.5, 0.5])


def test_mixture_is_the_nearest():
    """Of the averages, whose factors sum to 1: against least squares on a fine grid of the profiles themselves."""
    profiles, wanted = [(0.05, 500), (0.1, 500), (0.05, 1000), (0.1, 1000)], (0.07, 900)
    tau = (np.arange(200_000) + 0.5) / 200

    def density(sigma: float, end: float) -> np.ndarray:
        gamma = power_exponent(sigma)
        return np.where(tau <= end, (gamma + 1) * (tau / end) ** gamma / end, 0.0)

    columns = np.stack([density(*profile) for profile in profiles], axis=1)
    last, others = columns[:, -1], columns[:, :-1]
    free, *_ = np.linalg.lstsq(others - last[:, None], density(*wanted) - last, rcond=None)
    expected = np.append(free, 1.0 - free.sum())
    mixture, off = mix_profiles(profiles, *wanted)
    assert mixture == pytest.approx(expected, abs=1e-3)
    assert sum(mixture) == pytest.approx(1.0, abs=1e-12)
    difference = columns @ expected - density(*wanted)
    assert off == pytest.approx(np.linalg.norm(difference) / np.linalg.norm(density(*wanted)), rel=1e-3)
    assert off > 0.1


def test_profiles_are_averages_besides():
    config = EmaConfig(decay=0.9, every=3, dtype="float64", profiles=(0.05, 0.1))
    averages = configured_averages(config, network())
    assert [a.gamma for a in averages] == [None, power_exponent(0.05), power_exponent(0.1)]
    assert {(a.every, a.dtype) for a in averages} == {(3, torch.float64)}


def test_snapshots_that_do_not_fit_are_refused():
    one = Snapshot(0.1, 10, {"w": torch.zeros(1)})
    with pytest.raises(ValueError, match="snapshots: got 0"):
        reconstruct([], 0.1, 10)
    with pytest.raises(ValueError, match="snapshots: got 2"):
        reconstruct([one, Snapshot(0.1, 20, {"v": torch.zeros(1)})], 0.1, 10)
    with pytest.raises(ValueError, match="steps: got 0"):
        reconstruct([one], 0.1, 0)
