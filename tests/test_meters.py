import time

import pytest
import torch

from soflow.meters import Meter, peak_flops

CPU = torch.device("cpu")


class Clock:
    """A clock that the test turns."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_an_interval_of_steps(monkeypatch):
    clock = Clock(monkeypatch)
    meter = Meter(CPU, images=64, flops=3e9, peak=1e10)
    for _ in range(4):
        with meter.waiting():
            clock.now += 0.125
        clock.now += 0.375
        meter.count()
    with meter.paused():
        clock.now += 1000
    metrics = meter.read()
    assert metrics["time/step_s"] == 0.5
    assert metrics["time/data"] == 0.25
    assert metrics["throughput/images_per_s"] == 128
    assert metrics["throughput/mfu"] == pytest.approx(0.6)
    meter.restart()
    clock.now += 2
    meter.count()
    assert meter.read()["time/step_s"] == 2
    assert meter.read()["time/data"] == 0


def test_mfu_is_left_out_where_the_peak_is_not_known():
    meter = Meter(CPU, 1, 1.0, None)
    meter.count()
    assert "throughput/mfu" not in meter.read()


def test_memory_is_that_of_the_process_on_the_cpu():
    def peak():
        meter = Meter(CPU, 1, 1.0, None)
        meter.count()
        return meter.read()["memory/peak_gib"]

    before = peak()
    block = torch.ones(2**28)  # 1 GiB
    assert peak() >= max(before, block.nbytes / 2**30)
    assert peak() < before + 1.5


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_by_name(name, bf16):
    assert peak_flops(name, "bf16") == bf16
    if bf16 is not None:
        assert peak_flops(name, "fp32") < peak_flops(name, "tf32") < bf16
