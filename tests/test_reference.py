"""The specification against mathematics: float64 formulas retyped, gradcheck, exact differences."""

import math

import pytest
import torch
from torch import Tensor

from soflow.kernels import reference

B, T, D, HEADS = 3, 5, 12, 3


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --------------------------------------------------------------------------------------------------
# Random numbers


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The known-answer vectors that Philox was published with."""
    result = reference.philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in result) == words


def test_uniform_lies_strictly_between_0_and_1():
    words = torch.tensor([0, 0xFFFFFFFF])
    assert (((words >> 9).float() + 0.5) * 2.0**-23).tolist() == [2.0**-24, 1.0 - 2.0**-24]
    numbers = reference.uniform(torch.tensor(1), torch.tensor(2), 3, torch.arange(200), 501)
    assert numbers.shape == (200, 501)
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert numbers.mean() == pytest.approx(0.5, abs=4 / math.sqrt(12 * 100200))


def test_normal_moments():
    numbers = reference.normal(torch.tensor(1), torch.tensor(2), 3, torch.arange(200), 1001).double()
    count = numbers.numel()
    assert numbers.shape == (200, 1001)
    assert numbers.mean() == pytest.approx(0, abs=4 / math.sqrt(count))
    assert numbers.var() == pytest.approx(1, abs=4 * math.sqrt(2 / count))
    assert (numbers**4).mean() == pytest.approx(3, abs=4 * math.sqrt(96 / count))
    # neighbours: the two of a Box-Muller pair, and of two pairs
    for shift in (1, 2, 4):
        assert (numbers[:, shift:] * numbers[:, :-shift]).mean() == pytest.approx(0, abs=4 / math.sqrt(count))


def test_more_numbers_begin_with_the_same():
    few, many = (reference.normal(torch.tensor(1), torch.tensor(2), 3, torch.arange(4), n) for n in (5, 64))
    assert torch.equal(few, many[:, :5])


def test_empty_batch_draws_nothing():
    empty = torch.arange(0)
    assert reference.normal(torch.tensor(1), torch.tensor(2), 3, empty, 8).shape == (0, 8)
    x_0, x_1 = reference.draw(torch.zeros(0, 1, 2, 2), None, empty, empty, empty)
    assert x_0.shape == x_1.shape == (0, 1, 2, 2)


# --------------------------------------------------------------------------------------------------
# Forward, against formulas retyped in float64


def test_time_features():
    t = rand(B).abs()
    features = reference.time_features(t, 8)
    for i in range(4):
        angle = t * 10000.0 ** (-i / 4)
        torch.testing.assert_close(features[:, i], angle.cos())
        torch.testing.assert_close(features[:, 4 + i], angle.sin())


def test_gelu():
    x, bias = rand(B, T, D), rand(D, seed=1)
    y = x + bias
    expected = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    torch.testing.assert_close(reference.gelu(x, bias), expected)


def test_modulated_norm():
    x, shift, scale = rand(B, T, D), rand(B, D, seed=1), rand(B, D, seed=2)
    for b in range(B):
        for t in range(T):
            row = x[b, t]
            normed = (row - row.mean()) / ((row - row.mean()).square().mean() + 1e-6).sqrt()
            expected = normed * (1 + scale[b]) + shift[b]
            torch.testing.assert_close(reference.modulated_norm(x, shift, scale)[b, t], expected)


def test_gate_residual_norm():
    x, y, gate, shift, scale = rand(B, T, D), rand(B, T, D, seed=1), *(rand(B, D, seed=i) for i in (2, 3, 4))
    z, h = reference.gate_residual_norm(x, y, gate, shift, scale)
    torch.testing.assert_close(z, x + gate.unsqueeze(1) * y)
    torch.testing.assert_close(h, reference.modulated_norm(z, shift, scale))


def test_attention():
    qkv = rand(B, T, 3 * D)
    out = reference.attention(qkv, HEADS)
    d = D // HEADS
    for b in range(B):
        for head in range(HEADS):
            q, k, v = (qkv[b, :, part * D + head * d : part * D + (head + 1) * d] for part in range(3))
            scores = q @ k.T / math.sqrt(d)
            weights = scores.exp() / scores.exp().sum(1, keepdim=True)
            torch.testing.assert_close(out[b, :, head * d : (head + 1) * d], weights @ v)


def test_gradient_of_attention_is_packed_by_one_copy():
    qkv = rand(B, T, 3 * D, seed=3, dtype=torch.float32).requires_grad_()
    out = reference.attention(qkv, HEADS)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.backward(torch.ones_like(out))
    calls = {row.key: row.count for row in profile.key_averages()}
    assert calls["aten::stack"] == 1
    assert "aten::clone" not in calls


def test_linear_computes_in_the_dtype_of_its_weight():
    x, weight, bias = rand(B, T, D).float(), rand(7, D, seed=1).float(), rand(7, seed=2).float()
    torch.testing.assert_close(reference.linear(x, weight, bias), x @ weight.T + bias)
    coarse = reference.linear(x, weight.bfloat16(), bias)
    assert coarse.dtype == torch.float32
    expected = (x.bfloat16().double() @ weight.bfloat16().double().T).bfloat16().float() + bias
    torch.testing.assert_close(coarse, expected, rtol=1e-2, atol=2e-2)
    assert not torch.equal(coarse, reference.linear(x, weight, bias))


def test_interpolate_and_solution_map():
    x, y = rand(B, 2, 3), rand(B, 2, 3, seed=1)
    c = [rand(B, seed=i) for i in range(2, 6)]
    x_t, v_t = reference.interpolate(x, y, *c)
    for b in range(B):
        torch.testing.assert_close(x_t[b], c[0][b] * x[b] + c[1][b] * y[b])
        torch.testing.assert_close(v_t[b], c[2][b] * x[b] + c[3][b] * y[b])
        torch.testing.assert_close(reference.solution_map(x, y, c[0], c[1])[b], x_t[b])


def test_look_ahead():
    v_t, v_uncond, v_cond = rand(4, 2, 3), rand(4, 2, 3, seed=1), rand(3, 2, 3, seed=2)
    guidance, mix, dt = torch.tensor([2.0, 0.0, 1.0, 0.5]).double(), torch.tensor([0.3, 1, 0.3, 0.3]).double(), rand(3)
    v, dx = reference.look_ahead(v_t, v_uncond, v_cond, guidance, mix, dt)
    guided = [v_t[b] + guidance[b] * (v_t[b] - v_uncond[b]) for b in range(4)]
    torch.testing.assert_close(v[0], guided[0])
    assert torch.equal(v[1], v_t[1]), "a row of the null mask takes the raw velocity"
    for b in (2, 3):
        torch.testing.assert_close(v[b], 0.3 * guided[b] + 0.7 * v_cond[b - 1])
    torch.testing.assert_close(dx, v[1:] * dt[:, None, None])
    without, _ = reference.look_ahead(v_t, v_uncond, None, guidance, torch.ones(4).double(), dt)
    torch.testing.assert_close(without, torch.stack(guided))


# --------------------------------------------------------------------------------------------------
# The loss


def loss_inputs(num_rows: int = 5, num_consistency: int = 3) -> list[Tensor]:
    shape = (num_rows, 2, 3)
    return [
        rand(*shape).requires_grad_(),
        rand(num_consistency, 2, 3, seed=1),
        rand(*shape, seed=2),
        rand(*shape, seed=3),
        rand(num_rows, 4, seed=4),
        rand(num_rows, seed=5).abs(),
        rand(num_rows, seed=6),
    ]


@pytest.mark.parametrize(("num_rows", "num_consistency"), [(5, 3), (5, 0), (5, 5), (1, 1)])
def test_solution_loss(num_rows, num_consistency):
    F_t, dF, x, v, c, scale, factor = inputs = loss_inputs(num_rows, num_consistency)
    p, eps, nv = 0.75, 0.01, num_rows - num_consistency
    loss, statistics = reference.solution_loss(*inputs, p, eps)
    loss.backward()
    rows = []
    for b in range(num_rows):
        residual = c[b, 0] * x[b] + c[b, 1] * v[b] + c[b, 2] * F_t[b]
        if b >= nv:
            residual = residual + c[b, 3] * dF[b - nv]
        residual = residual.detach()
        mse = residual.square().mean()
        weight = scale[b] * (mse + eps) ** -p
        value = mse if b < nv else factor[b] * (F_t[b].detach() * residual).mean()
        rows.append(torch.stack((weight * value, mse, weight)))
        torch.testing.assert_close(F_t.grad[b], factor[b] * weight * residual / (num_rows * residual.numel()))
    rows = torch.stack(rows)
    torch.testing.assert_close(loss.detach(), rows[:, 0].mean())
    for part, expected in zip(statistics, (rows[:nv], rows[nv:]), strict=True):
        torch.testing.assert_close(part, expected.mean(0) if len(expected) else torch.zeros(3).double())


def test_velocity_gradient_is_that_of_the_weighted_square():
    """With weight and target detached, and gradient_factor = 2 c_F, autograd of the formula gives the same."""
    F_t, dF, x, v, c, scale, _ = loss_inputs(4, 0)
    c = c * torch.tensor([0, 1, 1, 0])
    loss, _ = reference.solution_loss(F_t, dF, x, v, c, scale, 2 * c[:, 2], 1.0, 0.01)
    (ours,) = torch.autograd.grad(loss, F_t)
    square = (c[:, 1, None, None] * v + c[:, 2, None, None] * F_t).square().flatten(1).mean(1)
    (expected,) = torch.autograd.grad((scale / (square.detach() + 0.01) * square).mean(), F_t)
    torch.testing.assert_close(ours, expected)


# --------------------------------------------------------------------------------------------------
# Differences: exact against the subtraction in float64, and precise relative to themselves in float32

DIFFERENCES = {
    "time_features": (
        lambda t: reference.time_features(t, 16),
        lambda t, dt: reference.time_features_difference(t, dt, 16),
        [(B,)],
    ),
    "linear": (
        lambda x: reference.linear(x, rand(7, D, seed=9, dtype=x.dtype), rand(7, seed=8, dtype=x.dtype)),
        lambda x, dx: reference.linear_difference(dx, rand(7, D, seed=9, dtype=x.dtype)),
        [(B, T, D)],
    ),
    "silu": (reference.silu, reference.silu_difference, [(B, D)]),
    "gelu": (
        lambda x: reference.gelu(x, rand(D, seed=9, dtype=x.dtype)),
        lambda x, dx: reference.gelu_difference(x, dx, rand(D, seed=9, dtype=x.dtype)),
        [(B, T, D)],
    ),
    "attention": (
        lambda qkv: reference.attention(qkv, HEADS),
        lambda qkv, dqkv: reference.attention_difference(qkv, dqkv, HEADS),
        [(B, T, 3 * D)],
    ),
    "modulated_norm": (
        reference.modulated_norm,
        lambda x, shift, scale, dx, dshift, dscale: reference.modulated_norm_difference(x, dx, scale, dshift, dscale),
        [(B, T, D), (B, D), (B, D)],
    ),
    "gate_residual_norm": (
        lambda *inputs: torch.cat(reference.gate_residual_norm(*inputs)),
        lambda x, y, gate, shift, scale, dx, dy, dgate, dshift, dscale: torch.cat(
            reference.gate_residual_norm_difference(
                y, gate, x + gate[:, None] * y, scale, dx, dy, dgate, dshift, dscale
            )
        ),
        [(B, T, D), (B, T, D), (B, D), (B, D), (B, D)],
    ),
}


@pytest.mark.parametrize("op", DIFFERENCES)
def test_difference_is_exact(op):
    """For steps as large as the activations themselves: a finite difference, not a derivative."""
    forward, difference, shapes = DIFFERENCES[op]
    x = [rand(*shape, seed=i) for i, shape in enumerate(shapes)]
    d = [rand(*shape, seed=100 + i) for i, shape in enumerate(shapes)]
    moved = forward(*(a + b for a, b in zip(x, d, strict=True)))
    torch.testing.assert_close(difference(*x, *d), moved - forward(*x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-4, 1e-6, 1e-12])
@pytest.mark.parametrize("op", DIFFERENCES)
def test_difference_keeps_its_precision_at_any_gap(op, gap):
    """float32 against float64 on the same float32 inputs: relative to the difference itself."""
    _, difference, shapes = DIFFERENCES[op]
    x = [rand(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
    d = [gap * rand(*shape, seed=100 + i, dtype=torch.float32) for i, shape in enumerate(shapes)]
    exact = difference(*(a.double() for a in (*x, *d)))
    assert (difference(*x, *d) - exact).norm() < 5e-7 * exact.norm()


HALF = {
    "silu_difference": (reference.silu_difference, [(B, D)] * 2),
    "gelu_difference": (reference.gelu_difference, [(B, T, D)] * 2 + [(D,)]),
    "attention_difference": (lambda *inputs: reference.attention_difference(*inputs, HEADS), [(B, T, 3 * D)] * 2),
    "modulated_norm": (reference.modulated_norm, [(B, T, D)] + [(B, D)] * 2),
    "modulated_norm_difference": (reference.modulated_norm_difference, [(B, T, D)] * 2 + [(B, D)] * 3),
    "gate_residual": (
        lambda x, y, gate: reference.gate_residual_norm(x, y, gate, gate, gate)[0],
        [(B, T, D)] * 2 + [(B, D)],
    ),
    "gate_residual_difference": (
        lambda y, gate, z, scale, *moved: reference.gate_residual_norm_difference(y, gate, z, scale, *moved)[0],
        [(B, T, D), (B, D), (B, T, D), (B, D), (B, T, D), (B, T, D), (B, D), (B, D), (B, D)],
    ),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", HALF)
def test_half_precision_is_computed_in_float32(op, dtype):
    """The result is that of the same inputs in float32, rounded once."""
    compute, shapes = HALF[op]
    inputs = [rand(*shape, seed=i).to(dtype) for i, shape in enumerate(shapes)]
    found, wide = compute(*inputs), compute(*(x.float() for x in inputs))
    assert found.dtype == dtype
    assert torch.equal(found, wide.to(dtype))


@pytest.mark.parametrize("op", ["gelu", "silu", "attention", "modulated_norm"])
def test_difference_survives_extreme_values(op):
    """Saturated and tiny activations give finite differences, equal to the float64 ones."""
    forward, difference, shapes = DIFFERENCES[op]
    scales = (torch.arange(shapes[0][-1], dtype=torch.float64) % 5 - 2) * 8.0
    x = [rand(*shapes[0]) * 2.0 ** scales.clamp(max=5.0), *(rand(*shape, seed=i) for i, shape in enumerate(shapes[1:]))]
    d = [0.1 * rand(*shape, seed=100 + i) for i, shape in enumerate(shapes)]
    out = difference(*(a.float() for a in (*x, *d)))
    moved = forward(*(a + b for a, b in zip(x, d, strict=True)))
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.double(), moved - forward(*x), rtol=1e-3, atol=1e-4)


def test_forward_ops_differentiate():
    """gradcheck in float64 of every op that the gradient passes through."""
    x, y = rand(2, 3, 4).requires_grad_(), rand(2, 3, 4, seed=1).requires_grad_()
    rows = [rand(2, 4, seed=i).requires_grad_() for i in (2, 3, 4)]
    check = torch.autograd.gradcheck
    assert check(reference.gate_residual_norm, (x, y, *rows))
    assert check(reference.gelu, (x, rand(4, seed=5).requires_grad_()))
    assert check(reference.silu, (x,))
    assert check(lambda z: reference.attention(z, 2), (rand(2, 3, 12, seed=6).requires_grad_(),))
    assert check(reference.linear, (x, rand(5, 4, seed=7).requires_grad_(), rand(5, seed=8).requires_grad_()))
