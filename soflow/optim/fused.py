"""The update by the CUDA extension, in one launch."""

import torch
from torch import Tensor

from soflow.kernels.multi_tensor import (
    COUNTERS,
    FINISHED,
    GroupRow,
    MultiTensorUpdate,
    ProfileRow,
    Slot,
)
from soflow.optim.backend import Owner


class Fused:
    """The CUDA extension: its tables are made anew when a tensor has moved or was replaced, or first has a gradient."""

    def __init__(self, optimizer: Owner) -> None:
        self._optimizer = optimizer
        self._device = next(p.device for p in optimizer.parameters() if p.requires_grad)
        self._counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=self._device)
        self._no_norm = torch.zeros((), device=self._device)
        self._tables: MultiTensorUpdate | None = None
        self._params: list[Tensor] = []
        self._layout: tuple[int, ...] = ()
        self.prepare()

    @property
    def grad_norm(self) -> Tensor:
        return self._no_norm if self._tables is None else self._tables.norms[0]

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
        profiles = []
        for ema in optimizer.averages:
            gamma = -1.0 if ema.gamma is None else ema.gamma
            profiles.append(ProfileRow(ema.decay, ema.every, gamma, float(ema.dtype == torch.float64)))
        tables.set_profiles(profiles)
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
        if self._tables is not None and self._current_layout() == self._layout:
            return self._tables
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("got new tensors while a graph is captured, expected one step, or prepare(), before")
        self._params = [p for p in optimizer.parameters() if p.requires_grad or optimizer.state.get(p)]
        self._tables = self._build(self._params)
        self._layout = self._current_layout()
        return self._tables

    def _current_layout(self) -> tuple[int, ...]:
        """What the tables hold of: the sizes of the param groups, and where every tensor of the optimizer lies."""
        optimizer = self._optimizer
        tracked = [*optimizer.shadows.values(), *(a for ema in optimizer.averages for a in ema.averages)]
        for param in optimizer.parameters():
            state = optimizer.state.get(param)
            if state:
                tracked += (param, state["exp_avg"], state["exp_avg_sq"], state["step"])
            elif param.requires_grad:
                tracked.append(param)
        sizes = (len(group["params"]) for group in optimizer.param_groups)
        return (*sizes, *(tensor.data_ptr() for tensor in tracked))

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
        return MultiTensorUpdate(
            slots, len(optimizer.param_groups), steps, self._counters, num_averages=len(optimizer.averages)
        )
