import pytest
import torch

from soflow import streams
from soflow.config import ObjectiveConfig, TimesConfig
from soflow.draw import Share, sample_batch, share_batch
from soflow.kernels import reference
from soflow.times import MIN_GAP


def draw(
    positions,
    step=5,
    seed=1,
    num_velocity=0,
    label_dropout=0.25,
    std=None,
    objective="soflow",
    times: TimesConfig | None = None,
):
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
        times=times or TimesConfig(),
        objective=ObjectiveConfig(name=objective, label_dropout=label_dropout),
        ops=reference,
    )


def test_rows_depend_on_their_position_alone():
    """However the batch is split, and in whatever order: the same noise, times and null labels."""
    whole, part = draw(list(range(12))), draw([7, 2])
    for name in ("x_1", "t", "s", "l", "null_mask"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[[7, 2]]), name


def test_every_draw_depends_on_position_seed_and_step():
    rows = list(range(64))
    first = draw(rows, label_dropout=0.5)
    assert not torch.equal(first.x_1[0], first.x_1[1])
    for change in ({"step": 6}, {"seed": 2}, {"seed": 1 + 2**32}):
        other = draw(rows, label_dropout=0.5, **change)
        for name in ("x_1", "t", "s", "null_mask"):
            assert not torch.equal(getattr(first, name), getattr(other, name)), (name, change)
    assert first.draw_keys.tolist() == [[1, 5, row] for row in rows]


def test_no_two_draws_share_a_stream():
    others = [
        reference.POSTERIOR_STREAM,
        reference.NOISE_STREAM,
        streams.TIME_STREAM,
        streams.NULL_STREAM,
        streams.AUGMENT_UNIFORM_STREAM,
        streams.AUGMENT_NORMAL_STREAM,
    ]
    assert len(set(others)) == len(others)
    assert max(others) < streams.DROPOUT_STREAM  # of which each layer takes the next one


def test_every_time_has_its_own_mean_and_spread():
    """So far apart that none is cut by another."""
    times = TimesConfig(velocity_mean=-1.0, velocity_std=0.4, t_mean=2.0, t_std=0.8, s_mean=-4.0, s_std=0.2)
    batch = draw(list(range(4000)), num_velocity=2000, times=times)
    for drawn, mean, std in ((batch.t[:2000], -1.0, 0.4), (batch.t[2000:], 2.0, 0.8), (batch.s[2000:], -4.0, 0.2)):
        logit = torch.logit(drawn.double())
        assert logit.mean() == pytest.approx(mean, abs=4 * std / 2000**0.5)
        assert logit.std() == pytest.approx(std, rel=0.08)


def test_times_are_ordered():
    batch = draw(list(range(4000)), num_velocity=2000)
    t, l, s = batch.t[2000:], batch.l[2000:], batch.s[2000:]
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
    assert torch.equal(ours.t, draw(rows, objective="meanflow").t)
    consistency = draw(rows)
    # both draws are the ones that SoFlow's consistency rows make, where these are in order already
    in_order = consistency.s < consistency.t - 2 * MIN_GAP
    assert torch.equal(ours.t[in_order], consistency.t[in_order])
    assert torch.equal(ours.s[in_order], consistency.s[in_order])
    assert (ours.t[~in_order] >= consistency.t[~in_order] - MIN_GAP).all()
