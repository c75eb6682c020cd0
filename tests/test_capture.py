"""Capture, with graphs that call again what they recorded: all of it but CUDA."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from soflow import capture
from soflow.capture import NUM_WARMUP, CapturedCall


@pytest.fixture
def pretended_graphs(monkeypatch):
    """Replay is another call on the same buffers; the recording itself makes none. Returns what happened, in order."""
    events = []

    def on_side_stream(call, inputs):
        events.append("eager")
        call(*inputs)

    def record(call, inputs):
        events.append("capture")

        def replay():
            events.append("replay")
            call(*inputs)

        return replay

    monkeypatch.setattr(capture, "on_side_stream", on_side_stream)
    monkeypatch.setattr(capture, "capture", record)
    return events


def test_only_this_thread_is_kept_from_waiting_for_the_device(monkeypatch):
    modes = []

    def graph(graph: object, pool: object, capture_error_mode: str) -> nullcontext[None]:
        modes.append(capture_error_mode)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    capture.capture(lambda: None, ())
    assert modes == ["thread_local"]


def test_warm_up_then_one_capture_then_replays_on_new_numbers(pretended_graphs):
    seen, prepared = [], []
    call = CapturedCall(lambda x, none: seen.append((x.clone(), none)), lambda: prepared.append(len(seen)))
    for value in range(6):
        call(torch.full((2,), float(value)), None)
    assert [x.tolist() for x, _ in seen] == [[float(value)] * 2 for value in range(6)]
    assert pretended_graphs == ["eager"] * NUM_WARMUP + ["capture"] + ["replay"] * (6 - NUM_WARMUP)
    assert prepared == [3, 4, 5]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            (torch.zeros(3), None),
            r"inputs\[0\]: got torch.float32 of shape \(3,\), expected torch.float32 of shape \(2,\)",
        ),
        ((torch.zeros(2, dtype=torch.int64), None), r"inputs\[0\]: got torch.int64"),
        ((torch.zeros(2), torch.zeros(1)), r"inputs\[1\]: got torch.float32 of shape \(1,\), expected None"),
    ],
)
def test_other_shapes_are_refused(inputs, message, pretended_graphs):
    call = CapturedCall(lambda x, none: None, lambda: None)
    for _ in range(NUM_WARMUP + 1):
        call(torch.zeros(2), None)
    with pytest.raises(ValueError, match=message):
        call(*inputs)
