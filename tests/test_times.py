import itertools

import pytest
import torch

from soflow.times import MIN_GAP, consistency_times, gap_ratio, logit_normal, middle_time

METHODS = ("const", "linear", "cosine", "exponential")


@pytest.mark.parametrize("method", METHODS)
def test_gap_ratio_starts_and_ends_where_it_should(method):
    first, last = (gap_ratio(step, 100, 0.1, 0.002, method) for step in (0, 100))
    assert first == pytest.approx(0.002 if method == "const" else 0.1)
    assert last == pytest.approx(0.002)


@pytest.mark.parametrize("method", METHODS[1:])
def test_gap_ratio_falls(method):
    ratios = [gap_ratio(step, 100, 1.0, 1 / 3200, method) for step in range(101)]
    assert all(a > b for a, b in itertools.pairwise(ratios))


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method: got 'cubic'"):
        gap_ratio(0, 1, 0.1, 0.01, "cubic")


def test_middle_time_keeps_the_least_gap():
    t, s = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.5 - 1.5e-4])
    l = middle_time(t, s, 0.1)
    assert l[0].item() == pytest.approx(0.45)
    assert (t - l)[1].item() == pytest.approx(MIN_GAP, rel=1e-2)
    assert torch.equal(middle_time(t, s, torch.tensor(0.1)), l)


def test_consistency_times_are_clamped_not_sorted():
    t, s = consistency_times(torch.tensor([0.0, 0.3, 0.7]), torch.tensor([0.5, 0.6, 0.2]))
    assert t.tolist() == pytest.approx([MIN_GAP, 0.3, 0.7])
    assert s.tolist() == pytest.approx([0.0, 0.3 - MIN_GAP, 0.2], abs=1e-7)


def test_logit_normal():
    assert logit_normal(torch.tensor([0.0]), 0.0, 1.0).item() == 0.5
    assert torch.logit(logit_normal(torch.tensor([1.5]), -0.2, 0.8)).item() == pytest.approx(-0.2 + 1.5 * 0.8, rel=1e-5)
