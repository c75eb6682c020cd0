"""Iterators of device batches: the same rows from each, by different ways.

`resident` keeps the whole data set on the device. `plain` reads ahead in one thread and copies from its buffers.
`dali` lets NVIDIA DALI copy ahead what that thread read. All are resumed by the step alone.
"""

import abc
import collections
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from soflow.augment import augment, sample_augmentation
from soflow.config import DataConfig
from soflow.data.order import BatchOrder
from soflow.data.ring import HostRing, Slot
from soflow.data.source import DataError, Source
from soflow.distributed import Processes


@dataclass(frozen=True)
class Rows:
    """This process's rows of the global batch of the 0-based `step`, on its device.

    mean: (B, C, H, W) fp32.  std: alike, or None where the mean is the sample.  labels: (B,) int64.
    augment_labels: (B, 6) fp32, or None without augmentation.  indices: (B,) int64, sample numbers, on the CPU.
    """

    mean: Tensor
    std: Tensor | None
    labels: Tensor
    augment_labels: Tensor | None
    indices: np.ndarray
    step: int


class Feeder(Iterator[Rows], abc.ABC):
    """Gives the rows of step `start`, `start` + 1, ... without end; `seek` goes elsewhere.

    nonfinite: whether a batch since the last `require_finite` held NaN or infinity; on the device.
    """

    def __init__(self, config: DataConfig, source: Source, order: BatchOrder, device: torch.device, start: int) -> None:
        self.source = source
        self.order = order
        self.device = device
        self.augment_p = config.augment_p
        self.depth = config.prefetch
        self.step = start
        self._positions = torch.tensor(order.positions, device=device)
        self.nonfinite = torch.zeros((), dtype=torch.bool, device=device)
        self._finite_until = start

    def __next__(self) -> Rows:
        rows = self._read()
        self.step += 1
        return rows

    def seek(self, step: int) -> None:
        """Go on with the 0-based `step`."""
        if step != self.step:
            self.close()
            self.step = self._finite_until = step

    @abc.abstractmethod
    def _read(self) -> Rows:
        """Return the rows of `self.step`."""

    def close(self) -> None:
        """End what reads ahead; the next batch starts it again."""
        return None

    def require_finite(self, processes: Processes) -> None:
        """Raise DataError, on all processes, if any has read NaN or infinity since the last call; it names the samples.

        Only then are the batches since that call read once more.
        """
        since, self._finite_until = self._finite_until, self.step
        if not processes.sum(self.nonfinite.float()).item():
            return
        self.nonfinite.zero_()
        found: set[int] = set()
        for step in range(since, self.step):
            indices = self.order.indices(step)
            mean, std, _ = self.source.read(indices)
            finite = _finite_rows(mean) if std is None else _finite_rows(mean) & _finite_rows(std)
            found.update(indices[~finite.numpy()].tolist())
        # The first to raise would end the others, who still look.
        numbers = sorted(set().union(*processes.gather(found)))
        which = f"samples {', '.join(map(str, numbers[:20]))}" if numbers else "samples, finite when read again,"
        raise DataError(
            f"{which} hold NaN or infinity (steps {since} to {self.step - 1}), expected finite data: try soflow inspect"
        )

    def _finish(self, step: int, indices: np.ndarray, stored: Tensor, labels: Tensor) -> Rows:
        mean, std = self.source.moments(stored)
        if not self.source.finite:
            for moment in (mean, std):
                if moment is not None:
                    # A sum is finite only where all of it is, and takes a tenth of the time of looking at each.
                    self.nonfinite |= ~torch.isfinite(moment.sum())
        augment_labels = None
        if self.augment_p > 0:
            draw = sample_augmentation(self.order.seed, step, self._positions, self.augment_p)
            mean, augment_labels = augment(mean, draw)
        return Rows(mean, std, labels, augment_labels, indices, step)


class ResidentFeeder(Feeder):
    """Rows of a data set that lies on the device as a whole."""

    def __init__(self, config: DataConfig, source: Source, order: BatchOrder, device: torch.device, start: int) -> None:
        super().__init__(config, source, order, device, start)
        stored = torch.empty((len(source), *source.stored_shape), dtype=source.stored_dtype)
        source.gather(np.arange(len(source)), stored.numpy())
        self._stored, self._labels = stored.to(device), source.labels.to(device)

    def _read(self) -> Rows:
        indices = self.order.indices(self.step)
        # Non-blocking, and pinned where that makes a difference: a step must not wait for the device.
        rows = torch.from_numpy(indices)
        rows = rows.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else rows
        stored, labels = self._stored.index_select(0, rows), self._labels.index_select(0, rows)
        return self._finish(self.step, indices, stored, labels)


