"""The policy bf16: which weights a step computes with, and that training with them is training of the float32 ones."""

import copy
import dataclasses
import json
import re

import pytest
import tiny
import torch

from soflow import Batch, Objective, SolutionFlow, middle_time
from soflow.distributed import Processes
from soflow.models import DiT, UNet
from soflow.precision import working_copy
from soflow.trainer import Trainer

SHAPE = (8, 2, 3, 32, 2, 2, 10)
UNET = {
    "img_resolution": 8,
    "in_channels": 3,
    "out_channels": 3,
    "augment_dim": 0,
    "model_channels": 16,
    "channel_mult": [1, 2],
    "channel_mult_emb": 2,
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.0,
    "embedding_type": "positional",
    "channel_mult_noise": 1,
    "resample_filter": [1, 3, 3, 1],
}


def random_batch(seed: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x_0, x_1 = torch.randn(2, 8, 3, 8, 8, generator=generator)
    t, s = torch.rand(2, 8, generator=generator).sort(0, descending=True).values
    return Batch(x_0, x_1, t, middle_time(t, s, 0.002), s, None, torch.zeros(8, dtype=torch.bool), num_velocity=4)


@pytest.fixture(params=["DiT", "UNet"])
def network(request):
    torch.manual_seed(0)
    made = DiT(*SHAPE) if request.param == "DiT" else UNet(**UNET)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_float32_is_the_network_itself(network, precision):
    assert working_copy(network, precision) == (network, {})


def test_blocks_are_copies_in_bfloat16_and_the_rest_is_shared(network):
    working, shadows = working_copy(network, "bf16")
    inside = {id(p) for module in network.bf16_modules() for p in module.parameters()}
    for ours, master in zip(working.parameters(), network.parameters(), strict=True):
        assert master.dtype == torch.float32
        if id(master) in inside:
            assert ours.dtype == torch.bfloat16
            assert shadows[master] is ours
            assert torch.equal(ours, master.bfloat16())
        else:
            assert ours is master
    assert len(shadows) == len(inside) > 0.5 * len(list(network.parameters()))


def test_bf16_is_for_the_blocks_alone(network):
    """Not for what embeds times and labels, nor for the first and the last layer."""
    blocks = r"blocks\." if isinstance(network, DiT) else r"(enc|dec)\.\d+x\d+_(block\d+|down|up|in\d+)\."
    working, _ = working_copy(network, "bf16")
    for name, parameter in working.named_parameters():
        assert parameter.dtype == (torch.bfloat16 if re.match(blocks, name) else torch.float32), name


def test_a_frozen_weight_has_a_frozen_shadow(network):
    frozen, *others = (p for module in network.bf16_modules() for p in module.parameters())
    frozen.requires_grad_(False)
    _, shadows = working_copy(network, "bf16")
    assert not shadows[frozen].requires_grad
    assert all(shadows[master].requires_grad for master in others)


def test_losses_and_gradients_are_those_of_float32_to_bf16_rounding(network):
    working, shadows = working_copy(network, "bf16")
    objective, batch = Objective(), random_batch()
    exact = objective(SolutionFlow(network), batch)
    exact.loss.backward()
    ours = objective(SolutionFlow(working), batch)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    expected = {name: p.grad.clone() for name, p in parameters.items()}
    network.zero_grad()
    ours.loss.backward()
    assert ours.loss.dtype == torch.float32
    torch.testing.assert_close(ours.velocity_mse, exact.velocity_mse, rtol=0.02, atol=0)
    torch.testing.assert_close(ours.consistency_mse, exact.consistency_mse, rtol=0.02, atol=0)
    gradients = {name: shadows.get(p, p).grad for name, p in parameters.items()}
    assert all(
        gradient.dtype == shadows.get(parameters[name], parameters[name]).dtype for name, gradient in gradients.items()
    )
    total = torch.cat([g.flatten() for g in expected.values()]).norm()
    apart = torch.cat([(gradients[name].float() - g).flatten() for name, g in expected.items()]).norm()
    assert apart < 0.03 * total


def test_gradients_of_eight_parts_are_summed_to_the_exactness_of_one(network):
    working, shadows = working_copy(network, "bf16")
    exact = copy.deepcopy(network).double()
    errors = []
    for part in range(8):
        batch = random_batch(part)
        Objective()(SolutionFlow(working), batch).loss.backward()
        wide = {name: value.double() for name, value in vars(batch).items() if name in ("x_0", "x_1", "t", "l", "s")}
        Objective()(SolutionFlow(exact), dataclasses.replace(batch, **wide)).loss.backward()
        pairs = [
            (shadows[p].grad, q.grad)
            for p, q in zip(network.parameters(), exact.parameters(), strict=True)
            if p in shadows
        ]
        apart, whole = (torch.cat([g.double().flatten() for g in column]) for column in zip(*pairs, strict=True))
        errors.append(((apart - whole).norm() / whole.norm()).item())
    assert errors[-1] < 2 * errors[0] < 0.06


@pytest.mark.parametrize("r", [0.1, 0.002, 0.0003125])
def test_slope_is_as_exact_at_every_gap(network, r):
    """The error of dF is that of F; two evaluations in bf16 lose it as the gap closes."""
    exact = copy.deepcopy(network).double()
    working, _ = working_copy(network, "bf16")
    x, v = torch.randn(2, 4, 3, 8, 8)
    t, s = torch.full((4,), 0.6), torch.full((4,), 0.2)
    dt = (s - t) * r
    dx = v * dt[:, None, None, None]
    with torch.no_grad():
        F_t, dF = working.forward_difference(x, dx, t, dt, s)
        two_pass = working(x + dx, t + dt, s) - working(x, t, s)
        true_F, true_dF = exact.forward_difference(*(c.double() for c in (x, dx, t, dt, s)))
    errors = [((ours - true).norm() / true.norm()).item() for ours, true in ((F_t, true_F), (dF, true_dF))]
    assert errors[0] < 0.01
    assert errors[1] < (2 if isinstance(network, DiT) else 3) * errors[0]
    if r < 0.01:
        assert (two_pass - true_dF).norm() > 10 * errors[1] * true_dF.norm()


def test_training_moves_the_float32_weights_and_resumes_to_the_bit(tmp_path):
    def run(folder, until=None):
        config = tiny.config(tmp_path / folder, "engine.precision=bf16")
        trainer = Trainer(config, Processes(0, 1, torch.device("cpu")))
        trainer.fit(until)
        return trainer

    whole = run("whole")
    run("parts", until=3)
    resumed = run("parts")
    for trainer in (whole, resumed):
        assert all(p.dtype == torch.float32 for p in trainer.flow.network.parameters())
        assert len(trainer.optimizer.shadows) > 0
        assert all(torch.equal(shadow, master.bfloat16()) for master, shadow in trainer.optimizer.shadows.items())
    for ours, theirs in zip(resumed.flow.parameters(), whole.flow.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    lines = [(trainer.folder.path / "metrics.jsonl").read_text().splitlines() for trainer in (whole, resumed)]
    losses = [[json.loads(line)["loss/total"] for line in part] for part in lines]
    assert losses[0] == losses[1]
