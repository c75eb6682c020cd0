import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from soflow.metrics import feature_statistics, frechet_distance


def random_covariance(dimension: int, seed: int, rank: int | None = None) -> Tensor:
    factor = torch.randn(
        dimension, rank or 2 * dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return factor @ factor.T / factor.shape[1]


@pytest.mark.parametrize("rank", [None, 3])
def test_distance_of_a_distribution_to_itself_is_zero(rank: int | None) -> None:
    mean, cov = torch.arange(12.0), random_covariance(12, seed=0, rank=rank)
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-12 * float(cov.trace())


def test_shifted_mean_adds_its_squared_length() -> None:
    mean, cov = torch.zeros(5, dtype=torch.float64), random_covariance(5, seed=1)
    shift = torch.tensor([3.0, 0, -4.0, 0, 12.0])
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx(169, rel=1e-12)


def test_commuting_covariances_compare_their_standard_deviations() -> None:
    axes = torch.linalg.qr(random_covariance(4, seed=2)).Q
    std1, std2 = torch.tensor([1.0, 2, 3, 0], dtype=torch.float64), torch.tensor([2.0, 2, 0.5, 1], dtype=torch.float64)
    cov1, cov2 = axes * std1.square() @ axes.T, axes * std2.square() @ axes.T
    zero = torch.zeros(4, dtype=torch.float64)
    assert frechet_distance(zero, cov1, zero, cov2) == pytest.approx(1 + 0 + 6.25 + 1, rel=1e-12)


def test_general_covariances_agree_with_the_matrix_square_root() -> None:
    cov1, cov2 = random_covariance(16, seed=3), random_covariance(16, seed=4)
    zero = torch.zeros(16, dtype=torch.float64)
    root = scipy.linalg.sqrtm(cov1.numpy() @ cov2.numpy())
    expected = float(cov1.trace() + cov2.trace()) - 2 * np.trace(root).real
    assert frechet_distance(zero, cov1, zero, cov2) == pytest.approx(expected, rel=1e-10)


def test_distance_is_symmetric_and_computed_in_float64() -> None:
    cov1, cov2 = random_covariance(8, seed=5).float(), random_covariance(8, seed=6).float()
    mean1, mean2 = torch.zeros(8), torch.full((8,), 1e-3)
    there, back = frechet_distance(mean1, cov1, mean2, cov2), frechet_distance(mean2, cov2, mean1, cov1)
    assert there == pytest.approx(back, rel=1e-13)
    double = frechet_distance(mean1.double(), cov1.double(), mean2.double(), cov2.double())
    assert there == pytest.approx(double, rel=1e-13)


def test_statistics_are_mean_and_unbiased_covariance_of_a_large_offset_sample() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(7)) + 1000
    mean, cov = feature_statistics(features)
    assert mean.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mean.numpy(), features.double().mean(0).numpy(), rtol=1e-14)
    np.testing.assert_allclose(cov.numpy(), np.cov(features.double().numpy().T), rtol=1e-9)


def test_sampled_gaussians_approach_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(8)
    first = torch.randn(200_000, 3, dtype=torch.float64, generator=generator)
    second = 2 * torch.randn(200_000, 3, dtype=torch.float64, generator=generator) + 1
    distance = frechet_distance(*feature_statistics(first), *feature_statistics(second))
    assert distance == pytest.approx(3 * 1 + 3 * 1, rel=0.02)


@pytest.mark.parametrize("features", [torch.zeros(1, 4), torch.zeros(4), torch.zeros(2, 3, 4)])
def test_statistics_refuse_other_shapes(features: Tensor) -> None:
    with pytest.raises(ValueError, match=r"features: got shape .* expected \(N, D\) with N at least 2"):
        feature_statistics(features)


def test_non_finite_values_are_refused() -> None:
    with pytest.raises(ValueError, match="features: got NaN or Inf"):
        feature_statistics(torch.tensor([[0.0, 1], [2, math.inf]]))
    with pytest.raises(ValueError, match="cov2: got NaN or Inf"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(2), torch.full((2, 2), math.nan))


def test_mismatched_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"mean2: got shape \(3,\)"):
        frechet_distance(torch.zeros(2), torch.eye(2), torch.zeros(3), torch.eye(3))
    with pytest.raises(ValueError, match=r"cov1: got shape \(3, 3\)"):
        frechet_distance(torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2))


def test_indefinite_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="cov1: got a smallest eigenvalue of -1, expected a positive semi-definite"):
        frechet_distance(torch.zeros(2), torch.diag(torch.tensor([1.0, -1.0])), torch.zeros(2), torch.eye(2))
