"""One table of (op, shapes): what tests/test_kernels.py interprets on the CPU and tests/gpu/ runs on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from soflow import Batch, Objective, SolutionFlow, middle_time
from soflow.kernels import reference
from soflow.models import DiT

Make = Callable[[torch.Generator], list[Tensor]]


def randn(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(*shape, generator=generator, dtype=torch.float64)


def chunks(num: int, B: int, D: int) -> Callable[[torch.Generator], list[Tensor]]:
    """`num` modulations (B, D) that are chunks of one tensor, as the network makes them."""
    return lambda generator: list(randn(B, num * D)(generator).chunk(num, dim=1))


@dataclass(frozen=True)
class Case:
    """An op at a shape: float inputs in order, constants after them, and the inputs that a gradient flows to."""

    op: str
    shape: tuple[int, ...]
    make: Make
    constants: tuple[Any, ...] = ()
    gradients: tuple[int, ...] = ()
    # inputs that stay in float32 whatever the dtype under test: times, coefficients
    float32: tuple[int, ...] = ()
    # of float32, beyond twice eager's error: how large the exponents are, which are rounded before they are exponents
    roundings: int = 1

    def inputs(self, dtype: torch.dtype, device: str, seed: int = 0) -> list[Tensor]:
        """Inputs of `dtype`; in float64 they hold the same numbers as those of `dtype` rounded."""
        generator = torch.Generator().manual_seed(seed)
        return [
            x.to(torch.float32 if i in self.float32 else dtype).to(device) for i, x in enumerate(self.make(generator))
        ]

    def call(self, ops: ModuleType, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs, and the gradients of sum(output * w) for fixed random w."""
        leaves = [x.detach().requires_grad_(i in self.gradients) for i, x in enumerate(inputs)]
        exact = all(x.dtype == torch.float64 for x in inputs)
        constants = [c for c in self.constants if not (exact and isinstance(c, torch.dtype))]
        outputs = getattr(ops, self.op)(*leaves, *constants)
        outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
        if not self.gradients:
            return outputs, []
        generator = torch.Generator().manual_seed(1)
        carriers = [out for out in outputs if out.requires_grad]
        weights = [
            torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype).to(out.device)
            for out in carriers
        ]
        gradients = torch.autograd.grad(carriers, [leaves[i] for i in self.gradients], weights)
        return [out.detach() for out in outputs], list(gradients)


def flat(*makers: Callable[[torch.Generator], Tensor | list[Tensor]]) -> Make:
    def make(generator: torch.Generator) -> list[Tensor]:
        inputs: list[Tensor] = []
        for maker in makers:
            made = maker(generator)
            inputs += made if isinstance(made, list) else [made]
        return inputs

    return make


def small(make: Callable[[torch.Generator], Any], size: float = 1e-3) -> Callable[[torch.Generator], Any]:
    """The same, a thousand times smaller: a difference.  size: or of another size."""

    def scaled(generator: torch.Generator) -> Any:
        made = make(generator)
        return [x * size for x in made] if isinstance(made, list) else made * size

    return scaled


def norm_cases(B: int, T: int, D: int, branch: torch.dtype | None = None) -> list[Case]:
    """With `branch` only what enters or leaves a branch has that dtype; residual stream and modulations are float32."""
    x, shape = randn(B, T, D), (B, T, D)
    dx, constants = small(x), (1e-6,) if branch is None else (1e-6, branch)

    def case(op: str, make: Make, num_inputs: int, of_branch: tuple[int, ...], gradients: tuple[int, ...] = ()) -> Case:
        float32 = () if branch is None else tuple(i for i in range(num_inputs) if i not in of_branch)
        return Case(op, shape, make, constants, gradients, float32)

    moved_norm = flat(x, dx, chunks(1, B, D), small(chunks(2, B, D)))
    moved_gate = flat(x, chunks(1, B, D), x, chunks(1, B, D), dx, dx, small(chunks(3, B, D)))
    return [
        case("modulated_norm", flat(x, chunks(2, B, D)), 3, (), (0, 1, 2)),
        case("modulated_norm_difference", moved_norm, 5, ()),
        case("gate_residual_norm", flat(x, x, chunks(3, B, D)), 5, (1,), (0, 1, 2, 3, 4)),
        case("gate_residual_norm_difference", moved_gate, 9, (0, 5)),
    ]


def activation_cases(*shape: int) -> list[Case]:
    x, bias = randn(*shape), randn(shape[-1])
    return [
        Case("gelu", shape, flat(x, bias), (), (0, 1)),
        Case("gelu_difference", shape, flat(x, small(x), bias)),
        Case("silu", shape, flat(x), (), (0,)),
        Case("silu_difference", shape, flat(x, small(x))),
    ]


def attention_cases(B: int, T: int, num_heads: int, head_dim: int) -> list[Case]:
    qkv = randn(B, T, 3 * num_heads * head_dim)
    shape = (B, T, num_heads, head_dim)
    return [
        # the gradient of a score is the difference of two sums: of one token 0, but for the order they are rounded in
        Case("attention", shape, flat(qkv), (num_heads,), (0,), roundings=4),
        Case("attention_difference", shape, flat(qkv, small(qkv)), (num_heads,)),
    ]


def large_difference_case(B: int, T: int, num_heads: int, head_dim: int, size: float = 1.0) -> Case:
    """Scores that move by hundreds, beyond what an exponential holds: other keys are attended to.

    size: of qkv; 12 takes scores of hundreds, whose probabilities are 0 or 1, to others like them.
    """
    qkv = randn(B, T, 3 * num_heads * head_dim)
    make = flat(small(qkv, size), small(qkv, 30.0))
    return Case("attention_difference", (B, T, num_heads, head_dim), make, (num_heads,), roundings=256)


