"""A thread that reads batches ahead into a ring of host buffers."""

import queue
import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from soflow.data.order import BatchOrder
from soflow.data.source import DataError, Source

TIMEOUT_S = 300.0


@dataclass
class Slot:
    """A host buffer with the stored samples, (B, ...), and labels, (B,), of a step, and the samples' numbers."""

    stored: Tensor
    labels: Tensor
    step: int
    indices: np.ndarray


class HostRing:
    """Reads the batches of consecutive steps from `start` on, in one thread, `depth` of them ahead.

    The thread touches host memory only. It is a daemon and there is no process: nothing outlives the trainer.
    pinned: whether a GPU copies from the buffers.
    """

    def __init__(self, source: Source, order: BatchOrder, start: int, depth: int, pinned: bool) -> None:
        self._source = source
        self._order = order
        self._next = start
        self._free: queue.SimpleQueue[Slot | None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Slot | BaseException] = queue.SimpleQueue()
        rows = len(order.positions)
        for _ in range(depth):
            stored = torch.empty((rows, *source.stored_shape), dtype=source.stored_dtype, pin_memory=pinned)
            labels = torch.empty(rows, dtype=torch.int64, pin_memory=pinned)
            self._free.put(Slot(stored, labels, -1, np.empty(0, dtype=np.int64)))
        self._closed = False
        self._thread = threading.Thread(target=self._read_ahead, name="loader", daemon=True)
        self._thread.start()

    def take(self, timeout_s: float = TIMEOUT_S) -> Slot:
        """Return the next batch; `give_back` it soon. Raises what the thread did, or DataError after `timeout_s`."""
        try:
            item = self._ready.get(timeout=timeout_s)
        except queue.Empty:
            raise DataError(
                f"the data of a step did not come within {timeout_s:.0f} s: is the storage alive?"
            ) from None
        if isinstance(item, BaseException):
            self._ready.put(item)  # for whoever asks again: the thread is gone
            raise item
        return item

    def give_back(self, slot: Slot) -> None:
        """Let the thread write to `slot` again."""
        self._free.put(slot)

    def close(self) -> None:
        """End the thread, after the batch it reads."""
        self._closed = True
        self._free.put(None)
        self._thread.join(timeout=1.0)

    def _read_ahead(self) -> None:
        try:
            while (slot := self._free.get()) is not None and not self._closed:
                slot.step, slot.indices = self._next, self._order.indices(self._next)
                self._source.gather(slot.indices, slot.stored.numpy())
                torch.index_select(self._source.labels, 0, torch.from_numpy(slot.indices), out=slot.labels)
                self._next += 1
                self._ready.put(slot)
        except BaseException as error:  # noqa: BLE001  # raised by `take`, in the thread that can do something about it
            self._ready.put(error)
