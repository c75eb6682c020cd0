"""The fused kernels, run by Triton's interpreter on the CPU: forward and every gradient against float64."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from kernel_cases import (
    EMPTY,
    SMALL,
    Case,
    assert_as_precise,
    check_step,
    chunks,
    flat,
    norm_cases,
    parametrize,
    point_cases,
    randn,
    small,
)
from torch._subclasses import FakeTensorMode

triton = pytest.importorskip("triton", reason="needs Triton")

import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from bench import resources  # noqa: E402
from soflow import kernels  # noqa: E402
from soflow.kernels import (  # noqa: E402
    attention_pair,
    library,
    math,
    point,
    reference,
)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The fused ops with every registered op replaced by its launcher, which the interpreter runs on CPU tensors."""
    assert isinstance(kernels.activation._gelu_fwd_kernel, InterpretedFunction)
    for module in resources.MODULES:
        for name, launcher in list(vars(module).items()):
            if name.startswith("_launch_"):
                monkeypatch.setattr(module, name.removeprefix("_launch"), launcher)
    # also for the tokens that are left to PyTorch
    monkeypatch.setattr(kernels.self_attention, "attention_is_fused", lambda T, head_dim: True)
    return kernels


def check(case: Case, ops: ModuleType, inputs: list[torch.Tensor]) -> None:
    results = [case.call(ops, inputs), case.call(reference, inputs)]
    exact = case.call(reference, [x.double() for x in inputs])
    for ours, eager, true in zip(*results, exact, strict=True):
        for a, b, c in zip(ours, eager, true, strict=True):
            assert_as_precise(a, b, c, case.roundings)


@parametrize(SMALL)
def test_as_precise_as_eager(case, interpreted):
    check(case, interpreted, case.inputs(torch.float32, "cpu"))


