import json
import sys

import pytest
import torch

from bench import data, encode


def test_every_loader_reads_the_same_samples(tmp_path):
    """In one order: what is timed is the same work."""
    data.write_data(tmp_path, 600)
    found = {}
    for loader in ("official 0", "plain float32", "plain float16"):
        stream = data.batches(loader, tmp_path, torch.device("cpu"))
        found[loader] = torch.stack([next(stream) for _ in range(3)])
    torch.testing.assert_close(found["plain float32"], found["official 0"])
    torch.testing.assert_close(found["plain float16"], found["official 0"], rtol=1e-3, atol=1e-3)


def test_some_loaders_are_compared_in_rounds_of_alternating_order(monkeypatch):
    order = []

    def measured(loader, root, device, seconds):
        order.append(loader)
        return data.Measurement(loader, 1000.0 if loader == "official 2" else 2000.0 + len(order), 1.0, 10.0, 0.0)

    monkeypatch.setattr(data, "write_data", lambda root, count: None)
    monkeypatch.setattr(data, "measure_apart", measured)
    official, ours = data.compare(512, 0.1, "cpu", ("official 2", "plain float16"), rounds=3)
    assert order == ["official 2", "plain float16", "plain float16", "official 2", "official 2", "plain float16"]
    assert (official["ratio"], ours["ratio"]) == (1.0, 2.003)


def test_a_measurement_has_its_columns(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "STEP_S", 0.001)
    monkeypatch.setattr(torch, "set_num_threads", lambda num: None)
    data.write_data(tmp_path, 512)
    measured = data.measure("plain float16", tmp_path, torch.device("cpu"), seconds=0.1)
    assert measured.samples_per_s > 0
    assert measured.cpu_us > 0
    assert 0 <= measured.waiting < 1


def test_decoding_is_compared_with_pillow(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda num: None)
    monkeypatch.setattr(sys, "argv", ["bench.encode", "--images", "2", "--json", str(tmp_path / "encode.json")])
    assert encode.main() == 0
    figures = json.loads((tmp_path / "encode.json").read_text())
    assert figures["ratio"] > 0
    # 500 x 375 is wide: there Pillow 13 computes as Pillow 12 does
    assert figures["largest_difference"] == 0
    assert "crops differ by at most 0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bench", "option", "value", "expected"),
    [
        (data, "--samples", "100", "--samples: got 100, expected at least a batch of 256"),
        (data, "--seconds", "0", "--seconds: got 0.0, expected a number above 0"),
        (data, "--seconds", "nan", "--seconds: got nan, expected a number above 0"),
        (data, "--rounds", "0", "--rounds: got 0, expected at least 1"),
        (data, "--loader", "plain float16", "--loader: got plain float16, expected an official one among them"),
        (encode, "--images", "0", "--images: got 0, expected at least 1"),
    ],
)
def test_what_measures_nothing_is_refused(bench, option, value, expected, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", option, value])
    with pytest.raises(SystemExit, match="2"):
        bench.main()
    assert expected in capsys.readouterr().err
