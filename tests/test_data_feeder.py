"""The three ways to feed a step give the same rows, for any number of processes and from any step."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import latent_folders
import numpy as np
import pytest
import torch

from soflow.augment import augment, sample_augmentation
from soflow.config import DataConfig, ObjectiveConfig, TimesConfig
from soflow.data import ArraySource, BatchOrder, DataError, Feeder, LatentSource, Rows, Source, feeder, open_feeder
from soflow.data.feeder import has_dali
from soflow.data.ring import HostRing
from soflow.distributed import Processes
from soflow.draw import sample_batch, share_batch
from soflow.kernels import reference

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
FEEDERS = [
    "resident",
    "plain",
    pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="needs nvidia-dali")),
]
BATCH = 12


def settings(feeder: str, **changes: object) -> DataConfig:
    return DataConfig(source="digits", feeder=feeder, **changes)


def order(source: Source, positions: tuple[int, ...] = tuple(range(BATCH)), seed: int = 5) -> BatchOrder:
    return BatchOrder(len(source), BATCH, seed, positions)


def array_source(n: int = 40, dtype: torch.dtype = torch.float32) -> ArraySource:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1
    if dtype == torch.uint8:
        images = ((images + 1) * 127.5).to(torch.uint8)
    return ArraySource(images, torch.arange(n) % 10, num_classes=10)


def take(feeder: Feeder, count: int) -> list[Rows]:
    try:
        return [next(feeder) for _ in range(count)]
    finally:
        feeder.close()


def assert_same(a: Rows, b: Rows) -> None:
    assert a.step == b.step
    np.testing.assert_array_equal(a.indices, b.indices)
    for name in ("mean", "std", "labels", "augment_labels"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        assert x is None or (x.dtype == y.dtype and torch.equal(x, y)), name


def sources(tmp_path: Path) -> list[Source]:
    latent_folders.write_latents(tmp_path / "half", "float16")
    latent_folders.write_latents(tmp_path / "full", "float32")
    return [
        array_source(),
        array_source(dtype=torch.uint8),
        LatentSource(tmp_path / "half"),
        LatentSource(tmp_path / "full"),
    ]


@pytest.mark.parametrize("kind", FEEDERS)
def test_rows_are_those_of_the_order(kind, tmp_path):
    for source in sources(tmp_path):
        feeder = open_feeder(settings(kind), source, order(source), CPU)
        for step, rows in enumerate(take(feeder, 7)):
            mean, std, labels = source.read(order(source).indices(step))
            expected = Rows(mean, std, labels, None, order(source).indices(step), step)
            assert_same(rows, expected)
            assert rows.mean.dtype == torch.float32


@pytest.mark.parametrize("kind", FEEDERS)
def test_earlier_rows_stay_when_later_ones_are_read(kind, tmp_path):
    """The buffers are used again; what was handed out is not in them."""
    for source in sources(tmp_path):
        kept = take(open_feeder(settings(kind), source, order(source), CPU), 9)
        for rows in kept:
            mean, _, labels = source.read(rows.indices)
            assert torch.equal(rows.mean, mean)
            assert torch.equal(rows.labels, labels)


@pytest.mark.parametrize("kind", FEEDERS)
@pytest.mark.parametrize("start", [1, 5, 17])
def test_resumed_rows_are_those_of_an_unbroken_run(kind, start):
    source = array_source()
    unbroken = take(open_feeder(settings(kind, augment_p=0.5), source, order(source), CPU), start + 4)
    resumed = take(open_feeder(settings(kind, augment_p=0.5), source, order(source), CPU, start), 4)
    for a, b in zip(unbroken[start:], resumed, strict=True):
        assert_same(a, b)
    sought = open_feeder(settings(kind, augment_p=0.5), source, order(source), CPU)
    next(sought)
    sought.seek(start)
    assert_same(take(sought, 1)[0], unbroken[start])


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", FEEDERS)
def test_processes_share_the_rows_of_one(kind, processes, tmp_path):
    """Indices, labels, latents, noise and times, to the bit, from the start and from three steps in the middle."""
    latent_folders.write_latents(tmp_path / "latents", counts=(30, 21))
    source = LatentSource(tmp_path / "latents")
    shares = [share_batch(BATCH, 0.75, rank, processes) for rank in range(processes)]
    whole_share = share_batch(BATCH, 0.75, 0, 1)
    for start in (0, 2, 7, 11):
        (whole,) = take(open_feeder(settings(kind), source, order(source, whole_share.positions), CPU, start), 1)
        expected = draw(whole, whole_share)
        seen: list[int] = []
        for share in shares:
            (rows,) = take(open_feeder(settings(kind), source, order(source, share.positions), CPU, start), 1)
            positions = torch.tensor(share.positions)
            np.testing.assert_array_equal(rows.indices, whole.indices[positions])
            assert torch.equal(rows.labels, whole.labels[positions])
            for ours, theirs in zip(draw(rows, share), expected, strict=True):
                assert torch.equal(ours, theirs[positions])
            seen += share.positions
        assert sorted(seen) == list(range(BATCH))


def draw(rows: Rows, share) -> tuple[torch.Tensor, ...]:
    """Data, noise and noise keys of the rows, as a step draws them."""
    batch = sample_batch(
        rows.mean,
        rows.std,
        rows.labels,
        torch.tensor(share.positions),
        share.num_velocity,
        seed=5,
        step=torch.tensor(rows.step),
        r=torch.tensor(0.1),
        times=TimesConfig(),
        objective=ObjectiveConfig(),
        ops=reference,
    )
    return batch.x_0, batch.x_1, batch.t, batch.draw_keys


@pytest.mark.parametrize("kind", FEEDERS)
def test_every_sample_comes_once_per_epoch_and_epochs_differ(kind):
    source = array_source(n=3 * BATCH)
    rows = take(open_feeder(settings(kind), source, order(source), CPU), 6)
    first, second = (np.concatenate([r.indices for r in part]) for part in (rows[:3], rows[3:]))
    for epoch in (first, second):
        np.testing.assert_array_equal(np.sort(epoch), np.arange(3 * BATCH))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("kind", FEEDERS)
def test_augmentation_is_that_of_seed_step_and_position(kind):
    """By each feeder, for positions that are not the places in the share."""
    source, positions = array_source(dtype=torch.uint8), (3, 8, 1)
    feeder = open_feeder(settings(kind, augment_p=0.3), source, order(source, positions), CPU)
    for step, rows in enumerate(take(feeder, 3)):
        mean, _, _ = source.read(rows.indices)
        images, labels = augment(mean, sample_augmentation(5, step, torch.tensor(positions), 0.3))
        assert torch.equal(rows.augment_labels, labels)
        assert torch.equal(rows.mean, images)


def test_auto_keeps_what_is_in_memory_on_the_device(tmp_path):
    latent_folders.write_latents(tmp_path)
    for source, expected in ((array_source(), "ResidentFeeder"), (LatentSource(tmp_path), "PlainFeeder")):
        assert type(open_feeder(settings("auto"), source, order(source), CPU)).__name__ == expected


def test_dali_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr("soflow.data.feeder.has_dali", lambda: False)
    source = array_source()
    with pytest.raises(DataError, match=r"data.feeder: got 'dali', expected .* not installed"):
        open_feeder(settings("dali"), source, order(source), CPU)


class Faulty(ArraySource):
    """Fails at the third gather, as a disk may."""

    in_memory = False
    error: BaseException = OSError(5, "Input/output error", "shard")

    def gather(self, indices, out):
        self.reads = getattr(self, "reads", 0) + 1
        if self.reads == 3:
            raise self.error
        super().gather(indices, out)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), DataError("shard: gone"), ZeroDivisionError("x")])
@pytest.mark.parametrize("kind", FEEDERS[1:])
def test_what_the_thread_raises_comes_out_at_its_batch(kind, error, monkeypatch):
    monkeypatch.setattr(Faulty, "error", error)
    source = Faulty(torch.zeros(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64))
    feeder = open_feeder(settings(kind), source, order(source), CPU)
    with pytest.raises(type(error)) as caught:
        take(feeder, 3)
    assert caught.value is error


def test_an_exception_comes_again_and_does_not_hang():
    source = Faulty(torch.zeros(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64))
    feeder = open_feeder(settings("plain"), source, order(source), CPU)
    next(feeder), next(feeder)
    for _ in range(2):
        with pytest.raises(OSError, match="Input/output error"):
            next(feeder)
    feeder.close()


def test_a_hanging_disk_is_an_error():
    release = threading.Event()

    class Hanging(ArraySource):
        def gather(self, indices, out):
            release.wait(30)

    source = Hanging(torch.zeros(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64))
    ring = HostRing(source, order(source), 0, 2, pinned=False)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"did not come within 0 s: is the storage alive\?"):
        ring.take(timeout_s=0.2)
    assert time.monotonic() - start < 5
    release.set()
    ring.close()


def loaders() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "loader"}


def test_closing_ends_the_thread():
    others = loaders()  # of feeders that another test left open
    source = array_source()
    feeder = open_feeder(settings("plain"), source, order(source), CPU)
    next(feeder)
    assert loaders() - others
    feeder.close()
    assert not loaders() - others


def test_closing_reads_no_further_batch():
    """A slow disk would be read for a feeder that is gone, beside its successor's thread."""
    begun, release, reads, others = threading.Event(), threading.Event(), [], loaders()

    class Slow(ArraySource):
        def gather(self, indices, out):
            reads.append(indices)
            begun.set()
            release.wait(30)

    source = Slow(torch.zeros(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64))
    ring = HostRing(source, order(source), 0, 4, pinned=False)
    assert begun.wait(30)
    threading.Timer(0.3, release.set).start()
    ring.close()
    assert not loaders() - others
    assert len(reads) == 1


