import pytest
import torch
from torch import nn

from soflow.config import EmaConfig, OptimConfig
from soflow.ema import Ema
from soflow.optim import build_optimizer, gradient_norm


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("radam", torch.optim.RAdam)])
def test_optimizer_is_torchs(name, kind):
    nets = network(), network()
    config = OptimConfig(name=name, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    ours = build_optimizer(config, nets[0].parameters())
    theirs = kind(nets[1].parameters(), lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(10):
        for net, optimizer in zip(nets, (ours, theirs), strict=True):
            optimizer.zero_grad()
            net(torch.full((1, 3), float(step))).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(nets[0].weight, nets[1].weight, rtol=1e-6, atol=1e-7)
    assert not torch.equal(nets[0].weight, network().weight)


def test_gradient_norm_skips_what_has_no_gradient():
    net = network()
    net.weight.grad = torch.full((2, 3), 2.0)
    assert gradient_norm(net.parameters()).item() == pytest.approx(24**0.5)


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
