"""A call as one CUDA graph: warmed up, captured once, then replayed on new numbers in the same memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

# PyTorch asks for a few calls on a side stream before a capture: lazy set-up must not end up in the graph.
NUM_WARMUP = 3

Inputs = tuple[Tensor | None, ...]


class CapturedCall:
    """call(*inputs) with effects in device memory only, as one graph launch after `num_warmup` eager calls.

    call: reads its inputs and whatever lies at fixed addresses; launches no work on other devices, does not
    synchronise, and returns nothing. inputs: tensors on the GPU, or None, always of the same shapes and dtypes.
    prepare: called before every launch, for what the host puts into device memory, such as a changed learning rate.
    ValueError for inputs of another shape or dtype than those that were captured.
    """

    def __init__(self, call: Callable[..., None], prepare: Callable[[], None], num_warmup: int = NUM_WARMUP) -> None:
        self._call = call
        self._prepare = prepare
        self._num_warmup = num_warmup
        self._num_calls = 0
        self._buffers: Inputs = ()
        self._replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor | None) -> None:
        """Make the call."""
        if self._num_calls < self._num_warmup:
            self._num_calls += 1
            with on_side_stream():
                self._call(*inputs)
            return
        if self._replay is None:
            self._buffers = tuple(None if value is None else value.clone() for value in inputs)
            self._prepare()
            self._replay = capture(self._call, self._buffers)
        else:
            self._fill(inputs)
            self._prepare()
        self._replay()

    def release(self) -> None:
        """Let go of the graph and its memory; the next call is captured again."""
        self._replay = None
        self._buffers = ()

    def _fill(self, inputs: Inputs) -> None:
        for index, (buffer, value) in enumerate(zip(self._buffers, inputs, strict=True)):
            if buffer is None or value is None:
                if buffer is not value:
                    raise ValueError(f"inputs[{index}]: got {_describe(value)}, expected {_describe(buffer)}")
                continue
            if buffer.shape != value.shape or buffer.dtype != value.dtype:
                raise ValueError(f"inputs[{index}]: got {_describe(value)}, expected {_describe(buffer)}")
            buffer.copy_(value, non_blocking=True)


@contextmanager
def on_side_stream() -> Iterator[None]:
    """Work on the stream that captures, before and after which the current one waits."""
    stream = _side_stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    # the same every time: what the allocator keeps for one stream it gives to no other
    return torch.cuda.Stream(device)


def capture(
    call: Callable[..., None], inputs: Inputs, pool: "torch.cuda._POOL_HANDLE | None" = None
) -> Callable[[], None]:
    """Return what replays call(*inputs), which is recorded here but not made; its memory is of `pool`, or its own."""
    graph = torch.cuda.CUDAGraph()
    stream = _side_stream(torch.cuda.current_device())
    # of this thread alone: the one that writes a checkpoint may wait for its copies meanwhile
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        call(*inputs)
    return graph.replay


def _describe(value: Tensor | None) -> str:
    return "None" if value is None else f"{value.dtype} of shape {tuple(value.shape)}"