@pytest.mark.parametrize("kind", FEEDERS)
@pytest.mark.parametrize(("row", "value"), [((3, 1), np.nan), ((9, 6), np.inf)])
def test_latents_that_are_not_finite_raise_the_flag_with_their_numbers(kind, row, value, tmp_path):
    latents = latent_folders.write_latents(tmp_path, counts=(24,))
    latents[row] = value
    entry = latent_folders.write_npy(tmp_path / "latents-00000.npy", latents)
    latent_folders.rewrite_manifest(tmp_path, shards=[entry])
    source = LatentSource(tmp_path)
    feeder = open_feeder(settings(kind), source, order(source), CPU)
    take(feeder, 2)
    assert feeder.nonfinite.item()
    with pytest.raises(DataError, match=rf"samples {row[0]} hold NaN or infinity \(steps 0 to 1\), expected finite"):
        feeder.require_finite(ALONE)
    assert not feeder.nonfinite.item()


@pytest.mark.parametrize("kind", FEEDERS)
def test_finite_data_raises_no_flag(kind, tmp_path):
    latent_folders.write_latents(tmp_path)
    source = LatentSource(tmp_path)
    feeder = open_feeder(settings(kind), source, order(source), CPU)
    take(feeder, 3)
    assert not feeder.nonfinite.item()
    feeder.require_finite(ALONE)


