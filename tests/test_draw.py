import pytest
import torch

from soflow.config import ObjectiveConfig, TimesConfig
from soflow.draw import Share, sample_batch, share_batch
from soflow.kernels import reference
from soflow.times import MIN_GAP


def draw(positions, step=5, seed=1, num_velocity=0, label_dropout=0.25, std=None, objective="soflow"):
    positions = torch.tensor(positions)
    return sample_batch(
        torch.zeros(len(positions), 2, 4, 4),
        std,
        positions % 10,
        positions,
        num_velocity,
        seed=seed,
        step=torch.tensor(step),
        r=torch.tensor(0.1),
        times=TimesConfig(),
        objective=ObjectiveConfig(name=objective, label_dropout=label_dropout),
        ops=reference,
    )


def test_rows_depend_on_their_position_alone():
    """However the batch is split, and in whatever order: the same noise, times and null labels."""
    whole, part = draw(list(range(12))), draw([7, 2])
    for name in ("x_1", "t", "s", "l", "null_mask"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[[7, 2]]), name


def test_streams_differ_by_seed_and_step():
    noise = draw([0, 1]).x_1
    assert not torch.equal(noise[0], noise[1])
    for other in (draw([0, 1], step=6), draw([0, 1], seed=2), draw([0, 1], seed=1 + 2**32)):
        assert not torch.equal(other.x_1, noise)


def test_times_are_ordered_and_distributed():
    times = TimesConfig()
    batch = draw(list(range(4000)), num_velocity=2000)
    logit = torch.logit(batch.t[:2000].double())
    assert logit.mean() == pytest.approx(times.velocity_mean, abs=4 * times.velocity_std / 2000**0.5)
    assert logit.std() == pytest.approx(times.velocity_std, rel=0.08)
    t, l, s = batch.t[2000:], batch.l[2000:], batch.s[2000:]
    assert torch.logit(t.double()).mean() == pytest.approx(times.t_mean, abs=4 * times.t_std / 2000**0.5)
    assert (s <= l).all()
    assert (l < t).all()
    # the published share of rows at the least gap: 14.4 %
    assert ((t - s) < 1.01 * MIN_GAP).float().mean() == pytest.approx(0.144, abs=0.03)


def test_null_mask_has_the_asked_share():
    assert draw(list(range(4000))).null_mask.float().mean() == pytest.approx(0.25, abs=0.03)
    assert not draw(list(range(100)), label_dropout=0.0).null_mask.any()
    assert draw(list(range(100)), label_dropout=1.0).null_mask.all()


def test_null_mask_is_drawn_apart_from_the_times():
    batch = draw(list(range(4000)), num_velocity=2000)
    for rows, times in ((slice(2000), batch.t), (slice(2000, None), batch.t), (slice(2000, None), batch.s)):
        logit, null = torch.logit(times[rows].double()), batch.null_mask[rows]
        assert logit[null].mean() == pytest.approx(logit[~null].mean().item(), abs=0.2)
        assert logit[null].std() == pytest.approx(logit[~null].std().item(), rel=0.15)


def test_posterior_is_sampled_anew_each_step():
    std = torch.full((3, 2, 4, 4), 0.5)
    first, second = draw([0, 1, 2], std=std), draw([0, 1, 2], step=6, std=std)
    assert not torch.equal(first.x_0, second.x_0)
    assert (first.x_0 / 0.5 - first.x_1).abs().max() > 0.1, "posterior and noise must be independent streams"
    assert draw([0, 1, 2]).x_0.abs().max() == 0


@pytest.mark.parametrize("fm_ratio", [0.0, 0.25, 0.4, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("batch_size", [1, 5, 7, 20, 24, 64])
def test_shares_cover_the_batch_once(batch_size, fm_ratio):
    num_velocity = int(fm_ratio * batch_size)
    for world_size in range(1, batch_size + 1):
        shares = [share_batch(batch_size, fm_ratio, rank, world_size) for rank in range(world_size)]
        assert sorted(p for share in shares for p in share.positions) == list(range(batch_size))
        for share in shares:
            assert all(p < num_velocity for p in share.positions[: share.num_velocity])
            assert all(p >= num_velocity for p in share.positions[share.num_velocity :])
            assert abs(len(share) - batch_size / world_size) < 1
            assert abs(share.num_velocity - num_velocity / world_size) < 2


def test_one_process_takes_everything():
    assert share_batch(4, 0.5, 0, 1) == Share((0, 1, 2, 3), 2)


def test_meanflow_orders_its_draws():
    """The later of two draws is t, in velocity rows too (arXiv 2505.13447); noise and null labels are SoFlow's."""
    rows = list(range(4000))
    ours, soflow = draw(rows, num_velocity=2000, objective="meanflow"), draw(rows, num_velocity=2000)
    assert torch.equal(ours.x_1, soflow.x_1)
    assert torch.equal(ours.null_mask, soflow.null_mask)
    assert (ours.s <= ours.t).all()
    consistency = draw(rows)
    # both draws are the ones that SoFlow's consistency rows make, where these are in order already
    in_order = consistency.s < consistency.t - 2 * MIN_GAP
    assert torch.equal(ours.t[in_order], consistency.t[in_order])
    assert torch.equal(ours.s[in_order], consistency.s[in_order])
    assert (ours.t[~in_order] >= consistency.t[~in_order] - MIN_GAP).all()
