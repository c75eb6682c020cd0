"""The Frechet distance between two sets of features, in float64."""

import torch
from torch import Tensor

# Below this share of the largest eigenvalue a negative one is rounding; above it the matrix is no covariance.
_NEGATIVE_EIGENVALUE_LIMIT = 1e-8


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and unbiased covariance (D, D) of features (N, D), N at least 2, in float64.

    Raises ValueError for another shape, and for NaN or Inf.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features: got shape {tuple(features.shape)}, expected (N, D) with N at least 2")
    _require_finite("features", features)
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Return |mean1 - mean2|^2 + tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), computed in float64.

    means (D,), covariances (D, D), symmetric and positive semi-definite. It is symmetric in its two arguments, and not
    below zero but for rounding. Raises ValueError for other shapes or values.
    Source: Dowson and Landau, "The Frechet distance between multivariate normal distributions", 1982.
    """
    dimension = len(mean1) if mean1.ndim == 1 else 0
    for name, tensor, shape in (
        ("mean1", mean1, (dimension,)),
        ("mean2", mean2, (dimension,)),
        ("cov1", cov1, (dimension, dimension)),
        ("cov2", cov2, (dimension, dimension)),
    ):
        if tensor.shape != shape or dimension == 0:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected means (D,) and covariances (D, D)")
        _require_finite(name, tensor)
    mean1, cov1, mean2, cov2 = mean1.double(), cov1.double(), mean2.double(), cov2.double()
    # tr (cov1 cov2)^(1/2) is the sum of the singular values of the product of the two roots: unlike a root taken of the
    # product itself, this needs no square root of a rounding error.
    product = _symmetric_root("cov1", cov1) @ _symmetric_root("cov2", cov2)
    trace_of_root = torch.linalg.svdvals(product).sum()
    return float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_of_root)


def _symmetric_root(name: str, covariance: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    smallest, largest = float(eigenvalues.min()), float(eigenvalues.abs().max())
    if smallest < -_NEGATIVE_EIGENVALUE_LIMIT * largest:
        raise ValueError(f"{name}: got a smallest eigenvalue of {smallest:g}, expected a positive semi-definite matrix")
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T


def _require_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name}: got NaN or Inf, expected finite values")
