"""Dropout whose masks depend on (seed, step, position) alone: the same however a batch is split or repeated."""

from types import ModuleType

import torch
from torch import Tensor

from soflow.streams import DROPOUT_STREAM


class Dropout:
    """The masks of one evaluation of a network, a stream of them for each of its layers.

    draw_keys: (B, 3) int64, seed, step and position in the global batch of each row.  rate: share of elements dropped.
    """

    def __init__(self, ops: ModuleType, rate: float, draw_keys: Tensor) -> None:
        self.ops = ops
        self.rate = rate
        self.seed, self.step, self.sample = draw_keys.unbind(1)

    def mask(self, layer: int, x: Tensor) -> Tensor:
        """Return factors of the shape and dtype of x, (B, ...): 0, or 1 / (1 - rate), so that the mean stays.

        layer: number of the layer that x belongs to; the same mask whenever it is asked for.
        """
        u = self.ops.uniform(self.seed, self.step, DROPOUT_STREAM + layer, self.sample, x.shape[1:].numel())
        return (u >= self.rate).to(x.dtype).div_(1.0 - self.rate).view(x.shape)


def fresh_draw_keys(num_rows: int, device: torch.device) -> Tensor:
    """Return draw keys, (num_rows, 3), with a seed from torch's global generator."""
    keys = torch.zeros(num_rows, 3, dtype=torch.int64, device=device)
    keys[:, 0] = torch.randint(2**62, ()).to(device)
    keys[:, 2] = torch.arange(num_rows, device=device)
    return keys
