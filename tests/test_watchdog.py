"""The thread beside the training; what it says of peers is in test_faults.py."""

import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from processes import ENVIRONMENT, ROOT

from soflow import watchdog
from soflow.distributed import Processes
from soflow.watchdog import SIGNALS, Watchdog

ALONE = Processes(0, 1, torch.device("cpu"))

HANGS = """
import os, signal, sys, time
import torch
from soflow.distributed import Processes
from soflow.watchdog import Watchdog

with Watchdog(Processes(0, 1, torch.device("cpu")), timeout_s=float(sys.argv[1]), grace_s=float(sys.argv[2])) as dog:
    dog.beat(7)
    if sys.argv[3] == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60) if sys.argv[3] == "hang" else [time.sleep(0.1) or dog.beat(8) for _ in range(600)]
print("survived")
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_noted_and_handlers_restored(signum):
    before = [signal.getsignal(known) for known in SIGNALS]
    wakeup = signal.set_wakeup_fd(-1)
    with Watchdog(ALONE, 60, 60) as watchdog:
        assert watchdog.stop_signal is None
        for _ in range(3):
            os.kill(os.getpid(), signum)
        assert watchdog.stop_signal == signal.Signals(signum).name
        os.kill(os.getpid(), signal.SIGINT)
        assert watchdog.stop_signal == signal.Signals(signum).name
    assert [signal.getsignal(known) for known in SIGNALS] == before
    assert signal.set_wakeup_fd(wakeup) == wakeup


def test_a_second_interrupt_ends_at_once():
    with Watchdog(ALONE, 60, 60) as watchdog:
        os.kill(os.getpid(), signal.SIGINT)
        assert watchdog.stop_signal == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("timeout_s", "grace_s", "cause", "message"),
    [
        ("1", "60", "hang", r"error: step 8: no progress for 1 s \(engine.timeout_s\); process 0 ended in <module>"),
        ("60", "1", "signal", r"error: step \d: SIGTERM came 1 s ago \(engine.grace_s\); process 0 ended in "),
    ],
)
def test_what_does_not_end_is_ended(timeout_s, grace_s, cause, message):
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGS, timeout_s, grace_s, cause],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert re.search(message, done.stderr), done.stderr
    assert "survived" not in done.stdout
    assert time.monotonic() - began < 40


def test_a_signal_is_noted_while_the_main_thread_hangs():
    """In what the interpreter does not interrupt: no handler of Python's runs."""
    seen = []
    hangs = threading.Event()

    def look() -> None:
        time.sleep(0.2)  # until it hangs
        os.kill(os.getpid(), signal.SIGTERM)
        while dog.stop_signal is None and hangs.is_set():
            time.sleep(0.01)
        seen.append((dog.stop_signal, hangs.is_set()))

    with Watchdog(ALONE, 60, 60) as dog:
        looking = threading.Thread(target=look)
        hangs.set()
        looking.start()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 5_000_000)
        hangs.clear()
        looking.join()
    assert seen == [("SIGTERM", True)]


@pytest.mark.slow
def test_what_moves_is_left_alone_and_what_does_not_is_ended_after_both_limits(monkeypatch):
    ended = []
    monkeypatch.setattr(watchdog, "PERIOD_S", 0.01)
    monkeypatch.setattr(watchdog, "MARGIN_S", 1.0)
    monkeypatch.setattr(Watchdog, "_end", lambda self, reason: ended.append(time.monotonic()))
    with Watchdog(ALONE, 1.0, 60) as dog:
        for step in range(26):
            time.sleep(0.1)
            dog.beat(step)
        last = time.monotonic()
        assert not ended
        while not ended and time.monotonic() - last < 30:
            time.sleep(0.1)
    assert ended[0] - last > 1.9
