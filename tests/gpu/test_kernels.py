"""The fused kernels on a GPU: every op in every precision against float64, and what only a GPU can show."""

import copy

import pytest
import torch
from kernel_cases import (
    EMPTY,
    SMALL,
    Case,
    activation_cases,
    assert_as_precise,
    attention_cases,
    check_step,
    norm_cases,
    parametrize,
    point_cases,
)

from soflow import kernels
from soflow.kernels import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PRODUCTION = [
    *norm_cases(16, 64, 768),
    *norm_cases(4, 256, 1024),
    *norm_cases(4, 256, 1152),
    *activation_cases(4, 64, 3072),
    *attention_cases(4, 64, 12, 64),
    *attention_cases(2, 256, 4, 64),
    *attention_cases(2, 256, 4, 72),
    *attention_cases(1, 1000, 2, 128),
    *point_cases(16, 4, 4, 32, 32),
]


def check(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, "cuda")
    ours, eager = (case.call(ops, inputs) for ops in (kernels, reference))
    exact = case.call(reference, [x.double() for x in inputs])
    for results in zip(ours, eager, exact, strict=True):
        for a, b, c in zip(*results, strict=True):
            assert_as_precise(a, b, c, case.roundings)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@parametrize([*SMALL, *PRODUCTION])
def test_as_precise_as_eager(case, dtype):
    check(case, dtype)


@parametrize([case for case in attention_cases(4, 256, 12, 64) + attention_cases(2, 1000, 2, 72) if case.gradients])
def test_attention_of_many_tokens(case, monkeypatch):
    """Ours, also where PyTorch's is used."""
    monkeypatch.setattr(kernels.self_attention, "attention_is_fused", lambda T, head_dim: True)
    for dtype in DTYPES:
        check(case, dtype)


@parametrize([case for case in attention_cases(1, 67, 1, 20) if case.gradients])
def test_attention_of_more_tokens_than_a_block(case, monkeypatch):
    """The kernels of many tokens at a size that compute-sanitizer can watch."""
    monkeypatch.setattr(kernels.self_attention, "attention_is_fused", lambda T, head_dim: True)
    check(case, torch.float32)


@parametrize([*norm_cases(2, 3, 24, torch.bfloat16), *norm_cases(4, 256, 1152, torch.bfloat16)])
def test_bf16_branch_of_a_float32_stream(case):
    check(case, torch.bfloat16)


@parametrize(EMPTY)
def test_empty_batch(case):
    ours, theirs = (case.call(ops, case.inputs(torch.float32, "cuda")) for ops in (kernels, reference))
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]], strict=True):
        torch.testing.assert_close(a, b)


@parametrize(PRODUCTION)
def test_the_same_bits_again(case):
    inputs = case.inputs(torch.bfloat16, "cuda")
    first, second = case.call(kernels, inputs), case.call(kernels, inputs)
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", ["uniform", "normal"])
def test_random_numbers_are_those_of_the_reference(op):
    seed, step, sample = torch.tensor(2**40 + 5), torch.tensor(7), torch.arange(512)
    ours = getattr(kernels, op)(seed.cuda(), step.cuda(), 3, sample.cuda(), 4096)
    theirs = getattr(reference, op)(seed, step, 3, sample, 4096)
    torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=4e-6)


def test_draw_is_that_of_the_reference_however_split():
    mean, std = torch.randn(2, 64, 4, 32, 32, device="cuda")
    keys = (torch.tensor(9).cuda(), torch.tensor(4).cuda(), torch.arange(64).cuda())
    ours, theirs = (ops.draw(mean, std, *keys) for ops in (kernels, reference))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
    part = kernels.draw(mean[40:], std[40:], *keys[:2], keys[2][40:])
    assert all(torch.equal(a, b[40:]) for a, b in zip(part, ours, strict=True))


@parametrize([case for case in SMALL if case.shape in ((2, 3, 24), (5, 2, 3, 7), (2, 3, 2, 4))])
def test_opcheck(case):
    """Schema, fake tensors and autograd registration of every op behind the public function."""
    inputs = case.inputs(torch.float32, "cuda")
    leaves = [x.requires_grad_(i in case.gradients) for i, x in enumerate(inputs)]
    with _checked_ops():
        outputs = getattr(kernels, case.op)(*leaves, *case.constants)
        if case.gradients:
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.grad(
                [out.sum() for out in outputs if out.requires_grad], [leaves[i] for i in case.gradients]
            )


class _checked_ops(torch.utils._python_dispatch.TorchDispatchMode):
    """Runs opcheck on every soflow op that is called while it is active."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "soflow":
            copies = copy.deepcopy([x.detach() if isinstance(x, torch.Tensor) else x for x in args])
            torch.library.opcheck(function, tuple(copies), test_utils=("test_schema", "test_faketensor"))
        return function(*args, **(kwargs or {}))


@parametrize([case for case in PRODUCTION if case.gradients])
def test_compiles_as_one_graph(case):
    torch._dynamo.reset()
    inputs = [x.requires_grad_(i in case.gradients) for i, x in enumerate(case.inputs(torch.float32, "cuda"))]
    compiled = torch.compile(getattr(kernels, case.op), fullgraph=True)
    ours, theirs = (op(*inputs, *case.constants) for op in (compiled, getattr(kernels, case.op)))
    for a, b in zip(*(out if isinstance(out, tuple) else (out,) for out in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@parametrize(PRODUCTION)
def test_graph_capture(case):
    """A captured call, replayed on new numbers in the same memory, gives what a fresh call gives."""
    static = case.inputs(torch.float32, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            case.call(kernels, static)
    torch.cuda.current_stream().wait_stream(stream)
    leaves = [x.requires_grad_(i in case.gradients) for i, x in enumerate(static)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = getattr(kernels, case.op)(*leaves, *case.constants)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = ()
        if case.gradients:
            total = sum(out.sum() for out in outputs if out.requires_grad)
            gradients = torch.autograd.grad(total, [leaves[i] for i in case.gradients])
    fresh = case.inputs(torch.float32, "cuda", seed=5)
    with torch.no_grad():
        for buffer, value in zip(static, fresh, strict=True):
            buffer.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    leaves = [x.requires_grad_(i in case.gradients) for i, x in enumerate(fresh)]
    expected = getattr(kernels, case.op)(*leaves, *case.constants)
    expected = expected if isinstance(expected, tuple) else (expected,)
    expected_gradients = ()
    if case.gradients:
        total = sum(out.sum() for out in expected if out.requires_grad)
        expected_gradients = torch.autograd.grad(total, [leaves[i] for i in case.gradients])
    for a, b in zip((*outputs, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.xdist_group("memory")
def test_more_rows_than_int32_elements():
    """Addresses are 64 bits wide: the last row lies beyond 2**31 elements."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free GPU memory")
    T, D = 2**17, 2**14 + 16
    x = torch.ones(1, T, D, device="cuda", dtype=torch.bfloat16)
    x[0, -1] = torch.arange(D, device="cuda") % 7
    rows = torch.zeros(1, D, device="cuda", dtype=torch.bfloat16)
    h = kernels.modulated_norm(x, rows, rows)[0, -1:]
    torch.testing.assert_close(h, reference.modulated_norm(x[:, -1:], rows, rows)[0])


@pytest.mark.parametrize("half", [None, torch.bfloat16])
def test_whole_step_is_as_precise_as_eager(half):
    check_step(kernels, "cuda", (16, 2, 4, 192, 3, 3, 10), half)
