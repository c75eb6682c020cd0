"""The processes of a run, as torchrun starts them: who this one is, sums over all of them, and common decisions."""

import atexit
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# what a process may need to leave after an error, which peers that hang could make forever
LEAVING_S = 10.0
# for gloo's threads to let go of the last exchange: Python aborts, where it ends, on one that waits for it to drop a
# tensor (pytorch/pytorch#190489)
SETTLING_S = 0.2
# NCCL ends the process without a word of ours: it must not be the first to lose patience
NCCL_PATIENCE = 2.0


@dataclass(frozen=True)
class Processes:
    """This process among `world_size`, and the device it computes on.

    hosts: the group of all processes that exchanges what is in host memory, and so waits for no GPU; None alone.
    """

    rank: int
    world_size: int
    device: torch.device
    hosts: dist.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and the log."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of `values` over all processes."""
        if self.world_size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def agree(self, value: T) -> T:
        """Return the first process's `value` on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.hosts)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the `value` of each process, in their order, on every process."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group=self.hosts)
        return values

    def collect(self, own: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """Return on the first process the rows that each one hands in, in their order; on the others nothing.

        counts: of the rows of each, which may be 0; but for them the arrays have one shape and type.
        """
        if not self.is_first:
            if len(own):
                dist.send(torch.from_numpy(own), dst=0, group=self.hosts)
            return []
        parts = [own, *(np.empty((count, *own.shape[1:]), own.dtype) for count in counts[1:])]
        for rank, part in enumerate(parts):
            if rank > 0 and len(part):
                dist.recv(torch.from_numpy(part), src=rank, group=self.hosts)
        return parts

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Raise in every process when the block raised ValueError or OSError in any: its own error, or ValueError.

        Every process comes here, and the block exchanges nothing.
        """
        own: ValueError | OSError | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            own = error
        messages = self.gather(None if own is None else str(own))
        if own is not None:
            raise own
        for rank, message in enumerate(messages):
            if message is not None:
                raise ValueError(f"process {rank}: {message}")


class Ballot:
    """What any process wants, known to all of them at the same step, one round late.

    The votes travel between the hosts while the next step is queued, so that a round waits neither for the GPU nor,
    unless a process is a whole step behind, for a peer.
    """

    def __init__(self, processes: Processes, num_votes: int) -> None:
        self._processes = processes
        self._votes = torch.zeros(num_votes, dtype=torch.int64)
        self._round: dist.Work | None = None

    def cast(self, *votes: bool) -> list[bool]:
        """Hand in this round's votes; return which were cast by any process in the round before.

        A process alone is told its own votes at once.
        """
        result = self.result()
        self._votes = torch.tensor(votes, dtype=torch.int64)
        if self._processes.world_size == 1:
            return self.result()
        self._round = dist.all_reduce(self._votes, dist.ReduceOp.MAX, group=self._processes.hosts, async_op=True)
        return result

    def result(self) -> list[bool]:
        """Return which votes were cast by any process in the last round, when it is over."""
        if self._round is not None:
            self._round.wait()
            self._round = None
        return [bool(vote) for vote in self._votes.tolist()]


def is_peer_failure(error: RuntimeError) -> bool:
    """Return whether `error` is that of an exchange with processes of which one is gone, or does not answer."""
    # gloo has no class of its own; its messages begin with the place in its source
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def resolve_device(name: str, field: str = "engine.device") -> torch.device:
    """Return the device called auto, cpu or cuda; ValueError, which names `field`, where there is none for cuda."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{field}: got 'cuda', expected 'auto' or 'cpu', because no GPU is usable here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def read_ranks() -> tuple[int, int]:
    """Return this process's rank and the number of processes, as torchrun puts them in the environment; alone 0 and 1.

    Raises ValueError for anything but whole numbers of which the first is the smaller.
    """
    got = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not all(text.isdecimal() for text in got) or not int(got[0]) < int(got[1]):
        raise ValueError(
            f"RANK, WORLD_SIZE: got {got[0]!r}, {got[1]!r}, expected a rank from 0 and a number of processes above it"
        )
    return int(got[0]), int(got[1])


@contextmanager
def join_processes(device_name: str, timeout_s: float, field: str = "engine.device") -> Iterator[Processes]:
    """Join the process group that torchrun announces in the environment (NCCL on GPUs, else gloo); leave it after.

    timeout_s: how long an exchange waits for a peer.  field: what the device is called in an error. After an error the
    process leaves within LEAVING_S, if need be by force.
    """
    device = resolve_device(device_name, field)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _, world_size = read_ranks()
    if world_size == 1:
        yield Processes(0, 1, device)
        return
    patience = timedelta(seconds=timeout_s)
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=NCCL_PATIENCE * patience, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=patience)
    atexit.register(time.sleep, SETTLING_S)
    try:
        hosts = dist.new_group(backend="gloo", timeout=patience)
        yield Processes(dist.get_rank(), world_size, device, hosts)
    except BaseException:
        force = threading.Timer(LEAVING_S, os._exit, (1,))
        force.daemon = True
        force.start()
        raise
    dist.destroy_process_group()
