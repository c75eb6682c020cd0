"""What a run costs, per interval: time, images, share of the device's peak, waiting for data, memory.

The device is waited for once per interval and where the clock stops, never within a step.
"""

import re
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Dense peaks in TFLOP/s with (float32, TF32, bfloat16) inputs, from NVIDIA's data sheets; the first name that the
# device's contains counts.
PEAK_TFLOPS = {
    "B200": (75.0, 1125.0, 2250.0),
    "GH200": (67.0, 494.7, 989.4),
    "H200": (67.0, 494.7, 989.4),
    "H100 PCIe": (51.2, 378.0, 756.0),
    "H100 NVL": (60.0, 417.5, 835.5),
    "H100": (66.9, 494.7, 989.4),
    "A100": (19.5, 156.0, 312.0),
    "L40S": (91.6, 183.0, 362.0),
    "L40": (90.5, 90.5, 181.0),
    "L4": (30.3, 60.0, 121.0),
    "A10": (31.2, 62.5, 125.0),
}
PRECISIONS = ("fp32", "tf32", "bf16")


def peak_flops(device_name: str, precision: str) -> float | None:
    """Return the operations per second of matrix products that a GPU can do at most; None for one not in the table."""
    for name, peaks in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return 1e12 * peaks[PRECISIONS.index(precision)]
    return None


class Meter:
    """Counts steps of an interval, without what is not training.

    images: of all processes, per step.  flops: operations of this process per step, as the model defines them.
    peak: operations per second that the device can do at most; None where that is not known.
    """

    def __init__(self, device: torch.device, images: int, flops: float, peak: float | None) -> None:
        self.device = device
        self.images = images
        self.flops = flops
        self.peak = peak
        self.restart()

    def restart(self) -> None:
        """Begin an interval."""
        self.steps = 0
        self.seconds = 0.0
        self.waited = 0.0
        self.start = self._now()

    def count(self) -> None:
        """Count a step."""
        self.steps += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within: the training waits for its data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within: something that is not training."""
        self.seconds += self._now() - self.start
        yield
        self.start = self._now()

    def read(self) -> dict[str, float]:
        """Return the metrics of the interval, by their names in the log; its steps must have been counted.

        time/step_s: seconds per step.  time/data: share of them spent waiting for data.  throughput/images_per_s.
        throughput/mfu: share of the device's peak, where that is known.  memory/peak_gib: since the start, of tensors
        on a GPU (a captured step allocates while it is captured, not when it is replayed), on the CPU of the process.
        """
        seconds = self.seconds + self._now() - self.start
        metrics = {
            "time/step_s": seconds / self.steps,
            "time/data": self.waited / seconds,
            "throughput/images_per_s": self.images * self.steps / seconds,
            "memory/peak_gib": self._peak_bytes() / 2**30,
        }
        if self.peak is not None:
            metrics["throughput/mfu"] = self.flops * self.steps / seconds / self.peak
        return metrics

    def _peak_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # KiB, except on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
