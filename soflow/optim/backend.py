"""The seam between an optimizer and what moves its tensors."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from soflow.ema import Ema

# of torch.optim's param groups
GROUP_SETTINGS = ("params", "lr", "betas", "eps", "weight_decay")


class Owner(Protocol):
    """What a backend reads of its Optimizer, at every step anew."""

    name: Literal["adamw", "radam"]
    param_groups: list[dict[str, Any]]
    clip_norm: float | None
    skip_nonfinite: bool
    averages: list[Ema[Any]]
    shadows: dict[Tensor, Tensor]

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]: ...
    def parameters(self) -> list[Tensor]: ...
    def gradient_of(self, param: Tensor) -> Tensor | None: ...
    def active(self, group: dict[str, Any]) -> Sequence[tuple[Tensor, Tensor]]: ...


class Backend(Protocol):
    """What an Optimizer asks of its backend."""

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the last step's gradient before clipping, a scalar; at first 0."""

    def step(self) -> None:
        """Move weights, moments, averages and shadows by one step."""

    def prepare(self) -> None:
        """Read changed hyper-parameters, for a step that is replayed."""

    def count(self, counter: int) -> int:
        """Return the counter of that index in `COUNTERS`."""

    def set_finished(self, steps: int) -> None:
        """Set the number of steps that the averages go by."""