def large_activation_cases(size: float, *shape: int) -> list[Case]:
    """Differences as large as the activations themselves, or larger."""
    x, bias = randn(*shape), randn(shape[-1])
    return [
        Case("gelu_difference", shape, flat(x, small(x, size), bias)),
        Case("silu_difference", shape, flat(x, small(x, size))),
    ]


def point_cases(B: int, M: int, *image: int) -> list[Case]:
    x, rows, shape = randn(B, *image), randn(B), (B, M, *image)

    def loss_rows(generator: torch.Generator) -> list[Tensor]:
        return [randn(B, 4)(generator), randn(B)(generator).abs() + 0.1, randn(B)(generator)]

    return [
        Case("interpolate", shape, flat(x, x, *(rows,) * 4), float32=(2, 3, 4, 5)),
        Case("look_ahead", shape, flat(x, x, randn(M, *image), rows, rows, randn(M)), float32=(3, 4, 5)),
        Case(
            "solution_loss",
            shape,
            flat(x, randn(M, *image), x, x, loss_rows),
            (0.75, 0.01),
            (0,),
            float32=(4, 5, 6),
        ),
    ]


# odd sizes, one row, widths around the tuning table's steps
SMALL = [
    *norm_cases(2, 3, 24),
    *norm_cases(1, 1, 8),
    *norm_cases(3, 5, 100),
    *norm_cases(2, 2, 520),
    *activation_cases(2, 3, 24),
    *activation_cases(1, 1),
    *activation_cases(131, 7),
    *activation_cases(5, 515),
    *large_activation_cases(1.0, 4, 600),
    *large_activation_cases(10.0, 4, 600),
    *attention_cases(2, 3, 2, 4),
    *attention_cases(1, 1, 1, 8),
    *attention_cases(2, 16, 2, 16),
    *attention_cases(1, 67, 1, 20),
    *attention_cases(2, 20, 1, 40),
    *attention_cases(1, 130, 2, 72),
    large_difference_case(2, 20, 2, 16),
    large_difference_case(1, 67, 1, 20),
    large_difference_case(1, 20, 1, 16, 12.0),
    *point_cases(5, 2, 3, 7),
    *point_cases(1, 1, 1),
    *point_cases(3, 1),
    *point_cases(3, 3, 2, 5, 5),
    *point_cases(3, 0, 2, 5, 5),
    *point_cases(2, 1, 2053),
]
EMPTY = [*norm_cases(0, 3, 8), *attention_cases(0, 3, 2, 4), *activation_cases(0, 8), *point_cases(0, 0, 2, 2)]


def parametrize(cases: list[Case]) -> pytest.MarkDecorator:
    """Mark a test to run for every case."""
    return pytest.mark.parametrize("case", cases, ids=_name)


def _name(case: Case) -> str:
    dtypes = [f"-{c}".replace("torch.", "") for c in case.constants if isinstance(c, torch.dtype)]
    return f"{case.op}-{'x'.join(map(str, case.shape))}{''.join(dtypes)}"


def assert_as_precise(ours: Tensor, eager: Tensor, exact: Tensor, roundings: int = 1) -> None:
    """err(ours) <= 2 err(eager, same dtype) + eps max|exact|, all against float64; nothing unwritten (NaN).

    roundings: of float32, so many eps; at least 4 on a GPU, whose exp2 and division are off by two each.
    """
    assert ours.shape == exact.shape
    assert ours.dtype == eager.dtype
    assert torch.isfinite(ours).all(), "an element was not written, or is not finite"
    if not exact.numel():
        return
    error, eager_error = ((x.double() - exact).abs().max() for x in (ours, eager))
    units = max(roundings, 4 if ours.is_cuda else 1) if ours.dtype == torch.float32 else 1
    assert error <= 2 * eager_error + units * torch.finfo(ours.dtype).eps * exact.abs().max()


def check_step(ops: ModuleType, device: str, shape: tuple[int, ...], half: torch.dtype | None = None) -> None:
    """Loss and every gradient of a whole step on DiT(*shape): fused against eager, both against float64.

    half: dtype of the blocks' weights, as the precision bf16 has them.
    """
    torch.manual_seed(0)
    input_size, _, channels, *_, num_classes = shape
    exact_network = DiT(*shape).double()
    with torch.no_grad():
        for parameter in exact_network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    t, s = torch.rand(2, 8).sort(0, descending=True).values
    x_0, x_1 = torch.randn(2, 8, channels, input_size, input_size)
    labels = torch.arange(8) % num_classes
    tensors = {"x_0": x_0, "x_1": x_1, "t": t, "l": middle_time(t, s, 0.002), "s": s}
    tensors |= {"labels": labels, "null_mask": labels % 4 == 1}

    def run(ops: ModuleType, dtype: torch.dtype) -> list[Tensor]:
        network = DiT(*shape, ops=ops).to(device, dtype)
        network.load_state_dict(exact_network.state_dict())
        if half is not None and dtype == torch.float32:
            for module in network.bf16_modules():
                module.to(half)
        moved = {name: (v.to(dtype) if v.is_floating_point() else v).to(device) for name, v in tensors.items()}
        objective = Objective(3.0, 0.8, 0.25, ops=ops)
        loss = objective(SolutionFlow(network), Batch(**moved, num_velocity=4)).loss
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    results = run(ops, torch.float32), run(reference, torch.float32), run(reference, torch.float64)
    for ours, eager, exact in zip(*results, strict=True):
        assert_as_precise(ours, eager, exact)
