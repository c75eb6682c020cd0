"""The GPU benchmark of the kernels, all but its clock: on the CPU, at small shapes."""

import json
import sys

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from bench import kernels as bench_kernels


@pytest.fixture
def on_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU 1")
    monkeypatch.setattr(torch, "compile", lambda op, dynamic: op)
    for name, value in (("DEVICE", "cpu"), ("BATCH_SIZE", 4), ("NUM_CONSISTENCY", 2), ("PIXELS", (2, 4, 4))):
        monkeypatch.setattr(bench_kernels, name, value)
    monkeypatch.setattr(bench_kernels, "SHAPES", dict.fromkeys(("DiT-B/4", "DiT-XL/2"), (4, 16, 2)))
    monkeypatch.setattr(bench_kernels, "copy_bandwidth", lambda: 3000.0)

    def call_once(calls, milliseconds):
        for call in calls.values():
            call()
        return {name: 0.4 if name == "copy" else 0.5 for name in calls}

    monkeypatch.setattr(bench_kernels, "median_ms", call_once)
    monkeypatch.setattr(sys, "argv", ["bench.kernels", "--quick", "--json", str(tmp_path / "out.json")])
    return tmp_path / "out.json"


def test_every_op_is_timed_beside_a_copy_of_as_many_bytes(on_the_cpu, capsys):
    assert bench_kernels.main() == 0
    record = json.loads(on_the_cpu.read_text(encoding="utf-8"))
    forward = [row for row in record["rows"] if row["direction"] == "forward"]
    assert len(forward) == 4 + 2 + 2 * 7
    assert {row["op"] for row in forward} >= {"draw", "solution_loss", "silu", "gelu", "attention_difference"}
    assert all(row["fraction_of_copy"] == pytest.approx(0.8) for row in record["rows"])
    (norm,) = (row for row in forward if row["op"] == "modulated_norm" and row["shape"] == "DiT-B/4")
    assert norm["fused_gb_per_s"] == pytest.approx(6 * 4 * 4 * 16 / 0.5e6)
    assert "{" not in capsys.readouterr().out


def test_what_is_wrong_is_said_last_and_not_timed(on_the_cpu, monkeypatch, capsys):
    gelu = bench_kernels.kernels.gelu
    monkeypatch.setattr(bench_kernels.kernels, "gelu", lambda x, bias: 1.1 * gelu(x, bias))
    assert bench_kernels.main() == 1
    assert "gelu" not in {row["op"] for row in json.loads(on_the_cpu.read_text(encoding="utf-8"))["rows"]}
    assert capsys.readouterr().out.splitlines()[-1].startswith("wrong: gelu, DiT-XL/2: off by ")
