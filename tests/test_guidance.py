import pytest
import torch

from soflow.guidance import cfg_decay, row_guidance


def test_cfg_decay_published_values():
    t = torch.tensor([0.3, 0.8, 0.801, 0.85, 0.9, 0.95, 0.99, 1.0], dtype=torch.float64)
    expected = [1.0, 1.0, 0.9931, 0.0723, 0.0247, 0.0083, 0.0013, 0.0]
    assert cfg_decay(t, 0.8).tolist() == pytest.approx(expected, abs=5e-5)


def test_no_decay_time_means_no_decay():
    assert cfg_decay(torch.tensor([0.0, 1.0]), 1.0).tolist() == [1.0, 1.0]


def test_rows_of_the_null_mask_are_not_guided():
    t, null_mask = torch.tensor([0.5, 0.5]), torch.tensor([False, True])
    strength, mix = row_guidance(t, null_mask, cfg_scale=3.0, cfg_decay_time=0.8, mix_ratio=0.25)
    assert strength.tolist() == [2.0, 0.0]
    assert mix.tolist() == [0.25, 1.0]
