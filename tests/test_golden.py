"""The numbers of the official implementation, from tests/golden/."""

import golden_vectors
import pytest
import torch
from torch import Tensor

from soflow import Batch, Objective, SolutionFlow, gap_ratio, middle_time, sample
from soflow.config import EmaConfig, OptimConfig
from soflow.ema import Ema
from soflow.guidance import cfg_decay
from soflow.models import DIT_PRESETS, build_network
from soflow.optim import build_optimizer
from soflow.paths import path_coefficients, solution_coefficients
from soflow.precision import working_copy
from soflow.slope import LOOKAHEADS, slope

GAPS = ("0.1", "0.01", "0.002", "0.0003125")


def relative(ours: Tensor, golden: Tensor) -> float:
    """Largest difference over largest golden value."""
    return ((ours - golden).abs().max() / golden.abs().max()).item()


def norm_error(ours: Tensor, golden: Tensor) -> float:
    return ((ours.double() - golden.double()).norm() / golden.double().norm()).item()


def gradient_error(flow: SolutionFlow, arrays: dict[str, Tensor], prefix: str) -> float:
    """Largest error of a gradient's summary, relative to its norm."""
    errors = []
    for name, parameter in flow.network.named_parameters():
        if parameter.requires_grad:
            golden = arrays[f"{prefix}.{name}"]
            errors.append(((golden_vectors.summary(parameter.grad) - golden).abs().max() / golden[0]).item())
    return max(errors)


def objective_of(hyper: dict, lookahead: str) -> Objective:
    return Objective(
        cfg_scale=hyper["cfg_scale"],
        cfg_decay_time=hyper["cfg_decay_time"],
        mix_ratio=hyper["mix_ratio"],
        loss_p=hyper["p"],
        loss_eps=hyper["eps"],
        lookahead=lookahead,
    )


