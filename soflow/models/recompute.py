"""Activations that backward computes again instead of keeping them; differences, which it does not need, never are."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from soflow.models.pair import Pair

Stage = Callable[..., Sequence[Pair]]
Runner = Callable[..., Sequence[Pair]]  # of a Stage and its inputs


def kept(stage: Stage, *inputs: Pair) -> Sequence[Pair]:
    """Return stage(*inputs) as it is."""
    return stage(*inputs)


def recomputed(stage: Stage, *inputs: Pair) -> Sequence[Pair]:
    """Return stage(*inputs), of which only the inputs are kept for backward; the same bits as `kept`.

    Backward runs the stage again, up to the last activation that it needs, on the activations alone: their differences
    were computed when the stage ran first, and are not held. The stage must do the same again, its dropout included.
    """
    if not torch.is_grad_enabled():
        return stage(*inputs)
    # emptied by the first run: whatever the closure holds lives until backward
    differences: list[Tensor | None] = [pair.d for pair in inputs]
    outputs: list[Tensor | None] = []

    def run(*activations: Tensor) -> tuple[Tensor, ...]:
        given = differences or [None] * len(activations)
        results = stage(*(Pair(x, d) for x, d in zip(activations, given, strict=True)))
        if differences:
            outputs.extend(pair.d for pair in results)
            differences.clear()
        return tuple(pair.x for pair in results)

    activations = checkpoint(run, *(pair.x for pair in inputs), use_reentrant=False, preserve_rng_state=False)
    results = [Pair(x, d) for x, d in zip(activations, outputs, strict=True)]
    outputs.clear()
    return results
