"""The GPU benchmark of attention, all but its clock: on the CPU, at small shapes."""

import json
import sys

import pytest
import torch

from bench import attention

pytest.importorskip("triton", reason="needs Triton")


@pytest.fixture
def on_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU 1")
    monkeypatch.setattr(attention, "DEVICE", "cpu")
    monkeypatch.setattr(attention, "SHAPES", ((2, 16, 2, 8), (1, 80, 1, 16)))
    monkeypatch.setattr(attention, "NETWORKS", ("DiT-B/4",))
    build = attention.build_network
    shape = {"input_size": 32, "patch_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2}
    monkeypatch.setattr(attention, "build_network", lambda name, **kwargs: build("DiT", **shape, **kwargs))

    def call_once(calls, milliseconds):
        for call in calls.values():
            call()
        return dict.fromkeys(calls, 0.5)

    monkeypatch.setattr(attention, "median_ms", call_once)


def test_every_way_is_checked_and_timed(on_the_cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.attention", "--json", str(tmp_path / "out.json")])
    assert attention.main() == 0
    record = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    ordered = [f"{name}, ordered" for name in attention.BACKENDS]
    assert [(tuple(row["shape"]), row["way"]) for row in record["attention"]] == [
        (shape, way) for shape in attention.SHAPES for way in ("ours", *attention.BACKENDS, *ordered)
    ]
    timed = [row for row in record["attention"] if row["obstacle"] is None]
    assert {row["way"] for row in timed} >= {"ours"}
    assert all(row["forward_ms"] == row["both_ms"] == 0.5 for row in timed)
    assert record["joint"][0].keys() >= {"joint_ms", "separate_ms", "alone_ms"}
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["bench.attention"])
    assert attention.main() == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == record


def test_a_wrong_way_is_not_timed(on_the_cpu, monkeypatch, capsys):
    ways = attention.ways
    monkeypatch.setattr(attention, "ways", lambda H: {**ways(H), "efficient": lambda qkv: 1.1 * ways(H)["ours"](qkv)})
    monkeypatch.setattr(sys, "argv", ["bench.attention", "--quick"])
    assert attention.main() == 1
    assert "efficient, (1, 80, 1, 16): wrong: off by 0.1" in capsys.readouterr().out.splitlines()[-1]