# --------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.parametrize("official", ["Linear", "Trig"])
def test_path_coefficients(official):
    arrays, _ = golden_vectors.load("schedules")
    ours = path_coefficients(official.lower(), arrays["t"])
    for name, value in zip(("alpha", "beta", "alpha_grad", "beta_grad"), ours, strict=True):
        torch.testing.assert_close(value, arrays[f"{official}.{name}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("official", ["Euler", "Trig"])
def test_solution_coefficients(official):
    arrays, _ = golden_vectors.load("schedules")
    a_ts, b_ts = solution_coefficients(official.lower(), arrays["t"], arrays["s"])
    torch.testing.assert_close(a_ts, arrays[f"{official}.a"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(b_ts, arrays[f"{official}.b"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("step", [0, 1, 250, 999, 1000])
@pytest.mark.parametrize(
    ("official", "method"),
    [("Const", "const"), ("Linear", "linear"), ("Cosine", "cosine"), ("Exponent", "exponential")],
)
def test_middle_time(official, method, step):
    arrays, meta = golden_vectors.load("schedules")
    r = gap_ratio(step, meta["total_steps"], meta["l_init_ratio"], meta["l_end_ratio"], method)
    clamped = torch.minimum(arrays[f"l.{official}.{step}"], arrays["t"] - 1e-4)
    torch.testing.assert_close(middle_time(arrays["t"], arrays["s"], r), clamped, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("decay_time", [0.5, 0.8, 1.0])
def test_cfg_decay(decay_time):
    arrays, _ = golden_vectors.load("schedules")
    torch.testing.assert_close(
        cfg_decay(arrays["t"], decay_time), arrays[f"cfg_decay.{decay_time}"], rtol=1e-6, atol=1e-6
    )


# --------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("name", ["losses_imagenet_recipe", "losses_trig", "losses_unconditional"])
def test_losses(name, lookahead):
    arrays, meta = golden_vectors.load(name)
    hyper, flow = meta["hyper"], golden_vectors.flow(meta)
    objective = objective_of(hyper, lookahead)
    labels = arrays["labels"] if hyper["use_labels"] else None
    assert relative(flow.solve(arrays["x_t"], arrays["t"], arrays["s"], labels), arrays["f_t_s"]) < 2e-6
    assert relative(flow.velocity(arrays["x_t"], arrays["t"], None), arrays["v_uncond"]) < 2e-6

    def run(t: Tensor, num_velocity: int):
        flow.zero_grad()
        batch = Batch(
            arrays["x_0"], arrays["x_1"], t, arrays["l"], arrays["s"], labels, arrays["cfg_mask"], num_velocity
        )
        out = objective(flow, batch)
        out.loss.backward()
        return out

    velocity = run(arrays["t_velocity"], num_velocity=8)
    for field in ("velocity_loss", "velocity_mse", "velocity_weight"):
        assert relative(getattr(velocity, field), arrays[field]) < 2e-5, field
    assert relative(velocity.loss, arrays["velocity_loss"]) < 2e-5
    assert gradient_error(flow, arrays, "grad_velocity") < 2e-5

    consistency = run(arrays["t"], num_velocity=0)
    for field in ("consistency_loss", "consistency_mse", "consistency_weight"):
        assert relative(getattr(consistency, field), arrays[field]) < 5e-4, field
    assert relative(consistency.loss, arrays["consistency_loss"]) < 5e-4
    assert gradient_error(flow, arrays, "grad_consistency") < 5e-4


def train_trajectory(lookahead: str, dtype: torch.dtype) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Five optimizer steps with EMA; every step's losses and gradient norm must be the golden ones."""
    arrays, meta = golden_vectors.load("trajectory_adamw")
    flow = golden_vectors.flow(meta, dtype)
    network = flow.network
    optim = OptimConfig(lr=meta["lr"], betas=tuple(meta["betas"]))
    optimizer = build_optimizer(optim, network.parameters())
    ema = Ema(EmaConfig(decay=meta["ema_decay"], every=meta["ema_every"]), network)
    objective = objective_of(meta["hyper"], lookahead)
    nv = int(meta["velocity_ratio"] * arrays["x_0"].shape[1])
    unused = torch.zeros(nv)
    for step in range(meta["steps"]):
        batch = Batch(
            arrays["x_0"][step].to(dtype),
            arrays["x_1"][step].to(dtype),
            torch.cat((arrays["t_velocity"][step], arrays["t"][step])).to(dtype),
            torch.cat((unused, arrays["l"][step])).to(dtype),
            torch.cat((unused, arrays["s"][step])).to(dtype),
            arrays["labels"][step],
            arrays["mask"][step],
            nv,
        )
        out = objective(flow, batch)
        optimizer.zero_grad()
        out.loss.backward()
        assert relative(out.velocity_loss, arrays["vl"][step]) < 1e-4
        assert relative(out.consistency_loss, arrays["cl"][step]) < 1e-4
        optimizer.step()
        assert relative(optimizer.grad_norm, arrays["grad_norm"][step]) < 1e-4
        ema.update(step)
    return network, ema.network


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
def test_trajectory(lookahead):
    """Final weights and averages within 1e-4 of the official run, and of the same run in float64."""
    arrays, _ = golden_vectors.load("trajectory_adamw")
    ours, exact = (train_trajectory(lookahead, dtype) for dtype in (torch.float32, torch.float64))
    for prefix, network, exact_network in zip(("final", "ema"), ours, exact, strict=True):
        exact_parameters = dict(exact_network.named_parameters())
        for name, parameter in network.named_parameters():
            golden, summary = arrays[f"{prefix}.{name}"], golden_vectors.summary(parameter)
            errors = (summary - golden).abs() / golden[0]
            assert errors[0] < 1e-4, (prefix, name)
            # The official float32 slopes move one projection by 1.3e-4 from the float64 run, and Adam amplifies them.
            assert errors[1] < 2e-4, (prefix, name)
            exact_summary = golden_vectors.summary(exact_parameters[name])
            # Key biases have no gradient but rounding, of which Adam makes whole steps: hence not 1e-6.
            assert (summary - exact_summary).abs().max() < 1e-4 * golden[0], (prefix, name)


# --------------------------------------------------------------------------------------------------
# Slopes


def slope_inputs(name: str, gap: str, dtype: torch.dtype) -> tuple[SolutionFlow, tuple[Tensor, ...], Tensor]:
    """The flow, (x_t, v, t, l, s) and the labels; a gap that is not stored gives l = t + (s - t) r."""
    arrays, meta = golden_vectors.load(name)
    t, s = arrays["t"], arrays["s"]
    l = arrays[f"l.{gap}"] if gap in GAPS else t + (s - t) * float(gap)
    values = tuple(value.to(dtype) for value in (arrays["x_t"], arrays["v"], t, l, s))
    return golden_vectors.flow(meta, dtype), values, arrays["labels"]


@pytest.mark.parametrize("lookahead", LOOKAHEADS)
@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("name", ["slope_euler", "slope_trig"])
def test_slope_in_float64(name, gap, lookahead):
    arrays, _ = golden_vectors.load(name)
    flow, values, labels = slope_inputs(name, gap, torch.float64)
    F_t, dF, q = slope(flow, *values, labels, lookahead=lookahead)
    assert norm_error(F_t, arrays["F_t"]) < 1e-12
    assert norm_error(dF, arrays[f"dF.{gap}"]) < 1e-9
    assert norm_error(q, arrays[f"q.{gap}"]) < 1e-9


@pytest.mark.parametrize("gap", [*GAPS, "0.000001"])
@pytest.mark.parametrize("name", ["slope_euler", "slope_trig"])
def test_slope_in_float32(name, gap):
    """Against float64 on the same float32 inputs: the precision of dF and q does not depend on the gap."""
    flow, values, labels = slope_inputs(name, gap, torch.float32)
    exact_flow, _, _ = slope_inputs(name, gap, torch.float64)
    _, dF, q = slope(flow, *values, labels)
    _, exact_dF, exact_q = slope(exact_flow, *(v.double() for v in values), labels)
    assert norm_error(dF, exact_dF) < 5e-6
    assert norm_error(q, exact_q) < 5e-6


@pytest.mark.parametrize("name", ["slope_euler", "slope_trig"])
def test_two_evaluations_lose_the_slope_in_float32(name):
    """What difference propagation is for: at r = 1e-6 the subtraction is off by more than 5 %."""
    flow, values, labels = slope_inputs(name, "0.000001", torch.float32)
    exact_flow, _, _ = slope_inputs(name, "0.000001", torch.float64)
    _, _, q = slope(flow, *values, labels, lookahead="two_pass")
    _, _, exact_q = slope(exact_flow, *(v.double() for v in values), labels)
    assert norm_error(q, exact_q) > 0.05


@pytest.mark.parametrize("gap", [*GAPS, "0.000001"])
@pytest.mark.parametrize("name", ["slope_euler", "slope_trig"])
def test_slope_in_bf16(name, gap):
    """Under the policy bf16 dF stays as precise as F itself, at every gap."""
    flow, values, labels = slope_inputs(name, gap, torch.float32)
    exact_flow, _, _ = slope_inputs(name, gap, torch.float64)
    flow.network, _ = working_copy(flow.network, "bf16")
    F_t, dF, q = slope(flow, *values, labels)
    exact_F, exact_dF, exact_q = slope(exact_flow, *(v.double() for v in values), labels)
    assert norm_error(F_t, exact_F) > 1e-4, "the products were not of bfloat16"
    assert norm_error(dF, exact_dF) < 2 * norm_error(F_t, exact_F)
    assert norm_error(q, exact_q) < 1e-2


# --------------------------------------------------------------------------------------------------
# Sampling and sizes


@pytest.mark.parametrize("name", ["sampler_nfe1", "sampler_nfe2"])
def test_sampler(name):
    arrays, meta = golden_vectors.load(name)
    flow = golden_vectors.flow(meta)
    images = sample(
        flow, arrays["labels"], tuple(arrays["x_1"].shape), meta["nfe"], arrays["x_1"], list(arrays["renoise"])
    )
    assert relative(images, arrays["samples"]) < 1e-5


@pytest.mark.parametrize("name", DIT_PRESETS)
def test_official_sizes(name):
    official = golden_vectors.official_models()[name.replace("/", "-")]
    with torch.device("meta"):
        network = build_network(name)
    assert sum(p.numel() for p in network.parameters()) == official["parameters"]
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == official["trainable"]
    ours = {key: list(value.shape) for key, value in network.state_dict().items()}
    for key, shape in official["state_dict"].items():
        assert ours.pop(key) == shape, key
    # The official listing holds one block.
    assert {key.split(".")[0] for key in ours} == {"blocks"}