@parametrize([case for case in SMALL if case.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_points_in_half_precision(case, dtype, interpreted):
    check(case, interpreted, case.inputs(dtype, "cpu"))


@parametrize(EMPTY)
def test_empty_batch(case, interpreted):
    outputs, gradients = case.call(interpreted, case.inputs(torch.float32, "cpu"))
    expected, expected_gradients = case.call(reference, case.inputs(torch.float32, "cpu"))
    for ours, theirs in zip([*outputs, *gradients], [*expected, *expected_gradients], strict=True):
        torch.testing.assert_close(ours, theirs)


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, every other one in memory, and the first dimension the fastest."""
    return torch.stack((x, x), -1).transpose(0, -2).contiguous().transpose(0, -2)[..., 0]


@parametrize([case for case in SMALL if case.shape in ((2, 3, 24), (5, 2, 3, 7), (2, 3, 2, 4))])
def test_layout_does_not_matter(case, interpreted):
    """Inputs with gaps and in another order, and a gradient expanded from one number."""
    inputs = [spread(x) for x in case.inputs(torch.float32, "cpu")]
    assert not any(x.is_contiguous() for x in inputs if x.numel() > 1)
    check(case, interpreted, inputs)
    if case.gradients:
        grads = []
        for ops in (interpreted, reference):
            leaves = [x.clone().requires_grad_(i in case.gradients) for i, x in enumerate(inputs)]
            out = getattr(ops, case.op)(*leaves, *case.constants)
            (out[0] if isinstance(out, tuple) else out).sum().backward()
            grads.append([leaves[i].grad for i in case.gradients])
        for ours, theirs in zip(*grads, strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@parametrize([case for case in SMALL if case.shape in ((3, 5, 100), (131, 7), (5, 2, 3, 7), (1, 130, 2, 72))])
def test_the_same_bits_again(case, interpreted):
    first, second = (case.call(interpreted, case.inputs(torch.float32, "cpu")) for _ in range(2))
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("head_dim", "widths"),
    [
        (1, (16, 0)),
        (16, (16, 0)),
        (20, (32, 0)),
        (40, (32, 16)),
        (64, (64, 0)),
        (72, (64, 16)),
        (81, (64, 32)),
        (96, (64, 32)),
        (97, (128, 0)),
        (128, (128, 0)),
    ],
)
def test_a_head_lies_in_few_and_in_powers_of_two(head_dim, widths):
    assert kernels.tuning.head_widths(head_dim) == widths


@pytest.mark.parametrize("B", [1, 3])
def test_partial_sums_over_slabs(B, interpreted, monkeypatch):
    """A small batch cuts its tokens into slabs, also where they do not divide evenly."""
    assert kernels.tuning.num_slabs(B, 13) == 8
    for case in norm_cases(B, 13, 16):
        check(case, interpreted, case.inputs(torch.float32, "cpu"))


def test_norm_of_rows_far_from_zero(interpreted):
    """Of the differences from their mean: that of the squares from its square would cancel."""
    case = norm_cases(2, 3, 24)[0]
    x, *modulation = case.inputs(torch.float32, "cpu")
    inputs = [x + 100.0, *modulation]
    (ours,), _ = case.call(interpreted, inputs)
    (exact,), _ = case.call(reference, [y.double() for y in inputs])
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-4)


def test_attention_of_large_scores(interpreted):
    """Of hundreds, whose exponentials float32 does not hold."""
    case = Case("attention", (1, 20, 1, 16), flat(small(randn(1, 20, 3 * 16), 12.0)), (1,), (0,), roundings=256)
    check(case, interpreted, case.inputs(torch.float32, "cpu"))


@pytest.mark.parametrize(("p", "eps"), [(0.75, 0.001), (1.0, 0.01), (0.5, 0.1)])
def test_loss_is_weighted_by_the_p_and_eps_it_is_given(p, eps, interpreted):
    case = next(case for case in point_cases(5, 2, 3, 7) if case.op == "solution_loss")
    check(dataclasses.replace(case, constants=(p, eps)), interpreted, case.inputs(torch.float32, "cpu"))


def test_loss_sums_more_rows_than_a_block(interpreted, monkeypatch):
    monkeypatch.setattr(kernels.loss, "BLOCK_B", 2)
    case = next(case for case in point_cases(5, 2, 3) if case.op == "solution_loss")
    check(case, interpreted, case.inputs(torch.float32, "cpu"))


def test_look_ahead_without_conditional_rows(interpreted):
    generator = torch.Generator().manual_seed(0)
    v_t, v_uncond = torch.randn(2, 5, 3, 4, generator=generator)
    guidance, dt = torch.randn(5, generator=generator), torch.randn(2, generator=generator)
    ours, theirs = (
        ops.look_ahead(v_t, v_uncond, None, guidance, torch.ones(5), dt) for ops in (interpreted, reference)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num", [1, 3, 4, 37, 1030])
@pytest.mark.parametrize("op", ["uniform", "normal"])
def test_random_numbers_are_those_of_the_reference(op, num, interpreted):
    seed, step, sample = torch.tensor(2**40 + 5), torch.tensor(2**17 + 7), torch.tensor([0, 3, 2**31, 11])
    ours, theirs = (getattr(ops, op)(seed, step, 3, sample, num) for ops in (interpreted, reference))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


@pytest.mark.parametrize("has_std", [True, False])
def test_draw_is_that_of_the_reference_however_split(has_std, interpreted):
    generator = torch.Generator().manual_seed(0)
    mean, std = torch.randn(2, 6, 2, 3, 200, generator=generator)
    assert mean[0].numel() > 4 * kernels.point.BLOCK_WORDS, "more than one program per sample"
    keys = torch.tensor(9), torch.tensor(2**17 + 7), torch.arange(6)
    arguments = (mean, std if has_std else None, *keys)
    ours, theirs = (ops.draw(*arguments) for ops in (interpreted, reference))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=4e-6)
    part = interpreted.draw(mean[4:], std[4:] if has_std else None, *keys[:2], keys[2][4:])
    assert all(torch.equal(a, b[4:]) for a, b in zip(part, ours, strict=True))


@pytest.mark.parametrize("has_std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_draws_are_float32_whatever_the_moments(dtype, has_std, interpreted):
    mean, std = randn(2, 6, 2, 3)(torch.Generator().manual_seed(0)).to(dtype)
    keys = torch.tensor(9), torch.tensor(4), torch.arange(6)
    exact = reference.draw(mean.float(), std.float() if has_std else None, *keys)
    for ops in (interpreted, reference):
        for a, b in zip(ops.draw(mean, std if has_std else None, *keys), exact, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=0, atol=4e-6)


@pytest.mark.parametrize("half", [None, torch.float16])
def test_whole_step_is_as_precise_as_eager(half, interpreted):
    check_step(interpreted, "cpu", (4, 2, 2, 24, 2, 2, 5), half)


@parametrize([*norm_cases(2, 3, 24), *norm_cases(3, 5, 100, torch.float16)])
def test_float16_is_rounded_once(case, interpreted):
    check(case, interpreted, case.inputs(torch.float16, "cpu"))


def test_norm_of_the_residual_stream_as_stored(interpreted):
    """Backward, and the other evaluation, see the rounded stream alone."""
    x, y, dx, dy = (randn(2, 3, 24)(torch.Generator().manual_seed(i)).half() for i in range(4))
    gate, shift, scale, dgate, dshift, dscale = chunks(6, 2, 24)(torch.Generator().manual_seed(4))
    modulation = gate.half(), shift.half(), scale.half()
    z, h = interpreted.gate_residual_norm(x, y, *modulation, 1e-6, torch.float32)
    assert torch.equal(h, interpreted.modulated_norm(z, *modulation[1:], 1e-6, torch.float32))
    moved = dgate.half(), dshift.half(), dscale.half()
    dz, dh = interpreted.gate_residual_norm_difference(
        y, modulation[0], z, modulation[2], dx, dy, *moved, 1e-6, torch.float32
    )
    assert torch.equal(dh, interpreted.modulated_norm_difference(z, dz, modulation[2], *moved[1:], 1e-6, torch.float32))


@pytest.mark.parametrize("size", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("T", [64, 100])
def test_small_differences_of_attention_in_float16(T, size, interpreted):
    """Probabilities of a difference lie below what float16 holds: they enter their product scaled."""
    qkv = randn(1, T, 3 * 64)
    case = Case("attention_difference", (1, T, 1, 64), flat(qkv, small(qkv, size)), (1,))
    check(case, interpreted, case.inputs(torch.float16, "cpu"))


# --------------------------------------------------------------------------------------------------
# Functions of the kernels

N = 4096
LN_2 = math.LN_2.value


@triton.jit
def _math_kernel(x_ptr, dx_ptr, out_ptr, N: tl.constexpr, WHAT: tl.constexpr):
    cols = tl.arange(0, N)
    x, dx = tl.load(x_ptr + cols), tl.load(dx_ptr + cols)
    if WHAT == "exp2m1":
        a, b = math.exp2m1(x), x
    elif WHAT == "log1p":
        a, b = math.log1p(x), x
    elif WHAT == "sigmoid":
        a, b = math.sigmoid(x), x
    elif WHAT == "sigmoid_derivative":
        a, b = math.sigmoid_derivative(x)
    else:
        a, b = math.sigmoid_difference(x, dx)
    tl.store(out_ptr + cols, a)
    tl.store(out_ptr + N + cols, b)


def computed(what: str, x: torch.Tensor, dx: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    out = torch.empty(2, N)
    _math_kernel[(1,)](x, x if dx is None else dx, out, N=N, WHAT=what)
    first, second = out.double()
    return first, second


def numbers(size: float, seed: int = 0) -> torch.Tensor:
    return size * torch.randn(N, generator=torch.Generator().manual_seed(seed))


def assert_relative(
    ours: torch.Tensor, exact: torch.Tensor, units: float = 4, least: float = torch.finfo(torch.float32).tiny
) -> None:
    """Every element to within `units` roundings of itself, or to `least`."""
    error = (ours - exact).abs()
    assert (error <= units * torch.finfo(torch.float32).eps * exact.abs() + least).all()


@pytest.mark.parametrize("size", [1e-6, 1e-3, 0.1, 0.5, 1.0, 5.0])
def test_exp2m1_and_log1p_are_precise_relative_to_themselves(size):
    x = numbers(size)
    assert_relative(computed("exp2m1", x)[0], torch.expm1(LN_2 * x.double()))
    x = x.clamp(-0.5, 0.5)
    assert_relative(computed("log1p", x)[0], torch.log1p(x.double()))


@pytest.mark.parametrize("size", [1e-3, 1.0, 10.0])
def test_sigmoid_and_its_derivative(size):
    x = numbers(size)
    exact = torch.sigmoid(LN_2 * x.double())
    assert_relative(computed("sigmoid", x)[0], exact)
    s, ds = computed("sigmoid_derivative", x)
    assert_relative(s, exact)
    assert_relative(ds, exact * torch.sigmoid(-LN_2 * x.double()), 8)


@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("size", [1.0, 10.0])
def test_sigmoid_difference_is_precise_relative_to_itself(size, gap):
    x, dx = numbers(size), numbers(gap, 1)
    moved, difference = computed("sigmoid_difference", x, dx)
    x, dx = LN_2 * x.double(), LN_2 * dx.double()
    # sigmoid(x + dx) - sigmoid(x), where nothing cancels
    exact = torch.sinh(dx / 2) / (2 * torch.cosh(x / 2) * torch.cosh((x + dx) / 2))
    # the sum x + dx is rounded: a relative error of its own size in the exponentials
    units = 4 + 2 * (size + gap) * 4
    assert_relative(moved, torch.sigmoid(x + dx), units, least=2**-63)
    assert_relative(difference, exact, units, least=2**-63)


def test_far_out_sigmoids_stay_finite():
    """Where exp2 overflows: the numbers are 0 or 1, the differences and derivatives of them no NaN."""
    x = torch.tensor([-1e4, -200.0, -127.0, -64.0, 64.0, 127.0, 200.0, 1e4]).repeat(N)[:N]
    far = (x > 0).double()
    for what in ("sigmoid", "sigmoid_derivative"):
        torch.testing.assert_close(computed(what, x)[0], far, rtol=0, atol=2**-63)
    assert computed("sigmoid_derivative", x)[1].abs().max() < 2**-63
    for dx in (-x, -2 * x, torch.zeros(N), torch.full((N,), 1e-3)):
        moved, difference = computed("sigmoid_difference", x, dx)
        expected = torch.sigmoid(LN_2 * (x.double() + dx.double()))
        torch.testing.assert_close(moved, expected, rtol=1e-6, atol=2**-63)
        torch.testing.assert_close(difference, expected - torch.sigmoid(LN_2 * x.double()), rtol=1e-6, atol=2**-63)


# --------------------------------------------------------------------------------------------------
# The bindings, on the CPU


@parametrize([case for case in SMALL if case.shape in ((2, 3, 24), (5, 2, 3, 7), (2, 16, 2, 16))])
def test_cpu_tensors_take_the_reference(case):
    """Also its gradient: the CPU implementations of the backward ops are checked against autograd of the reference."""
    inputs = case.inputs(torch.float64, "cpu")
    ours, theirs = case.call(kernels, inputs), case.call(reference, inputs)
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def op_arguments(name: str) -> tuple:
    """Sample arguments for the op `name`, by its schema: names mean shapes."""
    B, T, D, M = 3, 5, 8, 2
    generator = torch.Generator().manual_seed(0)
    shapes = {
        **dict.fromkeys(("x", "y", "z", "dx", "dy", "dz", "dh"), (B, T, D)),
        **dict.fromkeys(("gate", "shift", "scale", "dgate", "dshift", "dscale"), (B, D)),
        **dict.fromkeys(("mean", "rstd"), (B, T)),
        **dict.fromkeys(("F_t", "v", "v_t", "v_uncond", "x_0", "x_1"), (B, T, D)),
        **dict.fromkeys(("dF", "v_cond"), (M, T, D)),
        **dict.fromkeys(("alpha_t", "beta_t", "dalpha_t", "dbeta_t", "guidance", "mix"), (B,)),
        **dict.fromkeys(("weight_scale", "gradient_factor"), (B,)),
        **dict.fromkeys(("qkv", "dqkv"), (B, T, 3 * D)),
        **dict.fromkeys(("o", "do"), (B, T, D)),
        "lse": (B, 2, T),
        "bias": (D,),
        "dt": (M,),
        "residual_coefficients": (B, 4),
    }
    numbers = {"eps": 1e-6, "p": 0.75, "stream": 3, "num": 6, "num_heads": 2, "dtype": None}
    if name == "draw":
        shapes |= {"mean": (B, T, D), "std": (B, T, D)}
    arguments = []
    for argument in getattr(torch.ops.soflow, name).default._schema.arguments:
        if argument.name in numbers:
            arguments.append(numbers[argument.name])
        elif argument.name in ("seed", "step", "sample"):
            arguments.append(torch.arange(B))
        else:
            arguments.append(torch.rand(shapes[argument.name], generator=generator) + 0.1)
    return tuple(arguments)


OPS = (
    "attention_bwd",
    "attention_difference",
    "attention_fwd",
    "draw",
    "gate_residual_norm_bwd",
    "gate_residual_norm_difference",
    "gate_residual_norm_fwd",
    "gelu_bwd",
    "gelu_difference",
    "gelu_fwd",
    "interpolate",
    "look_ahead",
    "modulated_norm_bwd",
    "modulated_norm_difference",
    "modulated_norm_fwd",
    "normal",
    "silu_bwd",
    "silu_difference",
    "silu_fwd",
    "solution_loss",
    "uniform",
)


@pytest.mark.parametrize("layout", [torch.clone, spread])
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name, layout):
    arguments = [layout(x) if isinstance(x, torch.Tensor) else x for x in op_arguments(name)]
    torch.library.opcheck(
        getattr(torch.ops.soflow, name).default, tuple(arguments), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_opcheck_of_other_moments(dtype):
    mean, std, *keys = op_arguments("draw")
    op = torch.ops.soflow.draw.default
    torch.library.opcheck(op, (mean.to(dtype), std.to(dtype), *keys), test_utils=("test_schema", "test_faketensor"))


def test_every_op_is_checked():
    defined = {key.partition("::")[2] for key in library.library._op_defs}
    assert defined == set(OPS)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for GPUs, of which the first is current: what is made current, and "end" when it is left."""
    events: list[str] = []

    @contextmanager
    def device(target: torch.device) -> Iterator[None]:
        events.append(str(target))
        yield
        events.append("end")

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    return events


@pytest.mark.parametrize(("index", "expected"), [(0, ["launch"]), (1, ["cuda:1", "launch", "end"])])
def test_the_device_of_the_tensors_is_current(index, expected, devices):
    """Triton launches on the current device; where that is the right one already nothing is changed."""
    with FakeTensorMode():
        x = torch.empty(3, device=f"cuda:{index}")
    launch = library.on_its_device(lambda *arguments: devices.append("launch") or arguments)
    assert launch(2, x, None) == (2, x, None)
    assert devices == expected


@pytest.mark.parametrize("name", OPS)
def test_every_launch_is_on_the_device_of_its_tensors(name, devices):
    op = getattr(torch.ops.soflow, name).default
    op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *op_arguments(name))
    assert devices == ["cpu", "end"]


@parametrize([case for case in SMALL if case.shape in ((2, 3, 24), (5, 2, 3, 7), (2, 3, 2, 4)) and case.gradients])
def test_compiles_as_one_graph(case):
    torch._dynamo.reset()
    compiled = torch.compile(getattr(kernels, case.op), fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_(i in case.gradients) for i, x in enumerate(case.inputs(torch.float32, "cpu"))]
    ours, theirs = (op(*inputs, *case.constants) for op in (compiled, getattr(kernels, case.op)))
    for a, b in zip(*(out if isinstance(out, tuple) else (out,) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


BAD_ARGUMENTS = [
    ("gelu", {"bias": torch.zeros(5)}, r"gelu: bias: got shape \(5,\), expected \(24,\)"),
    ("gelu", {"x": torch.zeros(())}, r"gelu: x: got shape \(\), expected \(\.\.\., D\)"),
    ("gelu_difference", {"dx": torch.zeros(2, 24)}, r"gelu_difference: dx: got shape \(2, 24\)"),
    ("silu", {"x": torch.zeros(3, dtype=torch.int32)}, r"silu: x: got torch\.int32, expected torch\.float32 or"),
    ("silu_difference", {"dx": torch.zeros(2, 3, 24, device="meta")}, "silu_difference: dx: got a tensor on meta"),
    ("modulated_norm", {"x": torch.zeros(2, 24)}, r"modulated_norm: x: got shape \(2, 24\), expected \(B, T, D\)"),
    (
        "modulated_norm",
        {"scale": torch.zeros(1, 24)},
        r"modulated_norm: scale: got shape \(1, 24\), expected \(2, 24\)",
    ),
    ("modulated_norm_difference", {"dshift": torch.zeros(2, 3)}, "modulated_norm_difference: dshift: got shape"),
    ("gate_residual_norm", {"y": torch.zeros(2, 4, 24)}, "gate_residual_norm: y: got shape"),
    ("gate_residual_norm_difference", {"dgate": torch.zeros(24)}, "gate_residual_norm_difference: dgate: got shape"),
    ("attention", {"num_heads": 5}, "attention: num_heads: got 5, expected a divisor of 24 / 3"),
    ("attention", {"qkv": torch.zeros(2, 24)}, r"attention: qkv: got shape \(2, 24\), expected \(B, T, 3 H d\)"),
    ("attention_difference", {"num_heads": 5}, "num_heads: got 5, expected a divisor of 24 / 3"),
    ("attention_difference", {"qkv": torch.zeros(2, 24)}, r"qkv: got shape \(2, 24\), expected \(B, T, 3 H d\)"),
    ("gelu", {"x": torch.zeros(2, 0)}, r"gelu: x: got shape \(2, 0\), expected at least one number per row"),
    ("modulated_norm", {"x": torch.zeros(2, 3, 0)}, r"modulated_norm: x: got shape .*, expected at least one number"),
    ("attention", {"qkv": torch.zeros(2, 3, 0)}, r"attention: qkv: got shape .*, expected at least one number per row"),
    ("interpolate", {"x_0": torch.zeros(())}, r"interpolate: x_0: got shape \(\), expected \(B, \.\.\.\)"),
    ("look_ahead", {"v_t": torch.zeros(())}, r"look_ahead: v_t: got shape \(\), expected \(B, \.\.\.\)"),
    ("solution_loss", {"F_t": torch.zeros(())}, r"solution_loss: F_t: got shape \(\), expected \(B, \.\.\.\)"),
    ("solution_loss", {"F_t": torch.zeros(5, 0)}, r"solution_loss: F_t: got shape \(5, 0\), expected at least one"),
    ("interpolate", {"beta_t": torch.zeros(1)}, r"interpolate: beta_t: got shape \(1,\), expected \(5,\)"),
    ("look_ahead", {"dt": torch.zeros(9)}, "look_ahead: dt: got 9 rows, expected at most 5"),
    (
        "look_ahead",
        {"v_cond": torch.zeros(3, 3, 7)},
        r"look_ahead: v_cond: got shape \(3, 3, 7\), expected \(2, 3, 7\)",
    ),
    ("solution_loss", {"dF": torch.zeros(6, 3, 7)}, "solution_loss: dF: got shape .*expected at most 5 rows"),
    ("solution_loss", {"residual_coefficients": torch.zeros(5, 3)}, "residual_coefficients: got shape"),
]


@pytest.mark.parametrize(("op", "change", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(op, change, message):
    case = next(case for case in SMALL if case.op == op)
    function = getattr(kernels, op)
    names = list(inspect.signature(function).parameters)
    arguments = dict(zip(names, [*case.inputs(torch.float32, "cpu"), *case.constants], strict=False))
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 2, dtype=torch.int64)}, r"normal: sample: got shape \(2, 2\), expected \(B,\)"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, r"normal: seed: got shape \(2,\), expected \(\) or \(3,\)"),
        ({"step": torch.tensor(1.0)}, r"normal: step: got torch\.float32, expected torch\.int64"),
        ({"seed": torch.tensor(1.0).double()}, r"normal: seed: got torch\.float64, expected torch\.int64"),
    ],
)
def test_bad_keys_are_named(change, message):
    keys = {"seed": torch.tensor(1), "step": torch.tensor(2), "sample": torch.arange(3)}
    with pytest.raises(ValueError, match=message):
        kernels.normal(**{**keys, **change}, stream=3, num=4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("attention_fwd", "attention: samples: got 65536, expected at most 65535"),
        ("attention_bwd", "attention: samples: got 65536"),
        ("attention_difference", "attention_difference: samples: got 65536"),
        ("modulated_norm_bwd", "modulated_norm: samples of a gradient: got 65536"),
        ("gate_residual_norm_bwd", "gate_residual_norm: samples of a gradient: got 65536"),
    ],
)
def test_more_samples_than_a_grid_holds_are_refused(name, message):
    """Where they are its second or third axis, which CUDA holds to 16 bits."""
    launch = next(vars(module)[f"_launch_{name}"] for module in resources.MODULES if f"_launch_{name}" in vars(module))
    arguments = [
        torch.empty(65536, *x.shape[1:], device="meta") if isinstance(x, torch.Tensor) else x
        for x in op_arguments(name)
    ]
    with pytest.raises(ValueError, match=message):
        launch(*arguments)
    library.check_grid("attention", "samples", 65535)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("uniform", "uniform: blocks of a row: got 131072, expected at most 65535"),
        ("normal", "normal: blocks of a row: got 131072"),
        ("draw", "draw: blocks of a row: got 131072"),
        ("interpolate", "interpolate: blocks of a row: got 131072"),
        ("look_ahead", "look_ahead: blocks of a row: got 131072"),
    ],
)
def test_longer_rows_than_a_grid_holds_are_refused(name, message):
    num = 2**27
    arguments = [
        torch.empty(*x.shape[:1], *(num,) * (x.dim() > 1), device="meta") if isinstance(x, torch.Tensor) else num
        for x in op_arguments(name)
    ]
    with pytest.raises(ValueError, match=message):
        vars(point)[f"_launch_{name}"](*arguments)


