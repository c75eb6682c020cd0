"""Capture, with graphs that call again what they recorded: all of it but CUDA."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from soflow import capture
from soflow.capture import NUM_WARMUP, CapturedCall


@pytest.fixture
def pretended_graphs(monkeypatch):
    """Replay is another call on the same buffers; the recording itself makes none. Returns what happened, in order."""
    events = []

    @contextmanager
    def on_side_stream():
        events.append("eager")
        yield

    def record(call, inputs):
        events.append("capture")

        def replay():
            events.append("replay")
            call(*inputs)

        return replay

    monkeypatch.setattr(capture, "on_side_stream", on_side_stream)
    monkeypatch.setattr(capture, "capture", record)
    return events


def test_capture_is_of_this_thread_alone_and_on_the_stream_of_the_warm_up(monkeypatch):
    graphs = []

    def graph(graph: object, pool: object, stream: object, capture_error_mode: str) -> nullcontext[None]:
        graphs.append((stream, capture_error_mode))
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(capture, "_side_stream", lambda device: f"side stream of {device}")
    capture.capture(lambda: None, ())
    assert graphs == [("side stream of 3", "thread_local")]


def test_warm_up_then_one_capture_then_replays_on_new_numbers(pretended_graphs):
    seen, prepared = [], []
    call = CapturedCall(lambda x, none: seen.append((x.clone(), none)), lambda: prepared.append(len(seen)))
    inputs = [torch.full((2,), float(value)) for value in range(6)]
    for x in inputs:
        call(x, None)
    expected = [[float(value)] * 2 for value in range(6)]
    assert [x.tolist() for x, _ in seen] == expected
    assert [x.tolist() for x in inputs] == expected, "the caller's own were written to"
    assert pretended_graphs == ["eager"] * NUM_WARMUP + ["capture"] + ["replay"] * (6 - NUM_WARMUP)
    assert prepared == [3, 4, 5]


def test_released_it_captures_again_without_warm_up(pretended_graphs):
    seen = []
    call = CapturedCall(lambda x: seen.append(x.tolist()), lambda: None, num_warmup=1)
    for shape in (2, 2, 2, 3, 3):
        if len(seen) == 3:
            call.release()
        call(torch.full((shape,), float(len(seen))))
    assert seen == [[0.0] * 2, [1.0] * 2, [2.0] * 2, [3.0] * 3, [4.0] * 3]
    assert pretended_graphs == ["eager", "capture", "replay", "replay", "capture", "replay", "replay"]


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
