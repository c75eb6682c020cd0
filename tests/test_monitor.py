"""What is watched, on losses made up."""

import json
import math

import pytest

from soflow.monitor import WATCHED, WINDOW, Monitor, Observation


def observe(monitor: Monitor, velocity: float, consistency: float) -> Observation:
    means = {"loss/velocity_mse": velocity, "loss/consistency_mse": consistency, "grad_norm": 1.0}
    return monitor.observe(means | {"method/dx_square": 0.25, "method/dF_square": 4.0, "method/min_gap_share": 0.1})


def run(monitor: Monitor, losses: list[tuple[float, float]]) -> tuple[list[float], list[int]]:
    """The flag of every interval, and the numbers of those that warned."""
    seen = [observe(monitor, *pair) for pair in losses]
    return [one.metrics["method/guidance_collapse"] for one in seen], [i for i, one in enumerate(seen) if one.warning]


# the 20 intervals of configs/digits.yaml
DIGITS = [
    (0.256, 0.234),
    (0.177, 0.164),
    (0.164, 0.186),
    (0.154, 0.190),
    (0.143, 0.155),
    (0.141, 0.168),
    (0.136, 0.179),
    (0.124, 0.151),
    (0.127, 0.154),
    (0.125, 0.150),
    (0.123, 0.167),
    (0.115, 0.150),
    (0.121, 0.167),
    (0.106, 0.189),
    (0.117, 0.168),
    (0.118, 0.173),
    (0.110, 0.162),
    (0.115, 0.156),
    (0.108, 0.151),
    (0.111, 0.183),
]
COLLAPSE = [(1.0, 0.8**i) for i in range(12)]


def test_metrics():
    metrics, warning = observe(Monitor(), 1.0, 1.0)
    assert metrics == {
        "loss/velocity_mse": 1.0,
        "loss/consistency_mse": 1.0,
        "grad_norm": 1.0,
        "method/lipschitz": 4.0,
        "method/min_gap_share": 0.1,
        "method/guidance_collapse": 0.0,
    }
    assert warning is None


def test_nothing_to_watch_without_consistency_rows():
    means = {"loss/velocity_mse": 1.0, "loss/consistency_mse": 0.0}
    monitor = Monitor()
    watched = {"method/dx_square": 0.0, "method/dF_square": 0.0, "method/min_gap_share": 0.0}
    assert monitor.observe(means | watched) == (means, None)
    assert monitor.state_dict() == Monitor().state_dict()


def test_an_interval_of_skipped_steps_is_passed_over():
    whole, interrupted = Monitor(), Monitor()
    expected = run(whole, COLLAPSE)
    flags, onsets = run(interrupted, COLLAPSE[:11])
    nothing = dict.fromkeys(("loss/velocity_mse", "loss/consistency_mse", *WATCHED), math.nan)
    metrics, warning = interrupted.observe(nothing)
    assert (metrics.keys(), warning) == ({"loss/velocity_mse", "loss/consistency_mse"}, None)
    more_flags, more_onsets = run(interrupted, COLLAPSE[11:])
    assert (flags + more_flags, onsets + [11 + number for number in more_onsets]) == expected


def test_collapse_is_told_at_its_onset_only():
    monitor = Monitor()
    flags, onsets = run(monitor, COLLAPSE)
    assert onsets == [2 * WINDOW - 1]
    assert flags == [0.0] * onsets[0] + [1.0] * (12 - onsets[0])
    # at the bottom the consistency loss falls no more, and the velocity loss still does not
    assert run(monitor, [(1.0, 0.8**11)] * 20) == ([1.0] * 20, [])
    # the velocity learns again, then not again
    flags, onsets = run(monitor, [(0.5, 0.5)] * 5 + [(0.5, 0.5)] * 5)
    assert (flags[0], onsets) == (0.0, [])
    _, onsets = run(monitor, [(0.5, 0.1)] * 5)
    assert len(onsets) == 1


def test_warning_says_what_fell_and_what_did_not():
    monitor = Monitor()
    warnings = [
        observe(monitor, velocity, consistency).warning for velocity, consistency in [(1, 4)] * 5 + [(2, 2)] * 5
    ]
    assert "fell from 4 to 2, but the velocity loss went from 1 to 2; raise objective.mix_ratio" in warnings[-1]


@pytest.mark.parametrize(
    "losses",
    [
        [(0.99**i, 0.8**i) for i in range(30)],  # both fall
        [(1.0, 0.99**i) for i in range(30)],  # the velocity loss is at its floor, the other creeps
        [(1.0, 1.0)] * 30,
        [(1.0, 1.1**i) for i in range(30)],  # as the gap shrinks, the slope grows
        [(0.0, 0.8**i) for i in range(30)],  # no velocity rows
        DIGITS,
        COLLAPSE[: 2 * WINDOW - 1],  # too early to tell
    ],
)
def test_no_false_alarm(losses):
    flags, onsets = run(Monitor(), losses)
    assert set(flags) == {0.0}
    assert onsets == []


@pytest.mark.parametrize(("fall", "collapses"), [(0.19, False), (0.21, True)])
def test_a_collapse_begins_where_the_consistency_loss_fell_by_a_fifth(fall, collapses):
    flags, _ = run(Monitor(), [(1.0, 1.0)] * 5 + [(1.0, 1.0 - fall)] * 5)
    assert flags[-1] == collapses


@pytest.mark.parametrize("stop", [0, 3, 9, 10, 11])
def test_resumed_is_as_if_it_had_not_stopped(stop):
    whole, first = Monitor(), Monitor()
    expected = run(whole, COLLAPSE)
    flags, onsets = run(first, COLLAPSE[:stop])
    resumed = Monitor()
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    more_flags, more_onsets = run(resumed, COLLAPSE[stop:])
    assert (flags + more_flags, onsets + [stop + number for number in more_onsets]) == expected
    assert resumed.state_dict() == whole.state_dict()
    assert math.isfinite(whole.state_dict()["history"][0][0])
