import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from soflow import doctor
from soflow.checkpoint import infer_dit_shape, load_official
from soflow.config import EmaConfig, OptimConfig
from soflow.ema import Ema
from soflow.models import build_network
from soflow.optim import Optimizer, build_optimizer

GOLDEN = Path(__file__).parent / "golden"


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


def test_the_optimizer_has_the_configured_settings():
    settings = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3}
    (group,) = build_optimizer(OptimConfig(**settings), network().parameters()).param_groups
    assert {key: group[key] for key in settings} == settings


def test_gradient_norm_skips_what_has_no_gradient():
    net = network()
    optimizer = Optimizer(net.parameters())
    net.weight.grad = torch.full((2, 3), 2.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(24**0.5)


KINDS = [("adamw", torch.optim.AdamW), ("radam", torch.optim.RAdam)]


def weights(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5, 7), (), (0,), (1,), (2, 0, 3), (130,))
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


def train_both(name, kind, dtype, foreach):
    """Our weights and optimizer, and torch's, after 100 steps in which parameters lack a gradient now and then."""
    ours, theirs = weights(dtype), weights(dtype)
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-7, "weight_decay": 0.1}
    optimizers = (
        Optimizer(ours, name=name, backend="reference", **settings),
        kind(theirs, foreach=foreach, **settings),
    )
    generator = torch.Generator().manual_seed(1)
    for step in range(100):
        for index, pair in enumerate(zip(ours, theirs, strict=True)):
            gradient = torch.randn(pair[0].shape, generator=generator, dtype=dtype)
            for param in pair:
                param.grad = None if (index + step) % 4 == 0 or (index == 3 and step < 50) else gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    return ours, theirs, *optimizers


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_reference_is_torchs_to_the_last_bit(name, kind):
    ours, theirs, optimizer, expected = train_both(name, kind, torch.float64, foreach=True)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    found, expected = optimizer.state_dict(), expected.state_dict()
    assert found["state"].keys() == expected["state"].keys()
    for index, entry in expected["state"].items():
        assert found["state"][index].keys() == entry.keys()
        assert all(torch.equal(found["state"][index][key], value) for key, value in entry.items())


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_reference_in_float32(name, kind, foreach):
    ours, theirs, *_ = train_both(name, kind, torch.float32, foreach)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7 if foreach else 2e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_state_loads_into_torchs_and_back(name, kind):
    ours, theirs, optimizer, expected = train_both(name, kind, torch.float64, foreach=True)
    assert optimizer.state_dict()["param_groups"] == [
        {**group, "foreach": None} for group in expected.state_dict()["param_groups"]
    ]
    crossed = Optimizer(theirs, name=name), kind(ours, foreach=True)
    crossed[0].load_state_dict(expected.state_dict())
    crossed[1].load_state_dict(optimizer.state_dict())
    crossed[1].param_groups[0]["foreach"] = True
    for target in crossed:
        for param in target.param_groups[0]["params"]:
            param.grad = torch.full_like(param, 0.5)
        target.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_official_state_round_trip():
    """What an official checkpoint holds comes back entry for entry, its frozen positions without a state included."""
    official = load_official(GOLDEN / "official_checkpoint_tiny.pt")
    net = build_network("DiT", **infer_dit_shape(official.model, num_heads=2))
    optimizer = Optimizer(net.parameters())
    optimizer.load_state_dict(official.optimizer)
    optimizer.finished = official.step
    exported = optimizer.state_dict()
    assert exported["param_groups"] == official.optimizer["param_groups"]
    assert exported["state"].keys() == official.optimizer["state"].keys()
    for index, entry in official.optimizer["state"].items():
        assert all(torch.equal(exported["state"][index][key], value) for key, value in entry.items())
        assert optimizer.state[optimizer.parameters()[index]]["exp_avg"].shape == optimizer.parameters()[index].shape


@pytest.mark.parametrize(("key", "value"), [("amsgrad", True), ("maximize", True), ("decoupled_weight_decay", False)])
def test_settings_it_does_not_compute_are_refused(key, value):
    params = weights(torch.float32)
    other = torch.optim.AdamW(params)
    other.param_groups[0][key] = value
    with pytest.raises(ValueError, match=rf"param_groups\[0\]\.{key}: got {value}, expected {not value}"):
        Optimizer(params).load_state_dict(other.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "sgd"}, "optim.name: got 'sgd', expected adamw or radam"),
        ({"backend": "cuda"}, "optim.backend: got 'cuda', expected auto, fused, reference, apex"),
        ({"clip_norm": -1.0}, "optim.clip_norm: got -1.0, expected a number above 0, or None"),
        ({"clip_norm": float("nan")}, "optim.clip_norm: got nan"),
    ],
)
def test_arguments_it_cannot_take_are_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Optimizer(weights(torch.float32), **arguments)


def test_nothing_to_train():
    frozen = [weight.requires_grad_(False) for weight in weights(torch.float32)]
    with pytest.raises(ValueError, match=r"optim\.backend: got 'fused', .* because no parameter requires a gradient"):
        Optimizer(frozen, backend="fused")
    assert Optimizer(frozen, backend="auto").backend == "reference"


def test_a_refused_group_is_not_added():
    optimizer = Optimizer(weights(torch.float32))
    with pytest.raises(ValueError, match=r"param_groups\[1\]\.amsgrad: got True, expected False"):
        optimizer.add_param_group({"params": weights(torch.float32), "amsgrad": True})
    assert len(optimizer.param_groups) == 1