class Decaying(ArraySource):
    """From some moment on, sample 7 is NaN."""

    finite = False
    in_memory = False
    decayed = False

    def gather(self, indices, out):
        super().gather(indices, out)
        out[(indices == 7) & self.decayed] = np.nan


def test_only_batches_since_the_last_look_are_read_again(monkeypatch):
    source = Decaying(torch.zeros(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64))
    feeder = open_feeder(settings("plain"), source, order(source), CPU)
    for _ in range(10):
        for _ in range(100):
            next(feeder)
        feeder.require_finite(ALONE)
    source.decayed = True
    while not feeder.nonfinite.item():
        next(feeder)
    read_again = []
    read = source.read
    monkeypatch.setattr(source, "read", lambda indices: read_again.append(indices) or read(indices))
    with pytest.raises(DataError, match=r"samples 7 hold NaN or infinity \(steps 1000 to "):
        feeder.require_finite(ALONE)
    feeder.close()
    assert len(read_again) == feeder.step - 1000 < 20


def test_steps_before_a_seek_are_not_read_again():
    source = Decaying(torch.zeros(40, 1, 4, 4), torch.zeros(40, dtype=torch.int64))
    source.decayed = True
    feeder = open_feeder(settings("plain"), source, order(source), CPU)
    feeder.seek(1000)
    while not feeder.nonfinite.item():
        next(feeder)
    with pytest.raises(DataError, match=r"samples 7 hold NaN or infinity \(steps 1000 to "):
        feeder.require_finite(ALONE)
    feeder.close()