class PlainFeeder(Feeder):
    """Rows that one thread reads ahead, copied from pinned buffers."""

    _ring: HostRing | None = None

    def __init__(self, config: DataConfig, source: Source, order: BatchOrder, device: torch.device, start: int) -> None:
        super().__init__(config, source, order, device, start)
        self._copying: collections.deque[tuple[Slot, torch.cuda.Event]] = collections.deque()

    def _read(self) -> Rows:
        on_gpu = self.device.type == "cuda"
        if self._ring is None:
            # One buffer more than is read ahead: the one whose copy is under way.
            self._ring = HostRing(self.source, self.order, self.step, self.depth + 1, pinned=on_gpu)
        self._reuse_copied()
        slot = self._ring.take()
        step, indices = slot.step, slot.indices
        if not on_gpu:
            rows = self._finish(step, indices, slot.stored, slot.labels.clone())
            self._ring.give_back(slot)
            return rows
        stored = slot.stored.to(self.device, non_blocking=True)
        labels = slot.labels.to(self.device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._copying.append((slot, copied))
        return self._finish(step, indices, stored, labels)

    def _reuse_copied(self) -> None:
        assert self._ring is not None
        while self._copying:
            slot, copied = self._copying[0]
            if len(self._copying) >= self.depth:
                copied.synchronize()  # the host is that many steps ahead of the device
            elif not copied.query():
                return
            self._copying.popleft()
            self._ring.give_back(slot)

    def close(self) -> None:
        """End the thread; the next batch starts it again."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
            self._copying.clear()


class DaliFeeder(Feeder):
    """Rows that one thread reads ahead and DALI copies to the device ahead of their use."""

    _ring: HostRing | None = None

    def _read(self) -> Rows:
        if self._ring is None:
            self._start()
        assert self._ring is not None
        stored, labels = (from_dlpack(output.as_tensor()) for output in self._pipeline.run())
        step, indices = self._fed.popleft()
        # Cloned, because DALI uses its memory again at its next run; moments() does the same for the samples.
        return self._finish(step, indices, stored, labels.clone())

    def _start(self) -> None:
        from nvidia.dali import Pipeline, fn, types

        dtypes = {torch.uint8: types.UINT8, torch.float16: types.FLOAT16, torch.float32: types.FLOAT}
        ring = HostRing(self.source, self.order, self.step, self.depth + 1, pinned=False)
        fed: collections.deque[tuple[int, np.ndarray]] = collections.deque()
        lent: list[Slot] = []

        def feed() -> tuple[np.ndarray, np.ndarray]:
            # DALI has copied what the last call returned.
            while lent:
                ring.give_back(lent.pop())
            slot = ring.take()
            lent.append(slot)
            fed.append((slot.step, slot.indices))
            return slot.stored.numpy(), slot.labels.numpy()

        on_gpu = self.device.type == "cuda"
        pipeline = Pipeline(
            batch_size=len(self.order.positions),
            num_threads=1,
            device_id=self.device.index or 0 if on_gpu else None,
            # without a GPU there is nowhere to copy ahead to, and the thread reads ahead already
            prefetch_queue_depth=self.depth if on_gpu else 1,
        )
        with pipeline:
            ndim = len(self.source.stored_shape)
            outputs = fn.external_source(
                source=feed,
                num_outputs=2,
                batch=True,
                dtype=[dtypes[self.source.stored_dtype], types.INT64],
                ndim=[ndim, 0],
            )
            pipeline.set_outputs(*(output.gpu() if on_gpu else output for output in outputs))
        pipeline.build()
        self._ring, self._fed, self._pipeline = ring, fed, pipeline

    def close(self) -> None:
        """End thread and pipeline; the next batch starts them again."""
        if self._ring is not None:
            self._ring.close()
            self._ring = None
            del self._pipeline


def open_feeder(config: DataConfig, source: Source, order: BatchOrder, device: torch.device, start: int = 0) -> Feeder:
    """Return the iterator of device batches that the section `data` of a configuration asks for.

    auto is resident for a data set in memory, else plain. Raises DataError as `require_feeder` does.
    """
    require_feeder(config)
    kind = config.feeder
    if kind == "auto":
        kind = "resident" if source.in_memory else "plain"
    kinds: dict[str, type[Feeder]] = {"resident": ResidentFeeder, "plain": PlainFeeder, "dali": DaliFeeder}
    return kinds[kind](config, source, order, device, start)


def require_feeder(config: DataConfig) -> None:
    """Raise DataError where dali is asked for and not installed."""
    if config.feeder == "dali" and not has_dali():
        raise DataError(
            "data.feeder: got 'dali', expected 'auto', 'plain' or 'resident', because DALI is not installed"
        )


def has_dali() -> bool:
    """Return whether NVIDIA DALI can be imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def _finite_rows(moment: Tensor) -> Tensor:
    return torch.isfinite(moment).flatten(1).all(1)