def test_clipping_is_torchs():
    ours, theirs = weights(torch.float64), weights(torch.float64)
    optimizer, other = Optimizer(ours, clip_norm=0.5), torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.0)
    for a, b in zip(ours, theirs, strict=True):
        a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    optimizer.step()
    other.step()
    torch.testing.assert_close(optimizer.grad_norm, norm)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_step_is_skipped(bad):
    net = network()
    ema = Ema(EmaConfig(decay=0.5), net)
    optimizer = Optimizer(net.parameters(), skip_nonfinite=True, averages=[ema])
    before = net.weight.detach().clone()
    net.weight.grad, net.bias.grad = torch.ones(2, 3), torch.tensor([0.0, bad])
    optimizer.step()
    assert torch.equal(net.weight, before)
    assert torch.equal(ema.network.weight, before)
    assert not optimizer.state_dict()["state"][0]["step"]
    assert (optimizer.finished, optimizer.skipped) == (1, 1)


def test_norm_of_tiny_and_huge_gradients():
    net = network()
    optimizer = Optimizer(net.parameters())
    for scale in (1e-15, 1e17):
        net.weight.grad = torch.full((2, 3), scale)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(6**0.5 * scale, rel=1e-6)


def test_norm_of_a_large_tensor_is_exact():
    """A sum of a million squares in float32 would be off by 1e-4."""
    weight = torch.nn.Parameter(torch.zeros(1_000_003))
    weight.grad = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    optimizer = Optimizer([weight])
    exact = weight.grad.double().norm().item()
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(exact, rel=1e-7)


def test_step_moves_averages_and_shadows():
    net = network()
    shadow = net.weight.detach().bfloat16()
    configs = [EmaConfig(decay=0.5), EmaConfig(decay=0.9, every=2)]
    averages, alone = ([Ema(config, net) for config in configs] for _ in range(2))
    optimizer = Optimizer(net.parameters(), lr=0.1, averages=averages, shadows={net.weight: shadow})
    for step in range(3):
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        for ema in alone:
            ema.update(step)
        assert torch.equal(shadow, net.weight.detach().bfloat16())
    for a, b in zip(averages, alone, strict=True):
        assert torch.equal(a.network.weight, b.network.weight)
    assert not torch.equal(averages[0].network.weight, averages[1].network.weight)
    with torch.no_grad():
        net.weight.fill_(3.0)
    optimizer.refresh_shadows()
    assert (shadow == 3).all()
    optimizer.zero_grad()
    assert net.weight.grad is None


def test_averages_of_other_weights_are_refused():
    with pytest.raises(ValueError, match="averages: got a weight that is no parameter of this optimizer"):
        Optimizer(network().parameters(), averages=[Ema(EmaConfig(), network())])


FAKE_APEX = """
import torch
class FusedAdam(torch.optim.Optimizer):
    '''The part of apex's interface that is used: a step per group, moments in the state.'''
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    raise AssertionError("the moments are not shared")
                m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
                b1, b2 = group["betas"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                d = (v / (1 - b2 ** group["step"])).sqrt() + group["eps"]
                p.sub_(group["lr"] / (1 - b1 ** group["step"]) * m / d)
"""


@pytest.fixture
def fake_apex(tmp_path, monkeypatch):
    package = tmp_path / "apex" / "optimizers"
    package.mkdir(parents=True)
    (tmp_path / "apex" / "__init__.py").write_text("")
    (package / "__init__.py").write_text(FAKE_APEX)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def test_apex_over_the_same_state(fake_apex):
    ours, theirs = weights(torch.float32), weights(torch.float32)
    optimizers = [
        Optimizer(params, lr=1e-2, weight_decay=0.1, clip_norm=1.0, backend=backend)
        for params, backend in ((ours, "apex"), (theirs, "reference"))
    ]
    for step in range(5):
        for params, optimizer in zip((ours, theirs), optimizers, strict=True):
            for param in params:
                param.grad = torch.full_like(param, 1.0 + step)
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    torch.testing.assert_close(states[0], states[1])
    ours[0].grad = None
    optimizers[0].step()
    ours[0].grad = torch.ones_like(ours[0])
    with pytest.raises(ValueError, match=r"after \[5, 6\] steps"):
        optimizers[0].step()


def test_apex_with_groups_of_one_shape(fake_apex):
    """Which compare as equal, tensor by tensor; the last one comes later."""
    both = []
    for backend in ("apex", "reference"):
        params = [nn.Parameter(torch.ones(3)) for _ in range(3)]
        groups = [{"params": [params[0]], "weight_decay": 0.1}, {"params": [params[1]], "weight_decay": 0.0}]
        optimizer = Optimizer(groups, lr=1e-2, backend=backend)
        for step in range(4):
            if step == 2:
                optimizer.add_param_group({"params": [params[2]], "lr": 1e-1})
            for param in params:
                param.grad = torch.full_like(param, 1.0 + step)
            optimizer.step()
        both.append(params)
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def test_apex_absent_or_broken():
    """Whatever this machine has: none, another package of that name, or one that cannot be constructed."""
    finding = doctor.run_check("NVIDIA apex", doctor.check_apex)
    if finding.status == "works":
        pytest.skip("NVIDIA apex works here")
    with pytest.raises(ValueError, match=rf"optim\.backend: got 'apex', which is {finding.status} here"):
        Optimizer(weights(torch.float32), backend="apex")
    with pytest.raises(ValueError, match="RAdam"):
        Optimizer(weights(torch.float32), name="radam", backend="apex")
