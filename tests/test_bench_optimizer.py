import pytest
import torch
from torch import nn

from bench import optimizer
from bench.optimizer import BETAS, DECAY, LR, Way


def adamw(params, betas=BETAS):
    return torch.optim.AdamW(params, lr=LR, betas=betas, weight_decay=0.0)


def looped(network, gradients, decay=DECAY, betas=BETAS):
    """A way whose average goes tensor by tensor."""
    params, ema = optimizer.fresh(network, gradients)
    theirs = adamw(list(params), betas)

    def update():
        theirs.step()
        for average, weight in zip(ema.averages, params, strict=True):
            average.copy_(decay * average + (1 - decay) * weight.detach())

    return Way(update, list(params), list(ema.averages))


@pytest.fixture
def start():
    torch.manual_seed(0)
    network = nn.Linear(128, 128)
    for param in network.parameters():
        nn.init.normal_(param, std=0.02)
    starts = [param.detach() for param in network.parameters()]
    return network, starts, [1e-3 * torch.randn_like(value) for value in starts]


def test_ways_that_agree_are_accepted(start):
    network, starts, gradients = start
    made = {"foreach": optimizer.foreach(network, gradients, adamw), "looped": looped(network, gradients)}
    optimizer.require_equal(made, starts, gradients)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"decay": 1.0}, "averages"),
        ({"decay": 0.999}, "averages"),
        ({"betas": (0.9, 0.999)}, "weights"),
        ({"betas": (0.95, 0.99)}, "weights"),
    ],
)
def test_a_broken_way_is_found(settings, what, start):
    network, starts, gradients = start
    made = {"foreach": optimizer.foreach(network, gradients, adamw), "broken": looped(network, gradients, **settings)}
    with pytest.raises(AssertionError, match=rf"broken: {what} moved .* apart from those of foreach"):
        optimizer.require_equal(made, starts, gradients)
