"""What the fused update must do on any device: on a GPU, and with the kernels compiled for the host."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from soflow.config import EmaConfig
from soflow.ema import Ema
from soflow.optim import Optimizer

# none, one, a tail, one chunk less and more than full, odd dimensions, several chunks
SHAPES = ((0,), (1,), (3, 5, 7), (0, 4), (8191,), (8192,), (8193,), (129, 130), ())
GROUPS = (
    {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
    {"lr": 1e-2, "betas": (0.4, 0.999), "eps": 1e-6, "weight_decay": 0.0},
)
AVERAGES = (
    EmaConfig(decay=0.9),
    EmaConfig(decay=0.99, every=3, dtype="float64"),
    EmaConfig(sigma_rel=0.1),
)
SETTINGS = [
    {"name": "adamw"},
    {"name": "radam"},
    {"name": "adamw", "clip_norm": 1.0},
    {"name": "radam", "clip_norm": 1e-2, "skip_nonfinite": True},
    {"name": "adamw", "averages": ()},
    {"name": "adamw", "averages": (EmaConfig(decay=0.9999, every=16, dtype="float64"),)},
    {"name": "adamw", "shadows": "copies"},
    {"name": "adamw", "shadows": "gradients", "clip_norm": 1.0},
]
# each takes another way to the same address: apart, lest one hides another
KINDS = ("weights", "gradients", "exp_avg", "exp_avg_sq", "averages", "shadows")


def shifted(tensor: Tensor, index: int) -> Tensor:
    """A copy one to three elements behind where an allocation starts: at an address that suits no pack of four."""
    by = 1 + index % 3
    return torch.cat((tensor.new_zeros(by), tensor.detach().flatten()))[by:].view(tensor.shape)


class Model(nn.Module):
    """Parameters of all SHAPES, the last one frozen."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], device: str) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for index, shape in enumerate((*shapes, (4,))):
            value = torch.randn(shape, generator=generator).to(device)
            self.register_parameter(f"w{index}", nn.Parameter(value))
        self.get_parameter(f"w{len(shapes)}").requires_grad_(False)


class Setup:
    """A model with its averages, its shadows where asked for, and its optimizer. misaligned: one of KINDS, or none."""

    def __init__(
        self,
        backend: str,
        device: str,
        name: str = "adamw",
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        averages: Sequence[EmaConfig] = AVERAGES,
        shadows: str = "",
        misaligned: str = "",
        **settings: object,
    ) -> None:
        self.misaligned = misaligned
        self.model = Model(shapes, device)
        self.params = list(self.model.parameters())
        self.averages = [Ema(config, self.model) for config in averages]
        moved = self.params if misaligned == "weights" else []
        moved = [p for ema in self.averages for p in ema.averages] if misaligned == "averages" else moved
        for index, param in enumerate(moved):
            param.data = shifted(param, index)
        self.shadows = {}
        if shadows:
            trained = [p for p in self.params if p.requires_grad]
            values = [p.detach().bfloat16() for p in trained]
            if misaligned == "shadows":
                values = [shifted(value, index) for index, value in enumerate(values)]
            self.shadows = {
                p: value.requires_grad_(shadows == "gradients") for p, value in zip(trained, values, strict=True)
            }
        halves = self.params[::2], self.params[1::2]
        groups = [{"params": half, **group} for half, group in zip(halves, GROUPS, strict=True)]
        self.optimizer = Optimizer(
            groups, name=name, averages=self.averages, shadows=self.shadows, backend=backend, **settings
        )
        if misaligned in ("exp_avg", "exp_avg_sq"):
            for index, param in enumerate(p for p in self.params if p.requires_grad):
                state = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
                state[misaligned] = shifted(state[misaligned], index)
                self.optimizer.state[param] = {"step": torch.tensor(0.0), **state}

    def set_gradients(self, step: int, scale: float = 1.0) -> None:
        """The same at the same step whatever the device; every parameter lacks one now and then."""
        generator = torch.Generator().manual_seed(step)
        for index, param in enumerate(self.params):
            gradient = torch.randn(param.shape, generator=generator) * scale * 10.0 ** (index % 3 - 1)
            owner = self.shadows.get(param)
            owner = param if owner is None or not owner.requires_grad else owner
            missing = not param.requires_grad or (index + step) % 5 == 4 or (index == 2 and step < 3)
            gradient = gradient.to(param.device, owner.dtype)
            gradient = shifted(gradient, index + step) if self.misaligned == "gradients" else gradient
            owner.grad = None if missing else gradient

    def run(self, steps: range) -> list[float]:
        """Make these steps; return the gradient norm of each."""
        norms = []
        for step in steps:
            self.set_gradients(step)
            self.optimizer.step()
            norms.append(self.optimizer.grad_norm.item())
        return norms

    def tensors(self) -> dict[str, Tensor]:
        """Everything a step changes."""
        found = {f"w{i}": p.detach() for i, p in enumerate(self.params)}
        for i, entry in self.optimizer.state_dict()["state"].items():
            found |= {f"{key}{i}": value for key, value in entry.items()}
        for a, ema in enumerate(self.averages):
            found |= {f"average{a} of w{i}": p for i, p in enumerate(ema.network.parameters())}
        return found | {f"shadow{i}": s.detach() for i, s in enumerate(self.shadows.values())}


