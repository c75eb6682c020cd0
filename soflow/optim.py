"""AdamW and RAdam with all that belongs to a step: norm, clipping, guard, averages of the weights, bf16 shadows."""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from soflow import doctor
from soflow.config import OptimConfig
from soflow.ema import Ema
from soflow.kernels.multi_tensor import (
    COUNTERS,
    GroupRow,
    MultiTensorUpdate,
    ProfileRow,
    Slot,
    is_built,
    requirement,
)
from soflow.sharding import is_shard, local, norm_over_shards

KINDS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
# settings of torch.optim's classes that choose how they compute, but not what
FREE_SETTINGS = ("foreach", "fused", "capturable", "differentiable")
GROUP_SETTINGS = ("params", "lr", "betas", "eps", "weight_decay")
NORM_BLOCK = 1024
FINISHED, SKIPPED = COUNTERS.index("finished"), COUNTERS.index("skipped")


def build_optimizer(
    config: OptimConfig,
    parameters: Iterable[nn.Parameter],
    averages: Sequence[Ema[Any]] = (),
    shadows: Mapping[Tensor, Tensor] | None = None,
) -> "Optimizer":
    """Return the optimizer of a configuration, whose steps also move `averages` and rewrite `shadows`."""
    return Optimizer(
        parameters,
        name=config.name,
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        clip_norm=config.clip_norm,
        skip_nonfinite=config.nonfinite != "step",
        averages=averages,
        shadows=shadows,
        backend=config.backend,
    )