def test_gelu_of_a_vector_has_gradients_too():
    x, bias, dy = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    grads = []
    for ops in (kernels, reference):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        grads.append(torch.autograd.grad(ops.gelu(*leaves), leaves, dy))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_bias_gradient_of_gelu_sums_what_was_not_rounded():
    x, dy = randn(2, 4096, 8)(torch.Generator().manual_seed(0)).bfloat16()
    bias, exact = torch.zeros(8, requires_grad=True), torch.zeros(8, dtype=torch.float64, requires_grad=True)
    kernels.gelu(x, bias).backward(dy)
    reference.gelu(x.double(), exact).backward(dy.double())
    torch.testing.assert_close(bias.grad.double(), exact.grad, rtol=1e-5, atol=1e-3)


def test_every_modulation_of_a_difference_has_strides_of_its_own(interpreted):
    generator = torch.Generator().manual_seed(0)
    y, z, dx, dy = randn(4, 3, 4, 16)(generator).float()
    gate, scale, *moved = (randn(3, width * 16)(generator).float()[:, :16] for width in range(1, 6))
    for name, *arguments in (
        ("modulated_norm_difference", z, dx, scale, *moved[1:]),
        ("gate_residual_norm_difference", y, gate, z, scale, dx, dy, *moved),
    ):
        ours, theirs = (getattr(ops, name)(*arguments, 1e-6, torch.float32) for ops in (interpreted, reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_row_may_move_to_a_constant_one(interpreted):
    """Whose variance is 0, of which rounding leaves less."""
    x = 10.0 * torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(4, 64)
    expected = -reference.modulated_norm(x, zeros, zeros)
    for ops in (interpreted, reference):
        found = ops.modulated_norm_difference(x, -x, zeros, zeros, zeros)
        torch.testing.assert_close(found, expected, rtol=0, atol=0.01)


# --------------------------------------------------------------------------------------------------
# Compiled for GPUs that are not here


@pytest.mark.slow
def test_every_kernel_compiles_without_spills():
    """For sm_80, sm_90 and sm_100, at every production shape. In a process of its own: this one interprets."""
    command = [sys.executable, "-m", "bench.resources", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(result.stdout)
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    defined = {
        name for module in resources.MODULES for name in vars(module) if name.endswith("_kernel") and name[0] == "_"
    }
    assert {row["kernel"] for row in rows} == defined
    assert {name for row in rows for name in row["shape"].split(", ")} == {
        *resources.SHAPES,
        *(f"{name} float32" for name in resources.FLOAT32_SHAPES),
        "latents 4x32x32",
        resources.FEW_NUMBERS,
    }
    assert all({"kernel", "shape", "arch", "registers", "shared", "spills"} <= row.keys() for row in rows)
    assert all(row["narrow"] < row["moved"] for row in rows if row["shape"] != resources.FEW_NUMBERS)


def test_every_kernel_compiles_for_sizes_of_one():
    """Triton takes an argument of 1 for a constant, which has none of a tensor's methods."""
    code = """if True:
        from bench import resources
        with resources.recorded_launches() as launches:
            resources.launch_network(1, 1, 1, batch_size=1, num_consistency=1)
            resources.launch_point((1,), batch_size=1, num_consistency=1)
        for launch in launches:
            print(launch.kernel.__name__, resources.compile_launch(launch, 90)["registers"])
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "_solution_loss_kernel" in result.stdout


def test_accesses_are_read_off_the_code():
    ptx = """
        @%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.v2.b32 { %r5, %r6 }, [ %rd2 + 0 ];
        ld.volatile.global.b32 %r7, [ %rd3 ];
        ld.shared.b32 %r8, [global_smem];
        @%p1 st.global.b16 [ %rd4 + 0 ], { %rs1 };
        cp.async.cg.shared.global [ %r9 + 0 ], [ %rd5 + 0 ], 0x10, %r10;
        cp.async.ca.shared.global [ %r9 + 0 ], [ %rd5 + 0 ], 0x4, %r10;
        cp.async.commit_group;
    """
    assert resources.access_sizes(ptx) == [16, 8, 4, 2, 16, 4]


def test_a_kernel_that_lost_its_alignment_is_refused():
    row = resources.Resources("k", "DiT-B/4", "sm_90", 4, 40, 100, 0, 0, 0, moved=120, narrow=40)
    assert resources.failures([row]) == ["k, DiT-B/4, sm_90: narrow 40, expected at most 30"]


def test_layout_does_not_matter_to_a_draw(interpreted):
    """As the means and standard deviations of latents are parts of one tensor, and each row has keys of its own."""
    mean, std = torch.randn(2, 5, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    keys = torch.arange(3, 8), torch.arange(9, 14), torch.tensor([4, 0, 2, 3, 1])
    expected = reference.draw(mean, std, *keys)
    for layout in (torch.clone, spread):
        apart = [torch.stack((key, key), 1)[:, 0] if layout is spread else key for key in keys]
        for a, b in zip(interpreted.draw(layout(mean), layout(std), *apart), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=4e-6)


def test_heads_too_wide_for_the_kernel_take_the_reference(monkeypatch):
    monkeypatch.setattr(attention_pair, "_attention_difference", lambda *args: pytest.fail("launched"))
    qkv, dqkv = torch.randn(2, 1, 5, 3 * 2 * 129, generator=torch.Generator().manual_seed(0))
    expected = reference.attention_difference(qkv, dqkv, 2)
    assert torch.equal(kernels.attention_difference(qkv, dqkv, 2), expected)


@pytest.mark.parametrize(("name", "value", "allowed"), [("spills", 4, 0), ("shared", 166913, 166912)])
def test_a_kernel_that_needs_too_much_is_refused(name, value, allowed):
    fits = resources.Resources("k", "DiT-B/4", "sm_80", 4, 40, 100, 166912, 0, 512, moved=120, narrow=0)
    assert resources.failures([fits]) == []
    bad = dataclasses.replace(fits, **{name: value})
    assert resources.failures([bad]) == [f"k, DiT-B/4, sm_80: {name} {value}, expected at most {allowed}"]