def assert_near(ours: Setup, theirs: Setup, tolerance: float = 1e-6) -> None:
    """Each tensor within `tolerance` of the other's in the square norm; steps equal; shadows of our weights."""
    found, expected = ours.tensors(), theirs.tensors()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        a, b = found[name].double().cpu(), tensor.double().cpu()
        if name.startswith("step"):
            assert a == b, name
        elif not name.startswith("shadow"):
            # a first moment may cancel to nothing: its size is that of the gradients it is a mean of
            moment = name.startswith("exp_avg") and not name.startswith("exp_avg_sq")
            roots = expected[name.replace("exp_avg", "exp_avg_sq")].double().cpu().sqrt() if moment else b
            size = torch.maximum(torch.linalg.vector_norm(b), torch.linalg.vector_norm(roots))
            assert torch.linalg.vector_norm(a - b) <= tolerance * size, name
    for param, shadow in ours.shadows.items():
        assert torch.equal(shadow.detach(), param.detach().bfloat16())


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Every bit equal."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def check_equals_reference(device: str, steps: int, **settings: object) -> None:
    ours, theirs = Setup("fused", device, **settings), Setup("reference", device, **settings)
    norms, expected = ours.run(range(steps)), theirs.run(range(steps))
    assert ours.optimizer.backend == "fused"
    assert_near(ours, theirs)
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
    assert ours.optimizer.finished == steps


def check_misaligned(device: str, steps: int, kind: str) -> None:
    """As the reference where tensors of one kind lie anywhere: a view of a bucket is aligned to its elements only."""
    if kind == "gradients":
        check_equals_reference(device, steps, misaligned=kind, clip_norm=1.0, averages=())
        check_equals_reference(device, steps, misaligned=kind, shadows="gradients", averages=())
    else:
        shadows = "copies" if kind == "shadows" else ""
        check_equals_reference(device, steps, misaligned=kind, shadows=shadows)