class Optimizer(torch.optim.Optimizer):
    """One step: g = clipped gradient; AdamW or RAdam as torch.optim defines it; averages; bf16 shadows of the weights.

    state_dict is that of torch.optim's optimizer of the same name, either loads the other's; that of an official
    checkpoint is one. Frozen parameters keep their place in it, unused; those without a gradient are left alone.

    clip_norm: largest norm over all gradients. With it gradients are scaled in place, or on a GPU left as they are.
    skip_nonfinite: a step whose gradient is not finite changes nothing but the counters.
    averages: moved by every step, in the same launch; their weights must be parameters of this optimizer.
    shadows: bf16 copies of parameters, rewritten by every step; one that requires a gradient supplies its parameter's.
    backend: fused (one launch of the CUDA extension, two with clipping or guard; float32 parameters on one GPU; no host
    synchronisation, can be captured in a graph after one step), reference (torch._foreach), apex (NVIDIA's FusedAdam),
    or auto. The attribute `backend` says what was chosen. reference and apex synchronise to skip a step.

    ValueError for what the backend cannot do.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        name: Literal["adamw", "radam"] = "adamw",
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
        averages: Sequence[Ema[Any]] = (),
        shadows: Mapping[Tensor, Tensor] | None = None,
        backend: Literal["auto", "fused", "reference", "apex"] = "auto",
    ) -> None:
        # torch's own defaults, so that a state_dict has the keys that this version of torch gives it
        theirs = KINDS[name]([torch.zeros(1)], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)  # type: ignore[call-arg]
        self._settings = {key: value for key, value in theirs.defaults.items() if key not in GROUP_SETTINGS}
        super().__init__(params, dict(theirs.defaults))
        self.name = name
        self.clip_norm = clip_norm
        self.skip_nonfinite = skip_nonfinite
        self.averages = list(averages)
        self.shadows = dict(shadows or {})
        self._require_known(self.shadows, "shadows")
        for average in self.averages:
            self._require_known(average.weights, "averages")
        self.backend, self._update = _choose(backend, self)

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the last step's gradient before clipping, a scalar that the next step overwrites; at first 0."""
        return self._update.grad_norm

    @property
    def finished(self) -> int:
        """Steps done, skipped ones included: what the averages go by. To be set when a run is continued."""
        return self._update.count(FINISHED)

    @finished.setter
    def finished(self, steps: int) -> None:
        self._update.set_finished(steps)

    @property
    def skipped(self) -> int:
        """Steps skipped since this object was made."""
        return self._update.count(SKIPPED)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update.step()
        return loss

    def prepare(self) -> None:
        """Put changed hyper-parameters where the next step, or the next replay of a captured one, will read them."""
        self._update.prepare()

    @torch.no_grad()
    def refresh_shadows(self) -> None:
        """Write the weights to their shadows: after they were changed by anything but a step."""
        for param, shadow in self.shadows.items():
            shadow.copy_(param)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, those of shadows as well."""
        super().zero_grad(set_to_none)
        for shadow in self.shadows.values():
            if set_to_none:
                shadow.grad = None
            elif shadow.grad is not None:
                shadow.grad.detach_().zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return what torch.optim's optimizer of this name would, the number of steps on the CPU."""
        state = super().state_dict()
        steps = {index: entry["step"] for index, entry in state["state"].items()}
        if any(step.device.type != "cpu" for step in steps.values()):
            host = torch.stack(list(steps.values())).cpu()
            steps = {index: step.clone() for index, step in zip(steps, host.unbind(), strict=True)}
        state["state"] = {index: {**entry, "step": steps[index]} for index, entry in state["state"].items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of an optimizer of torch.optim of this name, or of an official checkpoint.

        ValueError, before anything is changed, for settings that this class does not compute, such as amsgrad.
        """
        for index, group in enumerate(state_dict["param_groups"]):
            self._require_settings(index, group)
        super().load_state_dict(state_dict)
        self._update.forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own where given."""
        super().add_param_group(param_group)
        self._require_settings(len(self.param_groups) - 1, self.param_groups[-1])
        if hasattr(self, "_update"):  # not while the first groups are added
            self._update.forget()

    def parameters(self) -> list[Tensor]:
        """Return all parameters, frozen ones too, in the order of their indices in state_dict."""
        return [param for group in self.param_groups for param in group["params"]]

    def gradient_of(self, param: Tensor) -> Tensor | None:
        """Return the gradient of `param`, its shadow's if that has one."""
        shadow = self.shadows.get(param)
        return param.grad if shadow is None or not shadow.requires_grad else shadow.grad

    def active(self, group: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Return the parameters of `group` that have a gradient, with it; their state is there afterwards."""
        pairs = []
        for param in group["params"]:
            gradient = self.gradient_of(param)
            if gradient is None:
                continue
            if not self.state[param]:
                self.state[param] = {
                    "step": torch.tensor(0.0, dtype=torch.float32),
                    "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
                }
            pairs.append((param, gradient))
        return pairs

    def _require_settings(self, index: int, group: dict[str, Any]) -> None:
        for key, value in self._settings.items():
            if key not in FREE_SETTINGS and group.get(key, value) != value:
                raise ValueError(f"param_groups[{index}].{key}: got {group[key]}, expected {value}")

    def _require_known(self, tensors: Iterable[Tensor], what: str) -> None:
        known = {id(param) for param in self.parameters()}
        if any(id(tensor) not in known for tensor in tensors):
            raise ValueError(
                f"{what}: got a weight that is no parameter of this optimizer, expected only its parameters"
            )


class _Backend(Protocol):
    """What moves the tensors of an Optimizer."""

    @property
    def grad_norm(self) -> Tensor: ...
    def step(self) -> None: ...
    def prepare(self) -> None: ...
    def forget(self) -> None: ...
    def count(self, counter: int) -> int: ...
    def set_finished(self, steps: int) -> None: ...


def _choose(backend: str, optimizer: Optimizer) -> tuple[str, _Backend]:
    params = [p for p in optimizer.parameters() if p.requires_grad]
    obstacle = "the weights are sharded" if any(is_shard(p) for p in params) else requirement(params)
    if backend == "auto":
        backend = "fused" if params and obstacle is None and is_built() else "reference"
    if backend == "fused" and obstacle is not None:
        raise ValueError(f"optim.backend: got 'fused', expected 'auto' or 'reference', because {obstacle}")
    backends: dict[str, Callable[[Optimizer], _Backend]] = {"fused": _Fused, "reference": _Reference, "apex": _Apex}
    return backend, backends[backend](optimizer)


class _Reference:
    """torch._foreach on any device and dtype; of sharded weights, on this process's part."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._counters = [0] * len(COUNTERS)
        self.grad_norm = torch.zeros(())

    def prepare(self) -> None:
        """Nothing: every step reads the param groups."""

    def forget(self) -> None:
        """Nothing: every step reads the state."""

    def count(self, counter: int) -> int:
        return self._counters[counter]

    def set_finished(self, steps: int) -> None:
        self._counters[FINISHED] = steps

    def step(self) -> None:
        optimizer = self._optimizer
        # of the weights' type first: scaling must not round a bf16 gradient again
        groups = [(group, [(p, g.to(p.dtype)) for p, g in optimizer.active(group)]) for group in optimizer.param_groups]
        whole_gradients = [gradient for _, pairs in groups for _, gradient in pairs]
        self.grad_norm = _norm(whole_gradients)
        gradients = [local(gradient) for gradient in whole_gradients]
        step = self._counters[FINISHED]
        self._counters[FINISHED] += 1
        if optimizer.skip_nonfinite and not torch.isfinite(self.grad_norm):
            self._counters[SKIPPED] += 1
            return
        if optimizer.clip_norm is not None and gradients:
            scale = (optimizer.clip_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(gradients, scale.to(gradients[0].device))
        self._move([(group, pairs) for group, pairs in groups if pairs])
        for average in optimizer.averages:
            average.update(step)
        moved = {id(param) for _, pairs in groups for param, _ in pairs}
        for param, shadow in optimizer.shadows.items():
            if id(param) in moved:
                shadow.detach().copy_(param)

    def _move(self, groups: list[tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]]) -> None:
        update = {"adamw": _adamw, "radam": _radam}[self._optimizer.name]
        for group, pairs in groups:
            states = [self._optimizer.state[param] for param, _ in pairs]
            for state in states:
                state["step"] += 1
            beta1, beta2 = group["betas"]
            update(
                [local(param) for param, _ in pairs],
                [local(gradient) for _, gradient in pairs],
                [local(state["exp_avg"]) for state in states],
                [local(state["exp_avg_sq"]) for state in states],
                [state["step"].item() for state in states],
                float(group["lr"]),
                beta1,
                beta2,
                group["eps"],
                group["weight_decay"],
            )


class _Apex(_Reference):
    """NVIDIA apex's FusedAdam over the same state; norm, averages and shadows as in the reference."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        if optimizer.name != "adamw" or optimizer.shadows:
            raise ValueError("optim.backend: got 'apex', expected another for RAdam or bf16 shadows, which it lacks")
        # it constructs one, which fails where apex was built without its CUDA extensions
        finding = doctor.run_check("NVIDIA apex", doctor.check_apex)
        if finding.status != "works":
            raise ValueError(f"optim.backend: got 'apex', which is {finding.status} here: {finding.detail}")
        fused_adam = importlib.import_module("apex.optimizers").FusedAdam
        self._fused_adam = fused_adam(
            [{"params": group["params"]} for group in optimizer.param_groups], adam_w_mode=True
        )

    def _move(self, groups: list[tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]]) -> None:
        optimizer, theirs = self._optimizer, self._fused_adam
        for group, inner in zip(optimizer.param_groups, theirs.param_groups, strict=True):
            inner.update({key: group[key] for key in GROUP_SETTINGS})
        for group, pairs in groups:
            states = [optimizer.state[param] for param, _ in pairs]
            done = {int(state["step"].item()) for state in states}
            if len(done) > 1:
                raise ValueError(
                    f"optim.backend: got 'apex' with parameters after {sorted(done)} steps, expected one number: apex "
                    "counts the steps of a param group, not of a parameter"
                )
            theirs.param_groups[optimizer.param_groups.index(group)]["step"] = done.pop()
            for (param, _), state in zip(pairs, states, strict=True):
                theirs.state[param] = {"exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
                state["step"] += 1
        theirs.step()


class _Fused:
    """The CUDA extension: its tables are made anew when a tensor has moved, or first has a gradient."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._device = next(p.device for p in optimizer.parameters() if p.requires_grad)
        self._counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=self._device)
        self._no_norm = torch.zeros((), device=self._device)
        self._tables: MultiTensorUpdate | None = None
        self._params: list[Tensor] = []
        self._addresses: tuple[int, ...] = ()
        self.prepare()

    @property
    def grad_norm(self) -> Tensor:
        return self._no_norm if self._tables is None else self._tables.norms[0]

    def forget(self) -> None:
        self._tables = None

    def count(self, counter: int) -> int:
        return int(self._counters[counter].item())

    def set_finished(self, steps: int) -> None:
        self._counters[FINISHED] = steps

    def prepare(self) -> None:
        optimizer = self._optimizer
        for group in optimizer.param_groups:
            optimizer.active(group)
        tables = self._current_tables()
        radam = float(optimizer.name == "radam")
        rows = []
        for group in optimizer.param_groups:
            beta1, beta2 = group["betas"]
            rows.append(GroupRow(float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"], radam))
        tables.set_groups(rows)
        tables.set_policy(optimizer.clip_norm, optimizer.skip_nonfinite)

    def step(self) -> None:
        self.prepare()
        assert self._tables is not None
        optimizer = self._optimizer
        gradients = [optimizer.gradient_of(param) for param in self._params]
        # kept until after the launch: a copy may be all that holds its memory
        gradients = [g if g is None or g.is_contiguous() else g.contiguous() for g in gradients]
        self._tables.set_gradients(gradients)
        self._tables.launch(norm_first=optimizer.clip_norm is not None or optimizer.skip_nonfinite)

    def _current_tables(self) -> MultiTensorUpdate:
        optimizer = self._optimizer
        params = [p for p in optimizer.parameters() if p.requires_grad or optimizer.state.get(p)]
        tracked = [*params, *optimizer.shadows.values(), *(a for ema in optimizer.averages for a in ema.averages)]
        tracked += [optimizer.state[p]["exp_avg"] for p in params if optimizer.state.get(p)]
        addresses = tuple(tensor.data_ptr() for tensor in tracked)
        if self._tables is not None and addresses == self._addresses:
            return self._tables
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("got new tensors while a graph is captured, expected one step, or prepare(), before")
        self._tables, self._params, self._addresses = self._build(params), params, addresses
        return self._tables

    def _build(self, params: list[Tensor]) -> MultiTensorUpdate:
        optimizer = self._optimizer
        group_of = {id(param): i for i, group in enumerate(optimizer.param_groups) for param in group["params"]}
        average_of = [
            {id(weight): average for weight, average in zip(ema.weights, ema.averages, strict=True)}
            for ema in optimizer.averages
        ]
        steps = torch.zeros(len(params), device=self._device)
        slots = []
        for index, param in enumerate(params):
            state = optimizer.state.get(param) or {}
            if state:
                # one view per parameter: a launch moves them on
                state["step"] = steps[index].copy_(state["step"])
            slots.append(
                Slot(
                    param,
                    state.get("exp_avg"),
                    state.get("exp_avg_sq"),
                    optimizer.shadows.get(param),
                    tuple(averages.get(id(param)) for averages in average_of),
                    group_of[id(param)],
                )
            )
        profiles = []
        for ema in optimizer.averages:
            gamma = -1.0 if ema.gamma is None else ema.gamma
            profiles.append(ProfileRow(ema.decay, ema.every, gamma, float(ema.dtype == torch.float64)))
        return MultiTensorUpdate(slots, len(optimizer.param_groups), steps, self._counters, profiles)


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all gradients, all shards of them, a scalar summed in float64; no host synchronisation.

    In the gradients' own type within blocks too short to lose anything: casting them all to float64 takes ten times as
    long. A block whose squares leave the range of its type, elements of 1e18 in float32, has an infinite norm.
    """
    if not gradients:
        return torch.zeros(())
    blocks = torch.cat([_block_norms(local(gradient)).to(gradients[0].device) for gradient in gradients])
    total = norm_over_shards(torch.linalg.vector_norm(blocks, dtype=torch.float64), gradients[0])
    return total.to(torch.promote_types(gradients[0].dtype, torch.float32))


def _block_norms(values: Tensor) -> Tensor:
    flat = values.flatten()
    whole = len(flat) - len(flat) % NORM_BLOCK
    blocks = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_BLOCK), dim=1)
    return torch.cat((blocks, torch.linalg.vector_norm(flat[whole:]).view(1)))


def _moments(
    gradients: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], beta1: float, beta2: float
) -> None:
    torch._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)


def _adamw(
    params: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    if weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    _moments(gradients, exp_avgs, exp_avg_sqs, beta1, beta2)
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denominators, [(1 - beta2**step) ** 0.5 for step in steps])
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(params, exp_avgs, denominators, [-lr / (1 - beta1**step) for step in steps])


def _radam(
    params: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[float],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    if weight_decay != 0:
        gradients = list(torch._foreach_add(gradients, params, alpha=weight_decay))
    _moments(gradients, exp_avgs, exp_avg_sqs, beta1, beta2)
    rho_inf = 2 / (1 - beta2) - 1
    adaptive, plain = [], []
    for step in steps:
        bias1, bias2 = 1 - beta1**step, 1 - beta2**step
        rho = rho_inf - 2 * step * beta2**step / bias2
        if rho > 5:
            rect = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
            adaptive.append(-(bias2**0.5) * (lr * rect / bias1))
            plain.append(0.0)
        else:
            adaptive.append(0.0)
            plain.append(-lr / bias1)
    # the factor of exp_avg: adaptive / (sqrt(exp_avg_sq) + eps) + plain; adaptive 0 divides to infinity and back to 0
    factors = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_add_(factors, eps)
    torch._foreach_div_(factors, adaptive)
    torch._foreach_reciprocal_(factors)
    torch._foreach_add_(factors, plain)
    torch._foreach_addcmul_(params, exp_avgs, factors)
