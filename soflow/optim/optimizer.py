"""AdamW and RAdam with all that belongs to a step: norm, clipping, guard, averages of the weights, bf16 shadows."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from soflow.config import OptimConfig, require
from soflow.ema import Ema
from soflow.kernels.multi_tensor import FINISHED, SKIPPED, is_built, requirement
from soflow.optim.apex import Apex
from soflow.optim.backend import GROUP_SETTINGS, Backend
from soflow.optim.fused import Fused
from soflow.optim.reference import Reference
from soflow.sharding import is_shard

KINDS: dict[str, type[torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}
BACKENDS: dict[str, Callable[["Optimizer"], Backend]] = {"fused": Fused, "reference": Reference, "apex": Apex}
# settings of torch.optim's classes that choose how they compute, but not what
FREE_SETTINGS = ("foreach", "fused", "capturable", "differentiable")


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

    clip_norm: largest norm over all gradients. With it gradients are scaled in place, but by fused.
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
        require("optim.name", name, name in KINDS, " or ".join(KINDS))
        require("optim.backend", backend, backend in ("auto", *BACKENDS), f"auto, {', '.join(BACKENDS)}")
        bounded = clip_norm is None or 0 < clip_norm < math.inf
        require("optim.clip_norm", clip_norm, bounded, "a number above 0, or None")
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with settings of their own where given; ValueError, as of load_state_dict, adds nothing."""
        self._require_settings(len(self.param_groups), param_group)
        super().add_param_group(param_group)

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


def _choose(backend: str, optimizer: Optimizer) -> tuple[str, Backend]:
    params = [p for p in optimizer.parameters() if p.requires_grad]
    obstacle = requirement(params) if params else "no parameter requires a gradient"
    if any(is_shard(param) for param in params):
        obstacle = "the weights are sharded"
    if backend == "auto":
        backend = "fused" if obstacle is None and is_built() else "reference"
    if backend == "fused" and obstacle is not None:
        raise ValueError(f"optim.backend: got 'fused', expected 'auto' or 'reference', because {obstacle}")
    return backend, BACKENDS[backend](optimizer)
