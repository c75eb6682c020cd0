"""How much memory a training needs: predicted from its configuration before anything is allocated.

The step itself runs on tensors without memory (torch's fake tensors, of the CPU), while every storage is counted from
its birth to its end. So a prediction knows every op, the recomputation, the precision and the objective, and cannot
fall behind them. What no tensor holds is left out: the CUDA context, workspaces of libraries, and what the allocator
loses to fragmentation.
"""

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soflow.assembly import assemble, training_ops
from soflow.config import LATENT_SOURCES, Config
from soflow.distributed import Processes
from soflow.models.network import NetworkBuilder, Recompute
from soflow.optim import Optimizer
from soflow.run_folder import RunError

GIB = 2**30
ACCUMULATIONS = (2, 4, 8, 16)
# each keeps less than the one before
RECOMPUTES: tuple[Recompute, ...] = ("none", "norms", "blocks")


class CountMemory(TorchDispatchMode):
    """While active, counts the bytes of all tensors that ops make: `now` alive, and `peak` of that."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the op and count what it made."""
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # the zeros that differentiation carries along have no memory
            if isinstance(tensor, Tensor) and not tensor._is_zerotensor():
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._storages:
            return

        def gone(_: object) -> None:
            del self._storages[address]
            self.now -= size

        self._storages[address] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _FakeTensors(FakeTensorMode):
    """A mode that copies of its tensors share."""

    def __deepcopy__(self, memo: dict[int, object]) -> "_FakeTensors":
        return self


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within: tensors that are made have shape and dtype, but no memory; they are of the CPU."""
    with _FakeTensors(), warnings.catch_warnings():
        # copying a network asks its tensors for their addresses
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield


class _MomentsOnly:
    """To a step the optimizer, of which it holds what lives between updates: two moments."""

    def __init__(self, optimizer: Optimizer) -> None:
        trained = [p for p in optimizer.parameters() if p.requires_grad]
        self.moments = [torch.zeros_like(p) for p in trained for _ in range(2)]
        self.grad_norm = torch.zeros((), device=trained[0].device)
        self.zero_grad: Callable[[bool], None] = optimizer.zero_grad
        self.param_groups = optimizer.param_groups

    def hold_buckets(self, parameters: Iterable[Tensor], num_parts: int) -> None:
        """Hold what DDP keeps from step to step: buckets, which are the gradients unless parts are summed first."""
        trained = [p for p in parameters if p.requires_grad]
        self.buckets = [torch.zeros_like(p) for p in trained]
        if num_parts == 1:
            for parameter, bucket in zip(trained, self.buckets, strict=True):
                parameter.grad = bucket
            self.zero_grad = lambda set_to_none: None

    def step(self) -> None:
        """Leave the gradients to whoever wants to update by them."""


def predict_peak(
    config: Config,
    image_shape: tuple[int, int, int],
    device: torch.device,
    world_size: int = 1,
    network: NetworkBuilder | None = None,
) -> int:
    """Return the bytes that a process of a training needs for its tensors at most; takes seconds and no memory.

    image_shape: (C, H, W) of the data.  device: where the training will run, which decides on ops and optimizer.
    network: builds the one that the configuration calls own.
    """
    ops = training_ops(config, device)
    fused_update = config.optim.backend in ("auto", "fused") and device.type == "cuda"
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=-(-config.train.batch_size // world_size)),
        optim=dataclasses.replace(config.optim, backend="reference"),
        engine=dataclasses.replace(config.engine, cuda_graph="off", compile=False),
    )
    with fake_tensors(), CountMemory() as memory:
        parts = assemble(config, Processes(0, 1, torch.device("cpu")), ops, network)
        parts.step.optimizer = under_way = _MomentsOnly(parts.optimizer)  # type: ignore[assignment]
        if world_size > 1 and config.engine.parallel == "ddp":
            under_way.hold_buckets(parts.step.flow.parameters(), config.train.accumulation)
        parts.step(*sample_like(config, image_shape), 0)
        # the CUDA extension's update makes nothing but changes; the first of others makes moments of its own
        if not fused_update:
            under_way.moments.clear()
            parts.optimizer.step()
    return memory.peak


def sample_like(config: Config, image_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return moments and labels of a batch, zeros, as the data set of a configuration would read them.

    An own one, of which nothing is known here, as if it had standard deviations.
    """
    mean = torch.zeros(config.train.batch_size, *image_shape)
    std = torch.zeros_like(mean) if config.data.source in (*LATENT_SOURCES, "own") else None
    return mean, std, torch.zeros(len(mean), dtype=torch.int64)


def require_memory(
    config: Config,
    image_shape: tuple[int, int, int],
    device: torch.device,
    world_size: int,
    available: int,
    network: NetworkBuilder | None = None,
) -> int:
    """Return the predicted peak in bytes; RunError with what would help where it is more than `available`."""

    def predict(recompute: Recompute = config.engine.recompute, parts: int = config.train.accumulation) -> int:
        engine = dataclasses.replace(config.engine, recompute=recompute)
        train = dataclasses.replace(config.train, accumulation=parts)
        changed = dataclasses.replace(config, engine=engine, train=train)
        return predict_peak(changed, image_shape, device, world_size, network)

    needed = predict()
    if needed <= available:
        return needed
    advice = []
    for recompute in RECOMPUTES[RECOMPUTES.index(config.engine.recompute) + 1 :]:
        if predict(recompute) <= available:
            advice.append(f"engine.recompute={recompute}")
            break
    for parts in ACCUMULATIONS:
        has_rows = config.train.accumulation < parts <= config.train.batch_size // world_size
        if has_rows and predict(parts=parts) <= available:
            advice.append(f"train.accumulation={parts}")
            break
    help_text = f"use {' or '.join(advice)}" if advice else "use a smaller network or more memory"
    raise RunError(
        f"{config.network.name} at batch {config.train.batch_size} needs {needed / GIB:.1f} GiB, "
        f"this GPU has {available / GIB:.1f}: {help_text}"
    )
