"""A thread beside the training: it sees signals at once, knows how far the peers are, and ends what no longer moves."""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType, TracebackType

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # they are public

from soflow.distributed import Processes, is_peer_failure

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
FAILED = 1

# between two looks at the clock, and two reports to the peers
PERIOD_S = 0.5
# after the time limit of an exchange, whose own error says more
MARGIN_S = 2.0


class PeerError(RuntimeError):
    """A process that is gone or does not answer; the message names the step and the process."""


class Watchdog:
    """While its context lasts: signals to stop are noted, not obeyed; and a process that hangs is ended with a message.

    `stop_signal` names the signal that asked to stop, if any; a second SIGINT is a KeyboardInterrupt, a second one of
    the others changes nothing. `grace_s` after the signal the process is ended. So is a process that does not call
    `beat` for `timeout_s`. All of this works while the main thread hangs in a collective or a system call.
    """

    def __init__(self, processes: Processes, timeout_s: float, grace_s: float) -> None:
        self.stop_signal: str | None = None
        self._processes = processes
        self._timeout_s = timeout_s
        self._grace_s = grace_s
        self._interrupts = 0
        self._deadline = float("inf")
        self._step = 0
        self._moved = time.monotonic()
        self._peers = _PeerReports(processes) if processes.world_size > 1 else None

    def __enter__(self) -> "Watchdog":
        self._main = threading.get_ident()
        self._inbox, self._outbox = socket.socketpair()
        self._outbox.setblocking(False)
        self._previous = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        # the interpreter runs a handler only when the main thread is back in Python; this is written to at once
        self._previous_wakeup = signal.set_wakeup_fd(self._outbox.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._previous_wakeup)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._outbox.close()
        self._thread.join()
        self._inbox.close()

    def beat(self, step: int) -> None:
        """Say that this process moves: after `step` steps, and again after what it did between two of them."""
        self._step = step
        self._moved = time.monotonic()

    @contextmanager
    def explaining_peers(self) -> Iterator[None]:
        """Raise PeerError for an exchange inside that fails because of a peer."""
        try:
            yield
        except RuntimeError as error:
            if self._peers is None or not is_peer_failure(error):
                raise
            reason = str(error).strip().splitlines()[0]
            blame = self._peers.describe(self._step)
            raise PeerError(f"step {self._step + 1}: {blame}; process {self._processes.rank} got: {reason}") from error

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        self._request_stop(signum)

    def _request_stop(self, signum: int) -> None:
        if self.stop_signal is None:
            self.stop_signal = signal.Signals(signum).name
            self._deadline = time.monotonic() + self._grace_s

    def _watch(self) -> None:
        while True:
            if select.select([self._inbox], [], [], PERIOD_S)[0]:
                received = self._inbox.recv(64)
                if not received:
                    return
                for signum in received:
                    if signum in SIGNALS:
                        self._request_stop(signum)
            if self._peers is not None:
                self._peers.report(self._step)
            now = time.monotonic()
            if now > self._deadline:
                self._end(f"{self.stop_signal} came {self._grace_s:g} s ago (engine.grace_s)")
            if now > self._moved + self._timeout_s + MARGIN_S:
                blame = "" if self._peers is None else f"; {self._peers.describe(self._step)}"
                self._end(f"no progress for {self._timeout_s:g} s (engine.timeout_s){blame}")

    def _end(self, reason: str) -> None:
        place = _innermost(sys._current_frames().get(self._main))
        print(
            f"error: step {self._step + 1}: {reason}; process {self._processes.rank} ended in {place}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(FAILED)


class _PeerReports:
    """How far each process says it is, kept in the store that torchrun set up."""

    def __init__(self, processes: Processes) -> None:
        self._rank = processes.rank
        self._world_size = processes.world_size
        self._count = 0
        # a connection of its own: one that the main thread waits on would be busy
        self._store: Store | None = PrefixStore(
            f"soflow/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
            TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=2),
            ),
        )

    def report(self, step: int) -> None:
        if self._store is None:
            return
        self._count += 1
        try:
            self._store.set(str(self._rank), f"{self._count} {step}")
        except RuntimeError:
            # the process that keeps the store is gone, which the exchange of the step will say
            self._store = None

    def describe(self, own_step: int) -> str:
        """Which processes gave no sign of life, or are behind."""
        before = self._read()
        time.sleep(3 * PERIOD_S)
        after = self._read()
        if before is None or after is None:
            return "process 0 or its host cannot be reached"
        silent = [
            f"process {rank} has given no sign of life since step {after[rank][1]}"
            for rank in range(self._world_size)
            if rank != self._rank and after[rank] == before[rank]
        ]
        behind = [
            f"process {rank} is still in step {step + 1}"
            for rank, (_, step) in enumerate(after)
            if rank != self._rank and step < own_step
        ]
        return ", ".join(silent or behind) or "all processes are alive"

    def _read(self) -> list[tuple[int, int]] | None:
        if self._store is None:
            return None
        reports = []
        try:
            for rank in range(self._world_size):
                known = self._store.check([str(rank)])
                count, step = self._store.get(str(rank)).split() if known else (0, 0)
                reports.append((int(count), int(step)))
        except RuntimeError:
            return None
        return reports


def _innermost(frame: FrameType | None) -> str:
    """The place in the code of this project, or the innermost one, that a thread is at."""
    innermost = frame
    while frame is not None:
        if f"{os.sep}soflow{os.sep}" in frame.f_code.co_filename:
            innermost = frame
            break
        frame = frame.f_back
    if innermost is None:
        return "no Python code"
    return f"{innermost.f_code.co_name} ({innermost.f_code.co_filename}:{innermost.f_lineno})"