def check_averages_are_those_of_an_ema(device: str, steps: int) -> None:
    """Of the same weights: to the bit where it computes in float64; profiles that rarely move start at the weights."""
    configs = (*AVERAGES, EmaConfig(sigma_rel=0.1, every=3), EmaConfig(sigma_rel=0.2, every=2, dtype="float64"))
    setup = Setup("fused", device, averages=configs)
    alone = [Ema(config, setup.model) for config in configs]
    for step in range(steps):
        setup.run(range(step, step + 1))
        for ours, theirs in zip(setup.averages, alone, strict=True):
            theirs.update(step)
            tolerance = 0.0 if ours.dtype == torch.float64 else 1e-6
            for a, b in zip(ours.averages, theirs.averages, strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def check_bitwise_repeatable(device: str, steps: int) -> None:
    runs = [Setup("fused", device, clip_norm=1.0) for _ in range(2)]
    norms = [run.run(range(steps)) for run in runs]
    assert norms[0] == norms[1]
    assert_same(runs[0].tensors(), runs[1].tensors())


def check_norm_is_exact(device: str) -> None:
    """To the rounding of its float32, also where squares leave float32."""
    for scale in (1.0, 1e-25, 1e25):
        setup = Setup("fused", device)
        setup.set_gradients(0, scale)
        exact = torch.cat([p.grad.double().flatten() for p in setup.params if p.grad is not None]).norm().item()
        setup.optimizer.step()
        torch.testing.assert_close(setup.optimizer.grad_norm.item(), exact, rtol=1.2e-7, atol=0)


def check_nonfinite_step_is_skipped(device: str) -> None:
    """One bad element, in the tail of a tensor: nothing changes but the averages' clock; the next step is as ever."""
    for bad in (float("nan"), float("inf"), float("-inf")):
        ours, theirs = (Setup(b, device, skip_nonfinite=True, shadows="copies") for b in ("fused", "reference"))
        for setup in (ours, theirs):
            setup.run(range(2))
            before = {name: tensor.clone() for name, tensor in setup.tensors().items()}
            setup.set_gradients(2)
            setup.params[6].grad[-1] = bad
            setup.optimizer.step()
            assert_same(setup.tensors(), before)
            assert (setup.optimizer.finished, setup.optimizer.skipped) == (3, 1)
            assert not torch.isfinite(setup.optimizer.grad_norm)
            setup.run(range(3, 5))
            assert setup.optimizer.skipped == 1
        assert_near(ours, theirs)


def check_guard_can_be_lifted(device: str) -> None:
    """The step after a skipped one is made without a guard, which no norm decides on any more."""
    ours, theirs = (Setup(b, device, skip_nonfinite=True) for b in ("fused", "reference"))
    for setup in (ours, theirs):
        setup.set_gradients(0)
        setup.params[6].grad[-1] = float("nan")
        setup.optimizer.step()
        setup.optimizer.skip_nonfinite = False
        setup.run(range(1, 3))
        assert (setup.optimizer.finished, setup.optimizer.skipped) == (3, 1)
    assert_near(ours, theirs)


def check_nonfinite_step_is_made(device: str) -> None:
    """Without a guard one bad element reaches what it reaches in PyTorch: by way of the norm, NaN every weight."""
    for bad, reached in ((float("nan"), [3, 5]), (float("inf"), [1, 0])):
        for backend in ("fused", "reference"):
            setup = Setup(backend, device, shapes=((3,), (5,)), clip_norm=1.0, averages=())
            first, second = setup.params[:2]
            first.grad, second.grad = torch.tensor([1.0, bad, 1.0]).to(device), torch.ones(5).to(device)
            setup.optimizer.step()
            assert [int(param.isnan().sum()) for param in (first, second)] == reached, (backend, bad)


def check_state_moves_between_backends(device: str, steps: int) -> None:
    """fused, then reference, then fused, each from the other's state_dict: as the reference all the way."""
    ours, theirs = Setup("fused", device), Setup("reference", device)
    ours.run(range(steps))
    other = Setup("reference", device)
    for source, target, first in ((ours, other, steps), (other, ours, 2 * steps)):
        target.model.load_state_dict(source.model.state_dict())
        for a, b in zip(source.averages, target.averages, strict=True):
            b.network.load_state_dict(a.network.state_dict())
        target.optimizer.load_state_dict(source.optimizer.state_dict())
        target.optimizer.finished = source.optimizer.finished
        target.run(range(first, first + steps))
    theirs.run(range(3 * steps))
    assert_near(ours, theirs)


def check_follows_moved_tensors_and_new_rates(device: str) -> None:
    """A weight, its gradient or an average in other memory, or another rate, is noticed at the next step."""
    ours, theirs = Setup("fused", device), Setup("reference", device)
    kept = []
    for setup in (ours, theirs):
        setup.run(range(2))
        with torch.no_grad():
            for param in (*setup.params, *setup.averages[0].network.parameters()):
                kept.append(param.data)
                param.data = param.data.clone()
        setup.optimizer.param_groups[0]["lr"] = 1e-4
        setup.run(range(2, 4))
    assert_near(ours, theirs)


def check_follows_what_is_replaced(device: str) -> None:
    """An average's pace, a part of a parameter's state, a state loaded again, a further group: all at the next step."""
    ours, theirs = Setup("fused", device, shapes=((3,), (5,))), Setup("reference", device, shapes=((3,), (5,)))
    added = [nn.Parameter(torch.ones(3, device=device)) for _ in range(2)]
    for setup, param in zip((ours, theirs), added, strict=True):
        optimizer, first = setup.optimizer, setup.params[0]
        setup.run(range(2))
        setup.averages[0].decay, setup.averages[1].every = 0.5, 1
        setup.run(range(2, 4))
        for key in ("exp_avg", "exp_avg_sq", "step"):
            replaced = optimizer.state[first][key]
            optimizer.state[first][key] = torch.full_like(replaced, 9.0)
            setup.run(range(5, 7))
        before = optimizer.state_dict()["state"][0]["step"].clone()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.state_dict()["state"][0]["step"] == before
        setup.run(range(7, 8))
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, device=device), requires_grad=False)]})
        setup.run(range(8, 9))
        optimizer.add_param_group({"params": [param], "lr": 0.5})
        param.grad = torch.ones_like(param)
        setup.run(range(9, 11))
    assert_near(ours, theirs)
    torch.testing.assert_close(*added)


def check_many_tensors(device: str) -> None:
    """More addresses than one launch writes, and a gradient whose memory is not dense."""
    shapes = [(1 + i % 7,) if i % 6 == 0 else (0,) for i in range(1100)]
    ours, theirs = (Setup(b, device, shapes=shapes, averages=AVERAGES[:1]) for b in ("fused", "reference"))
    for setup in (ours, theirs):
        setup.set_gradients(0)
        setup.params[0].grad = torch.ones(1, device=device).expand(1)
        setup.params[6].grad = torch.arange(2.0 * len(setup.params[6]), device=device)[::2]
        setup.optimizer.step()
    assert_near(ours, theirs)
