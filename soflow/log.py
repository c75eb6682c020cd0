"""What a run says: metrics.jsonl as the truth, TensorBoard, one plain line per interval, a progress bar on terminals.

metrics.jsonl holds one JSON object per line, "step" first. A number that is not finite is written there as null, since
JSON has no other word for it; the plain line says nan or inf.
"""

import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from soflow.checkpoint import replacing

# what the plain line shows, in this order, where the interval has it
COLUMNS = (
    ("loss", "loss/total"),
    ("mse velocity", "loss/velocity_mse"),
    ("mse consistency", "loss/consistency_mse"),
    ("grad norm", "grad_norm"),
)
IMAGES_PER_S = "throughput/images_per_s"


class LogError(ValueError):
    """A metrics.jsonl that cannot be continued; the message names the file, the line and what was expected."""


class NullLog:
    """A log that says nothing: for every process but the first."""

    def interval(self, step: int, values: Mapping[str, float]) -> None:
        """Ignore the metrics."""

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """Ignore the image."""

    def info(self, text: str) -> None:
        """Ignore the text."""

    def advance(self, step: int) -> None:
        """Ignore the progress."""

    def close(self) -> None:
        """Have nothing to close."""


class RunLog(NullLog):
    """The log of the run in `folder`, continued after `first_step` finished steps (0: a new run).

    What metrics.jsonl says about later steps is cut off, so that the lines of a resumed run have no gap and no repeat;
    a last line that was half written goes too. Raises LogError where any other line is not a JSON object with a step,
    and OSError where the folder cannot be written.
    """

    def __init__(self, folder: Path, total_steps: int, first_step: int) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        metrics = folder / "metrics.jsonl"
        _cut_back(metrics, first_step)
        self._metrics = metrics.open("a", encoding="utf-8")
        self._told_before = threading.excepthook
        threading.excepthook = self._told
        with _naming(folder):
            self._tensorboard = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)
        # disable=None: no bar unless stderr is a terminal
        self._bar = tqdm(total=total_steps, initial=first_step, unit="step", file=sys.stderr, disable=None)
        self._total_steps = total_steps
        self._first_step = first_step
        self._start = time.monotonic()

    def interval(self, step: int, values: Mapping[str, float]) -> None:
        """Write the metrics of the interval that ends after `step` steps: to metrics.jsonl, TensorBoard and stdout."""
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with _naming(self._folder):
            self._metrics.write(json.dumps({"step": step, **record}, allow_nan=False) + "\n")
            self._metrics.flush()
            # a checkpoint is on the disk when it is there: the lines before it must not be lost with the machine either
            os.fsync(self._metrics.fileno())
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()
        seconds_left = (time.monotonic() - self._start) / (step - self._first_step) * (self._total_steps - step)
        self.info(_plain_line(step, self._total_steps, values, seconds_left))

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """Show `array`, (H, W, 1 or 3) uint8, in TensorBoard."""
        with _naming(self._folder):
            self._tensorboard.add_image(name, array, step, dataformats="HWC")

    def info(self, text: str) -> None:
        """Write `text` as lines of their own on stdout, without tearing the progress bar."""
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()

    def advance(self, step: int) -> None:
        """Move the progress bar to `step` finished steps."""
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        """Write out what is still held back and end the progress bar."""
        try:
            with _naming(self._folder), closing(self._metrics), closing(self._tensorboard):
                self._bar.close()
        finally:
            threading.excepthook = self._told_before

    def _told(self, end: threading.ExceptHookArgs) -> None:
        # what ends TensorBoard's thread is raised where the log is written, too: no traceback besides
        if not (isinstance(end.exc_value, OSError) and type(end.thread).__name__ == "_AsyncWriterThread"):
            self._told_before(end)


@contextmanager
def _naming(folder: Path) -> Iterator[None]:
    # a full disk shows without a path when an open file is written; TensorBoard opens its own by bytes
    try:
        yield
    except OSError as error:
        path = str(folder) if error.filename is None else os.fsdecode(error.filename)
        raise OSError(error.errno, f"cannot write the log: {error.strerror}", path) from error


def _plain_line(step: int, total_steps: int, values: Mapping[str, float], seconds_left: float) -> str:
    width = len(str(total_steps))
    parts = [f"step {step:{width}}/{total_steps}", f"{100 * step / total_steps:5.1f}%"]
    parts += [f"{label} {values[name]:#9.4g}" for label, name in COLUMNS if name in values]
    if IMAGES_PER_S in values:
        parts.append(f"{values[IMAGES_PER_S]:9.1f} images/s")
    parts.append(f"{timedelta(seconds=round(seconds_left))} left")
    return "  ".join(parts)


def _cut_back(path: Path, last_step: int) -> None:
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            step = json.loads(line)["step"]
            keep = step <= last_step
        except (ValueError, LookupError, TypeError) as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise LogError(f"{path}, line {number}: got {line[:80]!r}, expected a JSON object with a step") from error
        if keep:
            kept.append(line + "\n")
    if "".join(kept) != text:
        with replacing(path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")