def test_a_batch_larger_than_the_data_is_refused():
    source = array_source(n=5)
    feeder = open_feeder(settings("plain"), source, order(source), CPU)
    with pytest.raises(DataError, match=r"train.batch_size: got 12, expected at most the 5 samples"):
        next(feeder)
    feeder.close()


def test_a_buffer_is_used_again_only_after_its_copy_to_the_gpu(monkeypatch):
    """Copies that a GPU makes when it is waited for, as late as it may."""
    queued: list[tuple[torch.Tensor, torch.Tensor]] = []

    class Event:
        def record(self) -> None:
            self.copies = queued[:]
            del queued[:]

        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            for there, here in self.copies:
                there.copy_(here)

    def to(here: torch.Tensor, device: object, non_blocking: bool) -> torch.Tensor:
        assert non_blocking
        queued.append((torch.full_like(here, -1), here))
        return queued[-1][0]

    source = ArraySource(torch.rand(40, 3, 8, 8), torch.arange(40) % 10, num_classes=10)
    order = BatchOrder(40, 12, 5, tuple(range(12)))
    reading = open_feeder(DataConfig(source="digits", feeder="plain", prefetch=2), source, order, ALONE.device)
    reading.device = SimpleNamespace(type="cuda")
    monkeypatch.setattr(reading, "_finish", lambda step, indices, stored, labels: (indices, stored, labels))
    monkeypatch.setattr(feeder, "HostRing", lambda *args, pinned: HostRing(*args, pinned=not pinned))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "to", to)
        read = [next(reading) for _ in range(12)]
    reading.close()
    for step, (indices, stored, labels) in enumerate(read[:10]):
        assert (indices == order.indices(step)).all()
        assert torch.equal(stored, source.images[indices])
        assert torch.equal(labels, source.labels[indices])


@pytest.mark.skipif(not has_dali(), reason="needs nvidia-dali")
def test_rows_outlive_the_memory_of_dali():
    """Which a GPU's pipeline uses again at every run."""

    class Reusing:
        def __init__(self, pipeline) -> None:
            self.pipeline, self.memory = pipeline, None

        def run(self):
            made = [torch.from_dlpack(output.as_tensor()).clone() for output in self.pipeline.run()]
            self.memory = self.memory or [torch.empty_like(x) for x in made]
            for ours, x in zip(self.memory, made, strict=True):
                ours.copy_(x)
            return [SimpleNamespace(as_tensor=lambda x=x: x) for x in self.memory]

    source = ArraySource(torch.rand(40, 3, 8, 8), torch.arange(40) % 10, num_classes=10)
    order = BatchOrder(40, 12, 5, tuple(range(12)))
    reading = open_feeder(DataConfig(source="digits", feeder="dali"), source, order, ALONE.device)
    reading._start()
    reading._pipeline = Reusing(reading._pipeline)
    for rows in [next(reading) for _ in range(3)]:
        assert torch.equal(rows.mean, source.images[rows.indices])
        assert torch.equal(rows.labels, source.labels[rows.indices])
    reading.close()
