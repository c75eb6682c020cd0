"""The order in which samples are drawn: a pure function of (number of samples, seed, step), in integer arithmetic.

It is the same on every platform and for every number of processes, so resuming a run needs no state but the step.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from soflow.data.source import DataError


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Return the SplitMix64 hash of every element, a bijection of the 64-bit integers: uint64 in, uint64 out.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# Two, so that the batches around the end of an epoch need no second sort.
@lru_cache(maxsize=2)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Return the permutation argsort(splitmix64(i xor key(seed, epoch))) of 0 .. num_samples - 1, (num_samples,) int64.

    The array is read-only, because it is kept for the next call.
    """
    # Arrays of one element: NumPy warns when scalars wrap around, never when arrays do.
    key = splitmix64(splitmix64(np.array([seed], dtype=np.uint64)) ^ np.uint64(epoch))
    order = np.argsort(splitmix64(np.arange(num_samples, dtype=np.uint64) ^ key), kind="stable")
    order.flags.writeable = False
    return order


def batch_indices(num_samples: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the samples of the global batch of the 0-based `step`, (batch_size,) int64.

    Every epoch has num_samples // batch_size whole batches of its own order; the rest of that order is dropped.
    Raises DataError when there are fewer samples than a batch holds.
    """
    steps_per_epoch = num_samples // batch_size
    if steps_per_epoch == 0:
        raise DataError(
            f"train.batch_size: got {batch_size}, expected at most the {num_samples} samples of the data set"
        )
    epoch, position = divmod(step, steps_per_epoch)
    return epoch_order(num_samples, seed, epoch)[position * batch_size : (position + 1) * batch_size]


@dataclass(frozen=True)
class BatchOrder:
    """Which samples one process reads: those at `positions` of the global batch of every step."""

    num_samples: int
    batch_size: int
    seed: int
    positions: tuple[int, ...]

    def indices(self, step: int) -> np.ndarray:
        """Return the samples of the 0-based `step`, (len(positions),) int64."""
        return batch_indices(self.num_samples, self.batch_size, self.seed, step)[np.asarray(self.positions)]
