"""Saving beside the training: tensors are copied to host memory, and a thread writes them."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from soflow.checkpoint.steps import NO_PROFILES, save


class Snapshots:
    """Host memory for one copy of a run's tensors, made once and used again for every checkpoint.

    On a GPU the memory is pinned and the copies are only queued: after `mark`, `ready` waits for them.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    def take(self, key: str, tensor: Tensor) -> Tensor:
        """Return a copy of `tensor` in the memory called `key`, valid from `ready` to the next `take` of that name."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor.detach(), non_blocking=True)

    def mark(self) -> None:
        """Say that all is taken: `ready` waits for what is queued up to here."""
        if torch.cuda.is_initialized():
            self._copied = torch.cuda.Event()
            self._copied.record()

    def ready(self) -> None:
        """Return when the copies are there."""
        if self._copied is not None:
            self._copied.synchronize()


class Writer:
    """Writes checkpoints below `root` in a thread, one at a time, and keeps as many as `save` is told.

    Leaving its context waits for the thread. saved: called there with each step folder that is complete.
    """

    def __init__(self, root: Path, keep_last: int, keep_every: int, saved: Callable[[Path], None]) -> None:
        self._root = root
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._saved = saved
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown()
        if error is None:
            self.wait()

    def start(
        self,
        step: int,
        *,
        ready: Callable[[], None],
        model: Mapping[str, Tensor],
        ema: Mapping[str, Tensor],
        optimizer: Mapping[str, Any],
        meta: Mapping[str, Any],
        profiles: Mapping[float, Mapping[str, Tensor]] = NO_PROFILES,
    ) -> None:
        """Begin to write a checkpoint, when `wait` has returned; nothing given may change until it returns again.

        ready: called by the thread before it reads a tensor.
        """
        assert self._writing is None, "a checkpoint is being written"

        def write() -> None:
            ready()
            path = save(
                self._root,
                step,
                model=model,
                ema=ema,
                optimizer=optimizer,
                meta=meta,
                profiles=profiles,
                keep_last=self._keep_last,
                keep_every=self._keep_every,
            )
            self._saved(path)

        self._writing = self._threads.submit(write)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writing is not None and not self._writing.done()

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise at once."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Return when nothing is being written. Raises, once, what went wrong: CheckpointError for the disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
