"""The clock of the GPU benchmarks."""

import torch

from bench.timing import ROUNDS, median_ms


def test_calls_are_captured_and_replayed():
    calls_made = 0
    runs = torch.zeros((), device="cuda")
    x = torch.ones(64, 64, device="cuda", requires_grad=True)

    def count() -> None:
        nonlocal calls_made
        calls_made += 1
        runs.add_(1)

    times = median_ms({"count": count, "gradient": lambda: torch.autograd.grad((x @ x).sum(), x)}, milliseconds=1)
    assert times.keys() == {"count", "gradient"}
    assert all(0 < ms < 1e3 for ms in times.values())
    # called to warm up and to be recorded, run by replays
    assert calls_made == 4
    assert runs.item() > calls_made + ROUNDS
