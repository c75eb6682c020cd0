"""Milliseconds of calls on a GPU, by turns in one run.

Every call is captured as a CUDA graph and replayed, as the engine does with its step. Launched one by one, an op that
is done in 20 microseconds would be measured by how long the host needs to launch it, and be the slower for a look-ahead
written in Python.
"""

import statistics
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch

from soflow.capture import NUM_WARMUP, capture, on_side_stream

ROUNDS = 3

Key = TypeVar("Key", bound=Hashable)


def median_ms(calls: Mapping[Key, Callable[[], object]], milliseconds: float) -> dict[Key, float]:
    """Return each call's milliseconds on the GPU, with a cold L2: the median of ROUNDS medians, taken by turns.

    calls: take their inputs from where they lie, and what they return is dropped.  milliseconds: for which each is
    repeated in a round.
    """
    from triton.testing import do_bench

    # of all graphs: nothing of one is needed once it has run
    pool = torch.cuda.graph_pool_handle()
    replays = {key: _captured(call, pool) for key, call in calls.items()}
    rounds = [
        {key: do_bench(replay, rep=milliseconds, return_mode="median") for key, replay in replays.items()}
        for _ in range(ROUNDS)
    ]
    return {key: statistics.median(times[key] for times in rounds) for key in calls}


def _captured(call: Callable[[], object], pool: "torch.cuda._POOL_HANDLE") -> Callable[[], None]:
    def run() -> None:
        call()

    for _ in range(NUM_WARMUP):
        with on_side_stream():
            run()
    return capture(run, (), pool)
