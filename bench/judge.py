"""Judges images of handwritten digits: are they what they should be, are they like real ones, and are they new?

Three questions, each answered with scikit-learn's real images, of which 'held_out' is never trained on, neither by the
generator nor by anything here:

agreement   The share of images that a support vector machine, trained on the real training images, reads as their
            label. Its own accuracy on held-out images says how far to trust it.

Frechet     The Frechet distance to the held-out images on 24 features: the last hidden layer of a small network with
            fixed seed, trained to read the real training images, as FID's Inception network was on ImageNet. Chosen
            among eight candidates by what they notice: principal components, plain or of an RBF kernel, and random
            features all give images drawn from a Gaussian per class, or with noise of 0.2 added, a distance not far
            from that of real images; these features see both. 24 of them leave 15 held-out images per dimension, so
            that the covariance is well conditioned. The distance is biased upwards by small samples, so every distance
            here compares as many images as there are held-out ones, equally many of each class, with the held-out
            images, and is the mean over up to three disjoint such subsets: that of real training images (`real`) is
            then what a perfect generator reaches. (That the features were fitted to those does not flatter it: over six
            splits, images that took part in the fit had 0.93, images that did not 0.95.)

neighbour   The mean distance in pixels to the nearest real training image, over that of the held-out images: 1 for new
            images, near 0 for copies of training images.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from torch import Tensor

from soflow.data import DIGITS_HELD_OUT_PER_CLASS, DigitsSource, epoch_order
from soflow.metrics import feature_statistics, frechet_distance

NUM_CLASSES = 10
MAX_SUBSETS = 3


class JudgeError(ValueError):
    """Images or a run that cannot be judged; the message says what they are and what was expected."""


@dataclass(frozen=True)
class Scores:
    """What the judge found for one set of images (see the module's docstring).

    agreement: 0 to 1.  frechet: squared feature units.  neighbour: relative to held-out images, which have 1.
    """

    agreement: float
    frechet: float
    neighbour: float


class DigitsJudge:
    """Scores images of digits, (N, 1, 8, 8) in [-1, 1], against the real ones; what lies outside is clamped.

    `real` are the scores of real images: accuracy of the classifier on held-out images, distance between training and
    held-out images, and 1. Everything is deterministic on one machine.
    """

    def __init__(self) -> None:
        train, held_out = DigitsSource("train"), DigitsSource("held_out")
        self._train_pixels, self._held_out_pixels = _pixels(train.images), _pixels(held_out.images)
        self._classifier = SVC(C=10.0).fit(self._train_pixels, train.labels.numpy())
        self._features = MLPClassifier((64, 24), alpha=0.01, max_iter=300, random_state=0)
        self._features.fit(self._train_pixels, train.labels.numpy())
        self._held_out_statistics = feature_statistics(self._hidden(self._held_out_pixels))
        self._held_out_distance = self._nearest_distance(self._held_out_pixels)
        self.real = Scores(
            agreement=self._agreement(self._held_out_pixels, held_out.labels.numpy()),
            frechet=self._frechet(self._train_pixels, train.labels.numpy()),
            neighbour=1.0,
        )

    def score(self, images: Tensor, labels: Tensor) -> Scores:
        """Return the scores of images (N, 1, 8, 8) that should show labels (N,), at least 36 images of every class.

        Raises JudgeError for fewer images, another shape, NaN or Inf.
        """
        if images.shape != (len(labels), 1, 8, 8):
            raise JudgeError(
                f"images: got shape {tuple(images.shape)}, expected ({len(labels)}, 1, 8, 8), as the labels"
            )
        bad = int((~torch.isfinite(images).flatten(1).all(1)).sum())
        if bad:
            raise JudgeError(f"images: {bad} of {len(images)} hold NaN or Inf, expected finite values")
        pixels, targets = _pixels(images), labels.cpu().numpy()
        return Scores(
            agreement=self._agreement(pixels, targets),
            frechet=self._frechet(pixels, targets),
            neighbour=self._nearest_distance(pixels) / self._held_out_distance,
        )

    def _agreement(self, pixels: np.ndarray, labels: np.ndarray) -> float:
        return float((self._classifier.predict(pixels) == labels).mean())

    def _frechet(self, pixels: np.ndarray, labels: np.ndarray) -> float:
        hidden = self._hidden(pixels)
        distances = [
            frechet_distance(*feature_statistics(hidden[rows]), *self._held_out_statistics)
            for rows in _balanced_subsets(labels)
        ]
        return float(np.mean(distances))

    def _hidden(self, pixels: np.ndarray) -> Tensor:
        hidden = pixels
        for weight, bias in zip(self._features.coefs_[:-1], self._features.intercepts_[:-1], strict=True):
            hidden = np.maximum(hidden @ weight + bias, 0)
        return torch.from_numpy(hidden)

    def _nearest_distance(self, pixels: np.ndarray) -> float:
        # Without the matrix product, which is inexact where the distance is small: exactly for the copies looked for.
        distances = torch.cdist(
            torch.from_numpy(pixels),
            torch.from_numpy(self._train_pixels),
            compute_mode="donot_use_mm_for_euclid_dist",
        )
        return float(distances.amin(1).mean())


def _pixels(images: Tensor) -> np.ndarray:
    return images.detach().cpu().double().clamp(-1, 1).flatten(1).numpy()


def _balanced_subsets(labels: np.ndarray) -> Iterator[np.ndarray]:
    """Yield up to MAX_SUBSETS disjoint sets of rows with as many images of each class as the held-out images have."""
    # Real images are stored writer by writer: subsets must not be.
    order = epoch_order(len(labels), 0, 0)
    members = [order[labels[order] == label] for label in range(NUM_CLASSES)]
    size = DIGITS_HELD_OUT_PER_CLASS
    fewest = min(len(rows) for rows in members)
    if fewest < size:
        raise JudgeError(f"images: got {fewest} of one class, expected at least {size} of every class from 0 to 9")
    for start in range(0, min(fewest // size, MAX_SUBSETS) * size, size):
        yield np.concatenate([rows[start : start + size] for rows in members])
